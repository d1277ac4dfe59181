"""What a progress line needs to know, as one frozen value; drawing it is the command line's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llavakit.responder.ledger import Spent

_SAMPLES = 150  # of ``Meter.every`` seconds each: the rate is that of the last half minute


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Queries settled so far, and what it took.

    ``known`` replies came from the ledger for nothing; ``rejected_replies`` counts replies, ``rejected`` queries without an accepted one.
    Of ``lost`` calls only the server knows whether it charged them. ``limit`` is how many calls the pace allows at once now.
    """

    total: int | None
    accepted: int
    rejected: int
    failed: int
    known: int
    rejected_replies: int
    lost: int
    spent: Spent
    money: float | None
    limit: int
    under_way: int
    seconds: float
    rate: float

    @property
    def done(self) -> int:
        return self.accepted + self.rejected + self.failed

    @property
    def eta(self) -> float | None:
        """Seconds to go, where the total is known and something moves."""
        return (self.total - self.done) / self.rate if self.total is not None and self.rate else None


class Meter:
    """Counts, and how fast they grow."""

    every = 0.2  # seconds between two readings

    def __init__(self, total: int | None, clock: Callable[[], float]) -> None:
        self.total, self._clock = total, clock
        self.accepted = self.rejected = self.failed = self.known = self.rejected_replies = self.lost = 0
        self._began = self._clock()
        self._stopped: float | None = None
        self._samples = deque([(self._began, 0)], maxlen=_SAMPLES)

    def count(self, accepted: bool, failed: bool) -> None:
        self.accepted += accepted
        self.failed += failed
        self.rejected += not accepted and not failed

    def stop(self) -> None:
        self._stopped = self._clock() if self._stopped is None else self._stopped

    def stopped_for(self) -> float:
        return 0.0 if self._stopped is None else self._clock() - self._stopped

    def read(self, *, spent: Spent, money: float | None, limit: int, under_way: int) -> Progress:
        now, done = self._clock(), self.accepted + self.rejected + self.failed
        self._samples.append((now, done))
        then, before = self._samples[0]
        return Progress(
            total=self.total, accepted=self.accepted, rejected=self.rejected, failed=self.failed, known=self.known,
            rejected_replies=self.rejected_replies, lost=self.lost, spent=spent, money=money, limit=limit, under_way=under_way,
            seconds=now - self._began, rate=(done - before) / (now - then) if now > then else 0.0,
        )  # fmt: skip
