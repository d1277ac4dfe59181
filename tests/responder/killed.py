"""What runs in processes that tests kill; imported there without torch or pytest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llavakit.errors import LlavaError
from llavakit.responder import Completion, Ledger, Limits, Query, ServerCompleter, ask_all, whole
from llavakit.types import Conversation, Sampling

LIMITS = Limits(concurrency=16, first_wait=0.02, retries=6, again=3)


def queries(count: int) -> Iterator[Query]:
    for number in range(count):
        yield Query(id=f"q{number}", conversation=Conversation.ask(f"What is {number}?"), sampling=Sampling(seed=number))


def judge(query: Query, completion: Completion) -> str | None:
    """Rejects what the misbehaving server does to a question for good."""
    return "refusal" if completion.text.startswith("I'm sorry") else whole(query, completion)


def teacher(url: str, *, direct: bool = True) -> ServerCompleter:
    return ServerCompleter("teacher", base_url=url, timeout=2.0, direct=direct)


def work(url: str, path: Path, count: int, limits: Limits = LIMITS, left: Path | None = None, *, direct: bool = True) -> None:
    """A run, whole or until it is killed. How it ended is left in a file."""
    try:
        with Ledger(path) as ledger:
            outcome = ask_all(queries(count), teacher(url, direct=direct), ledger, limits=limits, judge=judge)
            said = f"{outcome.exit_code} {outcome.progress.spent.replies} {outcome.progress.spent.tokens}"
    except LlavaError as error:
        said = error.code
    with contextlib.suppress(AttributeError):
        left.write_text(said)  # type: ignore[union-attr]
