"""Questions, a completer that does as told, a ledger in memory, and an event loop whose hours pass in no time."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from llavakit.errors import LlavaError
from llavakit.responder import Completion, Query, Spent, Usage
from llavakit.types import Conversation, Sampling


def question(number: int, *, seed: int | None = 0, tokens: int = 20) -> Query:
    sampling = Sampling(seed=seed, max_new_tokens=tokens, temperature=0.7)
    return Query(id=f"q{number}", conversation=Conversation.ask(f"What is {number}?"), sampling=sampling)


def questions(count: int) -> Iterator[Query]:
    return (question(number) for number in range(count))


def completion(text: str = "an answer", *, prompt: int = 10, reply: int = 5) -> Completion:
    return Completion(text=text, finish="stop", model="told-1", usage=Usage(prompt_tokens=prompt, reply_tokens=reply))


class Told:
    """A completer that does what a coroutine says, and counts."""

    def __init__(self, answer: Callable[[Query], Awaitable[Completion]], *, at_once: int = 1000) -> None:
        self.name, self.at_once, self._answer = "told", at_once, answer
        self.asked: list[tuple[float, str]] = []  # when, which
        self.under_way = self.most_under_way = 0

    async def complete(self, query: Query) -> Completion:
        self.asked.append((asyncio.get_running_loop().time(), query.id))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._answer(query)
        finally:
            self.under_way -= 1

    async def close(self) -> None:
        pass


class MemoryLedger:
    """What the pool needs of a ledger, without a disk or a thread."""

    def __init__(self) -> None:
        self.kept: dict[str, Completion] = {}
        self.failed: dict[str, str] = {}
        self.paid: Counter[str] = Counter()

    def get(self, key: str) -> Completion | None:
        return self.kept.get(key)

    async def put(self, query: Query, asked: str, completion: Completion, *, key: str) -> None:
        self.paid[key] += 1
        self.kept[key] = completion

    async def fail(self, query: Query, asked: str, error: LlavaError, *, key: str) -> None:
        self.failed[query.id] = error.code

    def spent(self, asked: str) -> Spent:
        return Spent()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing else is left to do, and then at once."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Leap(self))

    def time(self) -> float:
        return self.now


class _Leap(selectors.SelectSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._simulated = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for somebody"
        self._simulated.now += max(0.0, timeout)
        assert self._simulated.now < 1e6, "nobody comes to an end"
        return super().select(0)


def simulate(work: Awaitable[Any]) -> tuple[Any, float]:
    """What a coroutine returns, and how many seconds it would have taken."""
    loop = SimulatedLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(_awaited(work)), loop.now


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work
