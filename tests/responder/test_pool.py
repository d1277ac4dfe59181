"""Laws of asking many at once, on a simulated clock: pace, waits, retries, deadlines, budget, judge (hardening G1-G3, G7, G8)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import MemoryLedger, SimulatedLoop, Told, completion, question, questions, simulate

from llavakit.errors import ConfigError, ImageError, RefusedError, ResponderError, ThrottledError, UnavailableError
from llavakit.responder import Budget, Completion, Limits, Price, Query, Settled, ask_all_async, settled, whole
from llavakit.responder.pace import Pace, backoff


def throttled(after: float | None = None) -> ThrottledError:
    error = ThrottledError("slow down", code="throttled")
    error.retry_after = after
    return error


def unavailable() -> UnavailableError:
    return UnavailableError("out of order", code="server_error")


def run(count: int, told: Told, ledger: MemoryLedger | None = None, **options: Any) -> tuple[Any, float]:
    """Ask so many questions on the simulated clock."""
    options.setdefault("dice", random.Random(0))
    return simulate(ask_all_async(questions(count), told, ledger or MemoryLedger(), **options))  # type: ignore[arg-type]


async def quick(query: Query) -> Completion:
    await asyncio.sleep(1)
    return completion(f"about {query.id}")


# the plain case


@given(count=st.integers(0, 60), concurrency=st.integers(1, 20), at_once=st.integers(1, 20))
@settings(deadline=None, max_examples=30)
def test_every_question_is_asked_once_and_no_more_at_a_time_than_allowed(count: int, concurrency: int, at_once: int) -> None:
    told, ledger = Told(quick, at_once=at_once), MemoryLedger()
    outcome, seconds = run(count, told, ledger, limits=Limits(concurrency=concurrency))
    most = min(concurrency, at_once)
    assert sorted(name for _, name in told.asked) == sorted(f"q{number}" for number in range(count))
    assert told.most_under_way == min(most, count)
    assert outcome.progress.accepted == outcome.progress.done == len(ledger.kept) == count
    assert seconds <= -(-count // most) + 0.3  # bound by latency
    assert outcome.exit_code == 0


def test_queries_are_taken_as_they_are_needed() -> None:
    taken = settled_ = 0
    furthest = 0

    def source() -> Iterator[Query]:
        nonlocal taken
        for number in range(500):
            taken += 1
            yield question(number)

    def count(_: Settled) -> None:
        nonlocal settled_, furthest
        settled_ += 1
        furthest = max(furthest, taken - settled_)

    simulate(ask_all_async(source(), Told(quick), MemoryLedger(), limits=Limits(concurrency=8), on_settled=count))  # type: ignore[arg-type]
    assert settled_ == taken == 500
    assert furthest <= 2 * 8


def test_what_the_ledger_knows_costs_nothing() -> None:
    ledger = MemoryLedger()
    run(30, Told(quick), ledger)
    again = Told(quick)
    outcome, _ = run(40, again, ledger)
    assert len(again.asked) == 10
    assert (outcome.progress.known, outcome.progress.accepted) == (30, 40)
    assert set(ledger.paid.values()) == {1}


def test_known_replies_do_not_keep_a_stop_waiting() -> None:
    """Though nothing is waited for, others get their turn between two queries."""
    ledger = MemoryLedger()
    run(300, Told(quick), ledger)

    async def work() -> int:
        turns, done = 0, asyncio.ensure_future(ask_all_async(questions(300), Told(quick), ledger, limits=Limits(concurrency=1)))  # type: ignore[arg-type]
        while not done.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert asyncio.run(work()) >= 100


def test_the_same_question_twice_is_paid_for_once() -> None:
    same = [Query(id=f"n{number}", conversation=question(number % 3).conversation, sampling=question(0).sampling) for number in range(30)]
    told, ledger = Told(quick), MemoryLedger()
    outcome, _ = simulate(ask_all_async(same, told, ledger))  # type: ignore[arg-type]
    assert len(told.asked) == 3
    assert outcome.progress.accepted == 30
    assert outcome.progress.known == 27


def test_progress_is_told_and_only_grows() -> None:
    seen: list[Any] = []
    run(100, Told(quick), limits=Limits(concurrency=10), on_progress=seen.append, total=100)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert done[-1] == 100
    assert seen[-1].spent.prompt_tokens == 1000
    assert 8 < seen[len(seen) // 2].rate < 12
    assert seen[len(seen) // 2].eta == pytest.approx((100 - done[len(seen) // 2]) / 10, rel=0.3)


# 429 (G1)


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


# other faults (G2, G3)


@given(failing=st.sets(st.integers(0, 39), max_size=40), retries=st.integers(0, 4))
@settings(deadline=None, max_examples=20)
def test_retries_are_bounded_and_the_run_goes_on(failing: set[int], retries: int) -> None:
    names = {f"q{number}" for number in failing}

    async def answer(query: Query) -> Completion:
        await asyncio.sleep(0.1)
        if query.id in names:
            raise unavailable()
        return completion()

    told, ledger = Told(answer), MemoryLedger()
    outcome, _ = run(40, told, ledger, limits=Limits(retries=retries))
    asked = Counter(name for _, name in told.asked)
    assert all(asked[name] == (1 + retries if name in names else 1) for name in asked)
    assert set(ledger.failed) == names
    assert (outcome.progress.accepted, outcome.progress.failed) == (40 - len(names), len(names))
    assert outcome.progress.lost == len(names) * (1 + retries)


def test_a_question_has_a_deadline() -> None:
    async def answer(query: Query) -> Completion:
        await asyncio.sleep(5)
        raise unavailable()

    told = Told(answer)
    _, seconds = run(1, told, limits=Limits(retries=1000, deadline=100))
    assert 35 < seconds < 110  # a wait that ends after the deadline is not begun


def test_now_and_then_a_fault_does_not_slow_the_others() -> None:
    async def answer(query: Query) -> Completion:
        await asyncio.sleep(1)
        if int(query.id[1:]) % 10 == 0 and Counter(name for _, name in told.asked)[query.id] == 1:
            raise unavailable()
        return completion()

    told = Told(answer)
    seen: list[Any] = []
    outcome, seconds = run(400, told, limits=Limits(concurrency=20), on_progress=seen.append)
    assert outcome.progress.accepted == 400
    assert min(progress.limit for progress in seen) == 20
    assert seconds < 1.25 * 440 / 20


@pytest.mark.parametrize("error", [RefusedError("no", code="refused"), ImageError("no picture", code="image_not_found")])
def test_what_concerns_one_question_is_its_failure(error: Exception) -> None:
    async def answer(query: Query) -> Completion:
        if query.id == "q5":
            raise error
        return completion()

    told, ledger = Told(answer), MemoryLedger()
    outcome, _ = run(20, told, ledger)
    assert ledger.failed == {"q5": error.code}  # type: ignore[attr-defined]
    assert (outcome.progress.accepted, outcome.progress.failed) == (19, 1)
    assert len(told.asked) == 20


def test_nobody_can_be_answered_stops_at_once_and_records_what_was_under_way() -> None:
    async def answer(query: Query) -> Completion:
        await asyncio.sleep(1)
        if query.id == "q20":
            raise ResponderError("the server answers 401", code="bad_key", remedy="put the right key")
        await asyncio.sleep(1)
        return completion()

    told, ledger = Told(answer), MemoryLedger()
    with pytest.raises(ResponderError, match="401") as caught:
        run(10_000, told, ledger, limits=Limits(concurrency=32))
    assert caught.value.code == "bad_key"
    assert len(told.asked) == 32
    assert len(ledger.kept) == 31


@pytest.mark.parametrize("error", [unavailable(), RefusedError("no", code="refused")])
def test_when_nobody_answers_it_is_not_about_questions(error: ResponderError) -> None:
    async def answer(query: Query) -> Completion:
        raise error

    told = Told(answer)
    with pytest.raises(ResponderError, match="in a row") as caught:
        run(100_000, told, limits=Limits(in_a_row=50, retries=1, concurrency=8))
    assert caught.value.code == "nobody_answers"
    assert len(told.asked) < 2 * (50 + 2 * 8)


@pytest.mark.parametrize("place", ["judge", "queries", "on_settled", "completer"])
def test_our_own_mistakes_come_out_and_what_was_under_way_is_kept(place: str) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError(place)

    async def answer(query: Query) -> Completion:
        await asyncio.sleep(0.001 if query.id == "q3" else 1)
        return broken() if place == "completer" and query.id == "q3" else completion()

    source = itertools.chain(questions(5), (broken() for _ in range(1))) if place == "queries" else questions(5)
    ledger = MemoryLedger()
    options = {place: broken} if place in ("judge", "on_settled") else {}
    with pytest.raises(ZeroDivisionError, match=place):
        simulate(ask_all_async(source, Told(answer), ledger, **options))  # type: ignore[arg-type]
    assert len(ledger.kept) >= 4


def test_the_grace_is_kept() -> None:
    async def answer(query: Query) -> Completion:
        await asyncio.sleep(1 if query.id == "q0" else 1000 if query.id == "q1" else 20)
        if query.id == "q0":
            raise ResponderError("no credit", code="no_credit")
        return completion()

    ledger = MemoryLedger()
    loop = SimulatedLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner, pytest.raises(ResponderError):
        runner.run(ask_all_async(questions(6), Told(answer), ledger, limits=Limits(grace=30)))  # type: ignore[arg-type]
    assert len(ledger.kept) == 4  # all but the one that takes too long
    assert loop.now < 35


# the judge


def test_a_rejected_reply_is_asked_again_with_another_seed() -> None:
    async def answer(query: Query) -> Completion:
        return completion(f"{query.id} {query.sampling.seed}")

    def judge(query: Query, reply: Completion) -> str | None:
        return None if int(reply.text.split()[1]) % 2 else "even"  # seed 0 is even: the first attempt never passes

    told, ledger, results = Told(answer), MemoryLedger(), []
    outcome, _ = run(200, told, ledger, judge=judge, on_settled=results.append, limits=Limits(again=3))
    for result in results:
        seeds = [result.query.attempt(number).sampling.seed for number in range(4)]
        assert len(set(seeds)) == 4
        passing = next((seed for seed in seeds if seed is not None and seed % 2), None)
        assert (result.accepted is None) == (passing is None)
        assert result.accepted is None or result.accepted.text == f"{result.query.id} {passing}"
        assert {reject.reason for reject in result.rejects} == {"even"}
        assert all(ledger.kept[reject.key].text for reject in result.rejects)  # every attempt is kept
        assert settled(result.query, "told", ledger, judge=judge, again=3) == result  # type: ignore[arg-type]
    assert outcome.progress.accepted + outcome.progress.rejected == 200
    assert len(ledger.kept) == len(told.asked)


@given(seed=st.none() | st.integers(0, 2**64 - 1), number=st.integers(0, 9), other=st.integers(0, 9))
def test_attempts_have_their_own_keys(seed: int | None, number: int, other: int) -> None:
    first, second = question(1, seed=seed).attempt(number), question(1, seed=seed).attempt(other)
    assert (first.key("m") == second.key("m")) == (number == other)
    assert first.key("m") != first.key("n")
    assert first.id == second.id


def test_without_a_judge_half_replies_are_rejected() -> None:
    assert whole(question(0), completion()) is None
    assert whole(question(0), completion("  ")) == "empty"
    for finish in ("length", "filter", "cut"):
        assert whole(question(0), Completion(text="x", finish=finish, model="m")) == finish  # type: ignore[arg-type]


# budget (G8)


@given(tokens=st.integers(0, 3000), latencies=st.lists(st.floats(0.1, 3), min_size=1, max_size=7), concurrency=st.integers(1, 30))
@settings(deadline=None, max_examples=30)
def test_a_budget_in_tokens_is_never_exceeded(tokens: int, latencies: list[float], concurrency: int) -> None:
    async def answer(query: Query) -> Completion:
        await asyncio.sleep(latencies[int(query.id[1:]) % len(latencies)])
        return completion(prompt=12, reply=int(query.id[1:]) % 21)  # no more than its allowance of 20

    told, ledger = Told(answer), MemoryLedger()
    outcome, _ = run(100, told, ledger, limits=Limits(concurrency=concurrency, budget=Budget(tokens=tokens)))
    spent = sum(reply.usage.prompt_tokens + reply.usage.reply_tokens for reply in ledger.kept.values() if reply.usage)
    assert outcome.progress.spent.tokens == spent <= tokens
    assert outcome.progress.spent.replies == len(ledger.kept)
    if outcome.progress.done < 100:
        assert outcome.spent_up
        assert outcome.exit_code == 3
        assert spent > tokens - 12 - 8 - 20  # nothing more would have fitted for certain


def test_a_budget_in_money_is_never_exceeded_and_the_spend_is_exact() -> None:
    price = Price(prompt=2.0, reply=8.0)
    told, ledger = Told(quick), MemoryLedger()
    outcome, _ = run(1000, told, ledger, limits=Limits(concurrency=100, budget=Budget(money=0.01, price=price)))
    each = (10 * 2.0 + 5 * 8.0) / 1e6
    assert outcome.progress.money == pytest.approx(each * len(ledger.kept))
    assert 0.0095 < outcome.progress.money <= 0.01
    with pytest.raises(ConfigError):
        Budget(money=1.0)


def test_prompts_that_are_longer_than_guessed_are_learned() -> None:
    """The server counts thirty times what we guess: after the first replies the guess is corrected."""

    async def answer(query: Query) -> Completion:
        await asyncio.sleep(1)
        return completion(prompt=400, reply=20)

    outcome, _ = run(1000, Told(answer), limits=Limits(concurrency=4, budget=Budget(tokens=42_000)))
    assert 42_000 - 5 * 420 < outcome.progress.spent.tokens <= 42_000
