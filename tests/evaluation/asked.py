"""A model of a few lines, and questions for it; imported without torch or pytest, also by processes that tests kill."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import ImageError
from llavakit.eval.benchmark import Protocol, Question
from llavakit.eval.harness import Job, by_model
from llavakit.eval.run_folder import Run, Share, digest
from llavakit.types import Conversation, Sampling

PLAIN = Protocol(name="plain")


def questions(count: int) -> list[Question]:
    """Of many lengths; every official id stands for three questions."""
    return [
        Question(id=f"q{n}", given=n // 3, prompt=f"{n} {'word ' * (n * 7 % 13)}?", category="even" if n % 2 == 0 else "odd", truth=str(n))
        for n in range(count)
    ]


class Echo:
    """Says the last words of the prompt, and how many were asked together: so answers tell which batch they came from."""

    def __init__(self, *, bad: Sequence[str] = (), broken: Sequence[str] = (), slow: float = 0.0) -> None:
        self.bad, self.broken, self.slow = bad, broken, slow
        self.batches: list[list[str]] = []

    def encode(self, conversation: Conversation, sampling: Sampling) -> str:
        text = conversation.messages[-1].text
        if text.split()[0] in self.bad:
            raise ImageError("it is torn", code="image_truncated", where="x.png", remedy="get it again")
        return text

    def reply_encoded(self, encoded: Sequence[Any], sampling: Sampling) -> list[str]:
        time.sleep(self.slow)
        self.batches.append(list(encoded))
        if any(text.split()[0] in self.broken for text in encoded):
            raise RuntimeError("out of memory")
        return [f"{text.split()[0]} of {'+'.join(sorted(one.split()[0] for one in encoded))}" for text in encoded]


def run(asked: Sequence[Question], *, protocol: Protocol = PLAIN, model: str = "echo") -> Run:
    return Run(benchmark="test", protocol=protocol, prompts_sha256=digest(asked), questions=len(asked), model=model, date="2026-11-21")


def job(out: Path, count: int = 40, *, share: Share | None = None, limit: int | None = None, **changes: Any) -> Job:
    asked = questions(count)
    return Job(questions=asked, run=run(asked, **changes), out=out, limit=limit, share=share or Share())


def slowly(out: Path, count: int, batch: int) -> None:
    """What a process does until it is killed."""
    by_model(job(out, count), Echo(slow=0.01), batch=batch)
