"""The one place where a call may start: pace, budget and the wish to stop, for many who wait."""

from __future__ import annotations

import asyncio
from collections import deque

from llavakit.responder.budget import Estimate, Purse
from llavakit.responder.pace import Pace

_TICK = 1e-3  # event loops are early by a trifle


class StoppedError(Exception):
    """Inside the pool only: the run ends, this question stays unanswered."""


class Gate:
    """Who comes first goes first. ``stop`` sends away all who wait; calls under way are not concerned."""

    def __init__(self, pace: Pace, purse: Purse) -> None:
        self.pace, self.purse = pace, purse
        self.spent_up = False
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()
        if self._timer:
            self._timer.cancel()
        while self._waiting:
            _ring(self._waiting.popleft())

    async def enter(self, call: Estimate) -> float:
        """Wait for a place; the ticket. What the call may cost is set aside. Raises StoppedError."""
        first = True
        while not self._open(call):
            bell = self._loop.create_future()
            self._waiting.append(bell) if first else self._waiting.appendleft(bell)
            first = False
            self._wind_up()
            await bell
        self.purse.set_aside(call)
        ticket = self.pace.start(self._loop.time())
        self.ring()
        return ticket

    async def sleep(self, seconds: float) -> None:
        """A wait that the end of the run cuts short. Raises StoppedError."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            return
        raise StoppedError

    def ring(self) -> None:
        """Something changed: let in the next one, who looks for himself whether he may."""
        if self._waiting and self.pace.may_start(self._loop.time()):
            _ring(self._waiting.popleft())
        elif self._waiting:
            self._wind_up()

    def _wind_up(self) -> None:
        """During a pause nothing changes by itself: a clock rings at its end."""
        if self._timer is None and self._loop.time() < self.pace.resumes:
            self._timer = self._loop.call_at(self.pace.resumes + _TICK, self._strike)

    def _strike(self) -> None:
        self._timer = None
        self.ring()

    def _open(self, call: Estimate) -> bool:
        if self.stopped:
            raise StoppedError
        if not self.purse.fits(call):
            if not self.purse.anything_aside:  # nothing under way that could turn out cheaper
                self.spent_up = True
                self.stop()
                raise StoppedError
            return False
        return self.pace.may_start(self._loop.time())


def _ring(bell: asyncio.Future[None]) -> None:
    if not bell.done():
        bell.set_result(None)
