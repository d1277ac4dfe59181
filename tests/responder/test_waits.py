"""Laws of the pace: pauses are kept as told, one overload halves once, one more after every window, a server's room is found (G1)."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import MemoryLedger, Told, completion, run, throttled

from llavakit.errors import ResponderError
from llavakit.responder import Completion, Limits, Query
from llavakit.responder.pace import Pace, backoff


def test_a_pause_is_kept_as_told() -> None:
    """After a 429 with Retry-After nobody is asked before that time, and soon after it the asking goes on."""

    async def answer(query: Query, at: list[float] = []) -> Completion:  # noqa: B006  # one run
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(0.1)
        if not at:
            at.append(now)
            raise throttled(20.0)
        return completion()

    told = Told(answer)
    run(40, told, limits=Limits(concurrency=4))
    later = sorted(when for when, _ in told.asked if when > 0)
    assert later[0] >= 20.0  # the four of the first moment were under way
    assert later[0] <= 0.1 + 20 * 1.1 + 0.01


@given(seed=st.integers(0, 2**32), number=st.integers(1, 200), first=st.floats(0.01, 10))
def test_waits_grow_and_are_spread(seed: int, number: int, first: float) -> None:
    wait = backoff(first, number, random.Random(seed))
    whole_wait = min(60.0, first * 2.0 ** min(number - 1, 30))
    assert whole_wait / 2 <= wait <= whole_wait


@given(st.lists(st.sampled_from(["start", "good", "bad", "throttled", "told"]), max_size=300), st.integers(1, 64))
def test_pace_whatever_happens(happenings: list[str], most: int) -> None:
    """Never more under way than the limit when a call starts, the limit within 1..most, and nothing before the pause is over."""
    pace, now, tickets = Pace(most, dice=random.Random(1)), 0.0, []
    for happening in happenings:
        now += 0.5
        before = pace.limit
        if happening == "start":
            if pace.may_start(now):
                assert pace.under_way < pace.limit
                assert now >= pace.resumes
                tickets.append(pace.start(now))
        elif tickets:
            ticket = tickets.pop(0)
            if happening == "good":
                pace.good(ticket)
                assert before <= pace.limit <= before + 1
            elif happening == "bad":
                pace.bad(ticket, now)
                assert pace.limit >= before // 2
            else:
                pace.throttled(ticket, now, 3.0 if happening == "told" else None)
                assert pace.limit in (before, max(1, before // 2))
                assert happening != "told" or pace.resumes >= now + 3
        assert 1 <= pace.limit <= most
        assert pace.under_way == len(tickets)


def test_one_overload_halves_once() -> None:
    pace = Pace(64, dice=random.Random(0))
    tickets = [pace.start(1.0) for _ in range(64)]
    for ticket in tickets[:40]:
        pace.throttled(ticket, 2.0, None)
    assert pace.limit == 32
    for ticket in tickets[40:]:
        pace.good(ticket)
    assert pace.limit == 32  # replies to calls from before the halving say nothing about it


def test_one_more_after_every_window() -> None:
    pace, now = Pace(64, dice=random.Random(0)), 10.0
    pace.throttled(pace.start(now), now, 0.0)
    for limit in range(32, 64):
        assert pace.limit == limit
        now += 1
        for ticket in [pace.start(now) for _ in range(limit)]:
            pace.good(ticket)
    assert pace.limit == 64


@pytest.mark.parametrize("told_after", [None, 2.0])
def test_the_pace_finds_the_servers_own(told_after: float | None) -> None:
    """A server with room for 10 and a ceiling of 64: all are answered, and after the start at least half of the room is used."""
    room = 10

    async def answer(query: Query) -> Completion:
        if told.under_way > room:
            raise throttled(told_after)
        await asyncio.sleep(1)
        return completion()

    told = Told(answer)
    outcome, seconds = run(600, told, limits=Limits(concurrency=64, first_wait=0.5))
    assert outcome.progress.accepted == 600
    assert seconds < 2.2 * 600 / room
    assert len(told.asked) < 1.5 * 600  # few were turned away


def test_a_server_that_only_throttles_is_given_up_in_the_end() -> None:
    async def answer(query: Query) -> Completion:
        raise throttled()

    ledger = MemoryLedger()
    outcome, seconds = run(3, Told(answer), ledger, limits=Limits(deadline=300))
    assert outcome.progress.failed == 3
    assert set(ledger.failed.values()) == {"throttled"}
    assert seconds < 600


def test_come_back_tomorrow_ends_the_run() -> None:
    async def answer(query: Query) -> Completion:
        raise throttled(86400.0)

    with pytest.raises(ResponderError, match="86400") as caught:
        run(3, Told(answer))
    assert caught.value.code == "come_later"
