"""Many questions at once: at the pace the server allows, within a budget, every reply in the ledger before anybody acts on it.

    queries --> worker: reply in the ledger? --no--> gate --> completer --> ledger (fsync) --> judge --> on_settled
    (lazily)       ^                 '---------------------yes--------------------------------^   |
                   '------ rejected: the same question with another seed ---------------------------'

What a run leaves behind is the ledger. Which replies are accepted follows from it, the queries and the judge alone, so a run that was
killed goes on where it was and ends as if it had not been; ``settled`` says so for one query without asking anybody.
"""

from __future__ import annotations

import asyncio
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from llavakit.errors import LlavaError, MissingExtraError, RefusedError, ResponderError, ThrottledError, UnavailableError
from llavakit.responder.budget import Budget, Estimate, Purse, estimate
from llavakit.responder.gate import Gate, StoppedError
from llavakit.responder.ledger import Ledger
from llavakit.responder.pace import Pace, backoff
from llavakit.responder.progress import Meter, Progress
from llavakit.responder.protocol import Completer, Completion, Query

Judge = Callable[[Query, Completion], str | None]


def whole(query: Query, completion: Completion) -> str | None:
    """The judge where none is given: rejects replies that were cut, withheld or are empty."""
    if completion.finish != "stop":
        return completion.finish
    return None if completion.text.strip() else "empty"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How hard to try. ``concurrency`` is a ceiling: the server's 429 decide below it.

    ``retries`` are for faults on the way, of one question; ``deadline`` is in seconds from its first call on; ``again`` is how often a
    rejected reply is asked for anew; ``grace`` is how long calls under way may take when the run is asked to stop; so many questions
    given up one after another (``in_a_row``) end the run, because then it is not about questions.
    """

    concurrency: int = 32
    retries: int = 5
    deadline: float = 600.0
    first_wait: float = 1.0
    again: int = 2
    grace: float = 30.0
    in_a_row: int = 100
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True, kw_only=True)
class Reject:
    """A reply that the judge did not take. ``key`` finds its words in the ledger."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of a query: an accepted reply (the answer to ``asked``, which names its seed), or only rejects, or a failure."""

    query: Query
    asked: Query
    accepted: Completion | None
    rejects: tuple[Reject, ...] = ()
    failure: LlavaError | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: complete, or stopped by a signal or at the end of its budget. The progress holds the exact spend."""

    progress: Progress
    signal: int | None = None
    spent_up: bool = False

    @property
    def exit_code(self) -> int:
        """0 when every query is settled, 128 + signal, 3 when the budget is spent; the same command goes on from there."""
        return 128 + self.signal if self.signal else 3 if self.spent_up else 0


def settled(query: Query, name: str, ledger: Ledger, *, judge: Judge = whole, again: int = Limits.again) -> Settled | None:
    """What the ledger knows of a query, without asking anybody; None where a run would still have to ask."""
    rejects: list[Reject] = []
    for number in range(again + 1):
        asked = query.attempt(number)
        key = asked.key(name)
        completion = ledger.get(key)
        if completion is None:
            return None
        reason = judge(asked, completion)
        if reason is None:
            return Settled(query=query, asked=asked, accepted=completion, rejects=tuple(rejects))
        rejects.append(Reject(key=key, reason=reason))
    return Settled(query=query, asked=asked, accepted=None, rejects=tuple(rejects))


def ask_all(queries: Iterable[Query], completer: Completer, ledger: Ledger, **options: Any) -> Outcome:
    """``ask_all_async`` for callers without an event loop."""
    return asyncio.run(ask_all_async(queries, completer, ledger, **options))


async def ask_all_async(
    queries: Iterable[Query],
    completer: Completer,
    ledger: Ledger,
    *,
    limits: Limits = Limits(),
    judge: Judge = whole,
    on_settled: Callable[[Settled], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    total: int | None = None,
    dice: random.Random | None = None,
) -> Outcome:
    """Ask all queries, taken from the iterable as they are needed. Each is settled once: accepted, rejected or failed.

    SIGINT and SIGTERM let calls under way end within ``limits.grace``, a second one drops them. ``total`` is for the progress line only.
    Raises ResponderError at once when nobody can be answered (no key, no credit), whatever the judge, the iterable or a callback
    raises, and DataError when the ledger cannot be written; replies under way are recorded first.
    """
    meter = Meter(total, asyncio.get_running_loop().time)
    run = _Run(queries, completer, ledger, limits, judge, on_settled, meter, dice or random.Random())
    try:
        with _signals(run.interrupt):
            return await run.whole(on_progress)
    finally:
        await completer.close()


class _Run:
    def __init__(
        self,
        queries: Iterable[Query],
        completer: Completer,
        ledger: Ledger,
        limits: Limits,
        judge: Judge,
        on_settled: Callable[[Settled], None] | None,
        meter: Meter,
        dice: random.Random,
    ) -> None:
        self.queries, self.completer, self.ledger, self.limits, self.judge = iter(queries), completer, ledger, limits, judge
        self.on_settled, self.meter, self.dice = on_settled, meter, dice
        self.most = min(limits.concurrency, completer.at_once)
        self.gate = Gate(Pace(self.most, first_wait=limits.first_wait, dice=dice), Purse(limits.budget, ledger.spent(completer.name)))
        self.asking: dict[str, asyncio.Event] = {}  # keys under way: the same question twice is paid for once
        self.given_up = 0  # in a row
        self.signal: int | None = None
        self.error: BaseException | None = None
        self.workers: list[asyncio.Task[None]] = []

    async def whole(self, on_progress: Callable[[Progress], None] | None) -> Outcome:
        """Twice as many workers as calls at once: some wait for the disk or for a server to recover meanwhile."""
        self.workers = [asyncio.create_task(self.work()) for _ in range(2 * self.most)]
        try:
            while await self.some_left():
                if on_progress:
                    on_progress(self.progress())
        finally:  # we ourselves may be cancelled
            self.drop()
            await asyncio.gather(*self.workers, return_exceptions=True)
        if on_progress:
            on_progress(self.progress())
        if self.error:
            raise self.error
        return Outcome(progress=self.progress(), signal=self.signal, spent_up=self.gate.spent_up)

    async def some_left(self) -> bool:
        """Wait a moment for the workers; those who take longer than the grace after a stop are dropped."""
        done, left = await asyncio.wait(self.workers, timeout=self.meter.every)
        for task in done:
            if not task.cancelled() and (error := task.exception()):
                self.stop(error)
        self.workers = list(left)
        if left and self.meter.stopped_for() > self.limits.grace:
            self.drop()
        return bool(left)

    def interrupt(self, number: int) -> None:
        """A signal: stop taking questions. The second one drops what is under way."""
        if self.signal is not None:
            self.drop()
        self.signal = number
        self.stop()

    def stop(self, error: BaseException | None = None) -> None:
        self.error = self.error or error
        self.meter.stop()
        self.gate.stop()

    def drop(self) -> None:
        for task in self.workers:
            task.cancel()

    def progress(self) -> Progress:
        gate = self.gate
        cost = self.limits.budget.cost(gate.purse.spent)
        return self.meter.read(spent=gate.purse.spent, money=cost, limit=gate.pace.limit, under_way=gate.pace.under_way)

    async def work(self) -> None:
        """One worker: query after query until there is none or the run stops."""
        with suppress(StoppedError):
            while not self.gate.stopped:
                try:
                    query = next(self.queries, None)
                    if query is None:
                        return
                    await asyncio.sleep(0)  # a million known replies must not keep a signal waiting
                    result = await self.settle(query)
                    self.meter.count(result.accepted is not None, result.failure is not None)
                    if self.on_settled:
                        self.on_settled(result)
                except StoppedError:
                    raise
                except Exception as error:  # the iterable's, the judge's, a callback's, or nobody can be answered
                    self.stop(error)
                    return

    async def settle(self, query: Query) -> Settled:
        """Ask until a reply is accepted. Whatever concerns this query alone becomes its failure."""
        rejects: list[Reject] = []
        asked, key = query, ""
        try:
            for number in range(self.limits.again + 1):
                asked = query.attempt(number)
                key = asked.key(self.completer.name)
                completion = await self.reply(asked, key)
                reason = self.judge(asked, completion)
                if reason is None:
                    return Settled(query=query, asked=asked, accepted=completion, rejects=tuple(rejects))
                self.meter.rejected_replies += 1
                rejects.append(Reject(key=key, reason=reason))
        except LlavaError as error:
            if not _about_one(error):
                raise
            if key:
                await self.ledger.fail(asked, self.completer.name, error, key=key)
            self.count_given_up(error)
            return Settled(query=query, asked=asked, accepted=None, rejects=tuple(rejects), failure=error)
        return Settled(query=query, asked=asked, accepted=None, rejects=tuple(rejects))

    async def reply(self, asked: Query, key: str) -> Completion:
        """From the ledger, or paid for and in the ledger."""
        while key in self.asking:
            await self.asking[key].wait()
        if found := self.ledger.get(key):
            self.meter.known += 1
            self.given_up = 0
            return found
        over = self.asking[key] = asyncio.Event()
        try:
            completion = await self.call(asked)
            await self.ledger.put(asked, self.completer.name, completion, key=key)
        finally:
            del self.asking[key]
            over.set()
        self.given_up = 0
        return completion

    async def call(self, asked: Query) -> Completion:
        """Ask until a reply comes, the retries or the time are used up, or it turns out that asking is of no use."""
        cost, faults, began = estimate(asked), 0, None
        while True:
            ticket = await self.gate.enter(cost)
            began = ticket if began is None else began
            try:
                return await self.once(asked, ticket, cost)
            except ThrottledError as error:
                wait = 0.0  # the gate is closed for as long as it takes
                self.too_long(error)
                last: ResponderError = error
            except UnavailableError as error:
                faults += 1
                if faults > self.limits.retries:
                    raise
                wait = max(backoff(self.limits.first_wait, faults, self.dice), error.retry_after or 0.0)
                last = error
            if asyncio.get_running_loop().time() + wait > began + self.limits.deadline:
                raise last
            if wait:
                await self.gate.sleep(wait)

    async def once(self, asked: Query, ticket: float, cost: Estimate) -> Completion:
        """One call, which has its place and must give it back."""
        gate, loop, paid = self.gate, asyncio.get_running_loop(), False
        try:
            completion = await self.completer.complete(asked)
            gate.purse.pay(cost, completion)
            paid = True
            gate.pace.good(ticket)
        except ThrottledError as error:
            gate.pace.throttled(ticket, loop.time(), error.retry_after)
            raise
        except UnavailableError:
            self.meter.lost += 1
            gate.pace.bad(ticket, loop.time())
            raise
        except BaseException:
            gate.pace.neutral()
            raise
        finally:
            if not paid:
                gate.purse.give_back(cost)
            gate.ring()
        return completion

    def too_long(self, error: ThrottledError) -> None:
        """A pause longer than any question may take is the server's way to say: not today."""
        if error.retry_after and error.retry_after > self.limits.deadline:
            remedy = "run again then: every reply so far is kept"
            what = f"{error.what}; it asks to be left alone for {error.retry_after:.0f} s"
            raise ResponderError(what, code="come_later", where=error.where, remedy=remedy)

    def count_given_up(self, error: LlavaError) -> None:
        self.given_up += 1
        if self.given_up >= self.limits.in_a_row:
            what = f"{self.given_up} questions in a row without a reply; the last one: {error.what}"
            raise ResponderError(
                what, code="nobody_answers", where=error.where, remedy="run again when it is mended: replies so far are kept"
            )


def _about_one(error: LlavaError) -> bool:
    """Whether an error concerns one question, so that the others go on."""
    if isinstance(error, ResponderError):
        return isinstance(error, RefusedError | ThrottledError | UnavailableError)
    return not isinstance(error, MissingExtraError) and error.code not in ("ledger_unwritable", "ledger_in_use")


@contextmanager
def _signals(ask: Callable[[int], None]) -> Iterator[None]:
    """SIGINT and SIGTERM as calls of ``ask``, where the event loop can: in the main thread, not on Windows."""
    loop, before = asyncio.get_running_loop(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            with suppress(NotImplementedError, RuntimeError):
                loop.add_signal_handler(number, ask, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(NotImplementedError, RuntimeError):
                loop.remove_signal_handler(number)
            signal.signal(number, handler)
