"""What a run will ask, and about what it will take, before anything is paid.

Tokens are guessed from characters: CHARACTERS of them a token, as English has it. A reply is taken to be as long as the examples of its
kind. Both guesses are said beside the figures; the budget, not they, holds a run to its limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from llavakit.datagen.generate import Job
from llavakit.datagen.kinds import KINDS, Prompts
from llavakit.datagen.parse import Kind
from llavakit.datagen.plan import Task
from llavakit.responder.budget import Price

CHARACTERS = 4.0
A_PICTURE = 1000  # tokens, about what servers count for one
TOKENS_A_SECOND = 40  # of one reply as it is written
BARE_REPLY = 800  # characters, where no example tells


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Questions by kind, those that the ledger can answer, and the guessed rest. ``first`` is the first one, as a person reads it."""

    questions: dict[str, int]
    known: int
    prompt_tokens: int
    reply_tokens: int
    seconds: float
    money: float | None
    first: str

    def lines(self, *, paid: bool = True) -> list[str]:
        """For a person. What is asked of a model on this machine is not ``paid`` for."""
        total = sum(self.questions.values())
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.questions.items())
        lines = [f"questions: {total:,} ({kinds})" + (f", {self.known:,} of them answered already" if self.known else "")]
        lines.append(
            f"tokens:    about {self.prompt_tokens:,} to read and {self.reply_tokens:,} to write"
            f" ({CHARACTERS:g} characters a token, replies as long as the examples)"
        )
        told = f"about {self.money:,.2f} at the given prices" if self.money is not None else "unknown (give --price-in and --price-out)"
        lines += [f"cost:      {told}"] if paid else []
        lines.append(f"time:      about {_time(self.seconds)} ({TOKENS_A_SECOND} tokens a second in every reply)")
        return lines


def preview(job: Job, *, price: Price | None, concurrency: int, known: Callable[[Task], bool] | None = None) -> Preview:
    """Count without asking. ``known`` tells what the ledger holds already."""
    questions: Counter[str] = Counter()
    answered, read, written, first = 0, 0.0, 0.0, ""
    kinds: tuple[Kind, ...] = (*KINDS, "answer")
    before = {kind: _before(job.prompts, kind) for kind in kinds}
    reply = {kind: _reply(job.prompts, kind) for kind in kinds}
    for task in job.tasks:
        questions[task.kind] += 1
        first = first or _shown(job, task)
        if known is not None and known(task):
            answered += 1
            continue
        text = task.instruction if task.kind == "answer" else task.context.text(boxes=task.kind != "conversation")
        read += (before[task.kind] + len(text)) / CHARACTERS + (A_PICTURE if job.images is not None else 0)
        written += reply[task.kind] / CHARACTERS
        if job.review:
            read += (len(job.prompts.of("filter").system) + reply[task.kind]) / CHARACTERS + A_PICTURE
            written += 8
    money = price.of(int(read), int(written)) if price is not None else None
    seconds = written / TOKENS_A_SECOND / concurrency
    tokens = {"prompt_tokens": round(read), "reply_tokens": round(written)}
    return Preview(questions=dict(questions), known=answered, **tokens, seconds=seconds, money=money, first=first)


def _before(prompts: Prompts, kind: Kind) -> int:
    return sum(len(message.text) for message in prompts.of(kind).before)


def _reply(prompts: Prompts, kind: Kind) -> float:
    replies = [len(reply) for _, reply in prompts.of(kind).examples]
    return sum(replies) / len(replies) if replies else BARE_REPLY


def _shown(job: Job, task: Task) -> str:
    """A question as it goes out: roles, then text."""
    messages = task.query(job.prompts, job.sampling).conversation.messages
    return "\n".join(f"[{message.role}]\n{message.text}" for message in messages)


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
