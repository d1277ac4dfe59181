"""Scripted judges for tests, and what runs in processes that tests kill: imported there without torch or pytest."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from llavakit.cli import judge as commands
from llavakit.cli import options
from llavakit.cli.asking import Paying
from llavakit.eval.judge import Case, Job, run
from llavakit.responder import Completion, Finish, Ledger, Limits, Query, Usage

LIMITS = Limits(concurrency=4)
_ANSWER = re.compile(r"\[Assistant (\d)\]\n(.*?)\n\n\[End of Assistant \1\]", re.DOTALL)
Say = Callable[[Query], "str | tuple[str, Finish]"]


def cases(count: int, category: str = "conv") -> list[Case]:
    words = ({"question": f"What is {n}?", "reference": f"reference {n}", "candidate": f"candidate {n}"} for n in range(count))
    return [Case(id=str(n), given=n, category=category, context="X", **told) for n, told in enumerate(words)]


def asked(query: Query) -> str:
    return query.conversation.turns[-1].text


def answers(query: Query) -> tuple[str, str]:
    """The two answers as the judge reads them."""
    first, second = _ANSWER.findall(asked(query))
    return first[1], second[1]


class Scripted:
    """A judge that says what a function makes of the query, and counts; after ``die`` replies it kills its process."""

    name, at_once = "scripted", 4

    def __init__(self, say: Say, *, die: int | None = None) -> None:
        self.say, self.die = say, die
        self.asked: Counter[str] = Counter()

    async def complete(self, query: Query) -> Completion:
        if self.die is not None and self.asked.total() >= self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        self.asked[query.key(self.name)] += 1
        said = self.say(query)
        text, finish = said if isinstance(said, tuple) else (said, "stop")
        return Completion(text=text, finish=finish, model="scripted-0613", usage=Usage(prompt_tokens=10, reply_tokens=2))

    async def close(self) -> None:
        pass


def moody(query: Query) -> str:
    """Some first replies hold no scores; all else depends on the words of the query alone."""
    number = int(re.findall(r"What is (\d+)", asked(query))[0])
    if number % 3 == 0 and query.sampling.seed == 0:
        return "Both are fine.\n8 7"
    return f"{5 + number % 5} {1 + number % 7}\nbecause of {number}"


def job(count: int = 24) -> Job:
    return Job(cases=cases(count), swap=True)


def work(ledger: Path, die: int | None) -> None:
    """A run of ``job`` with the moody judge, whole or until it is killed."""
    with Ledger(ledger) as held:
        run(job(), Scripted(moody, die=die), held, limits=LIMITS)


def command(name: str, answers: Path, folder: Path | None = None, **more: object) -> None:
    """``llava eval judge`` as a function: the options that are not given are those of the command line."""
    shared: dict[str, object] = {field.name: field.default for kind in (Paying, options.Loading) for field in fields(kind)}
    commands.judge(**{**shared, "name": name, "answers": answers, "folder": folder, **more})  # type: ignore[arg-type]
