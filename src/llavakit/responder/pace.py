"""How many questions at once, and when: additive increase, multiplicative decrease. Pure: the clock and the dice are the caller's.

limit  256 |------.                 429: nothing starts until the time the server told, the limit halves (once for all
       128 |      |_______....----  calls that were under way together); then one more after every window of good replies
           +----------------------  time
"""

from __future__ import annotations

import random

LONGEST_WAIT = 60.0  # seconds between tries where the server does not tell


def backoff(first: float, number: int, dice: random.Random) -> float:
    """Seconds before try ``number`` (1 is the first again): twice as long each time, half of it by chance, so that not all come at once."""
    return min(LONGEST_WAIT, first * 2.0 ** min(number - 1, 30)) * (0.5 + 0.5 * dice.random())


class Pace:
    """When the next call may start. A call's ticket is the time at which it started."""

    def __init__(self, most: int, *, first_wait: float = 1.0, dice: random.Random | None = None) -> None:
        self.most = self.limit = most
        self.under_way = 0
        self.resumes = 0.0
        self._first_wait, self._dice = first_wait, dice or random.Random()
        self._cut_at = float("-inf")  # when the limit was last halved
        self._throttled = 0  # in a row
        self._good = self._bad = 0  # of this window

    def may_start(self, now: float) -> bool:
        return self.under_way < self.limit and now >= self.resumes

    def start(self, now: float) -> float:
        assert self.may_start(now)
        self.under_way += 1
        return now

    def good(self, ticket: float) -> None:
        """A reply. A window of them, all begun since the last cut, allows one call more."""
        self.under_way -= 1
        if ticket >= self._cut_at:
            self._throttled = 0
            self._good += 1
            self._window()

    def bad(self, ticket: float, now: float) -> None:
        """A fault on the way or in the server. One now and then says nothing; when most of a window fails, the limit halves too."""
        self.under_way -= 1
        if ticket >= self._cut_at:
            self._bad += 1
            self._window(now)

    def neutral(self) -> None:
        """A call that says nothing about the server's strength: refused, or given up by us."""
        self.under_way -= 1

    def throttled(self, ticket: float, now: float, told: float | None) -> None:
        """429: halve, and wait as told (a little longer, by chance) or by our own measure."""
        self.under_way -= 1
        if ticket >= self._cut_at:
            self._throttled += 1
            self._cut(now)
            if told is None:
                self.resumes = max(self.resumes, now + backoff(self._first_wait, self._throttled, self._dice))
        if told is not None:
            self.resumes = max(self.resumes, now + told * (1 + 0.1 * self._dice.random()))

    def _window(self, now: float = 0.0) -> None:
        if self._good + self._bad < self.limit:
            return
        if self._bad > self._good:
            self._cut(now)
        elif self.limit < self.most:
            self.limit += 1
        self._good = self._bad = 0

    def _cut(self, now: float) -> None:
        self.limit = max(1, self.limit // 2)
        self._cut_at = now
        self._good = self._bad = 0
