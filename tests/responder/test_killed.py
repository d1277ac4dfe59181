"""Runs against a server that misbehaves, killed and restarted: no reply is lost, none is paid for twice (hardening G4, G5, G8).

The ten kills are with the official client, all else over our own wire.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from killed import LIMITS, judge, queries, teacher, work

from llavakit.errors import ResponderError
from llavakit.responder import Budget, Ledger, Limits, Price, ask_all, settled
from misbehaving import Manners, apart, serving, told

COUNT = 400
FAULTS = {
    "throttle": 0.03, "throttle_silent": 0.01, "error": 0.04, "overloaded": 0.02, "slow": 0.005, "close": 0.02, "cut": 0.03,
    "malformed": 0.02, "unfinished": 0.03, "length": 0.03, "filter": 0.03, "refusal": 0.04, "empty": 0.02, "bad": 0.02,
}  # fmt: skip
MILD = {name: share for name, share in FAULTS.items() if name not in ("slow", "cut", "malformed")}  # those are charged, and then lost
Row = tuple[str, str | None, tuple[str, ...]]


@pytest.fixture(scope="module")
def context() -> Any:
    """Processes that are forked from one that has imported what they need."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["killed", "openai", "openai.resources.chat"])
    return made


def begin(context: Any, *given: Any, direct: bool = True) -> BaseProcess:
    process: BaseProcess = context.Process(target=work, args=given, kwargs={"direct": direct})
    process.start()
    return process


def rows(path: Path) -> list[Row]:
    """What a run amounts to: query by query the accepted text, and why others were rejected."""
    with Ledger(path) as ledger:
        found = [settled(query, "teacher", ledger, judge=judge, again=LIMITS.again) for query in queries(COUNT)]
        return [(one.query.id, one.accepted and one.accepted.text, tuple(r.reason for r in one.rejects)) for one in found if one]


def replies(path: Path) -> dict[str, str]:
    with Ledger(path) as ledger:
        listed = list(ledger.replies())
    found = {key: completion.text for key, _, completion in listed}
    assert len(found) == len(listed)  # every key once
    return found


def run_with_kills(context: Any, url: str, path: Path, kills: int, dice: random.Random, *, direct: bool) -> int:
    """Start and kill -9 so many times, at moments spread over the work, then let it end. How many processes found work to do."""
    done = 0
    for number in range(kills):
        process = begin(context, url, path, COUNT, direct=direct)
        goal = COUNT * (number + dice.random()) / kills  # calls that the server has seen when the blow falls
        end = time.monotonic() + 20
        while told(url)["calls"] < goal and time.monotonic() < end and process.is_alive():
            time.sleep(0.003)
        time.sleep(dice.random() * 0.02)
        process.kill()
        process.join()
        done += process.exitcode == -signal.SIGKILL
    process = begin(context, url, path, COUNT, direct=direct)
    process.join(60)
    assert process.exitcode == 0
    return done


def test_killed_ten_times_it_ends_as_if_it_had_not_been(context: Any, tmp_path: Path) -> None:
    words = ["--faults", *(f"{name}={share}" for name, share in FAULTS.items()), "--latency", "0.01", "--slow", "6"]
    with apart(*words) as quiet, apart(*words) as url:
        undisturbed = begin(context, quiet, tmp_path / "undisturbed.sqlite", COUNT)
        blows = run_with_kills(context, url, tmp_path / "killed.sqlite", 10, random.Random(5), direct=False)
        undisturbed.join(60)
        counts = told(url)
    assert blows >= 8
    assert replies(tmp_path / "killed.sqlite") == replies(tmp_path / "undisturbed.sqlite")
    assert rows(tmp_path / "killed.sqlite") == rows(tmp_path / "undisturbed.sqlite")
    accepted = [row for row in rows(tmp_path / "killed.sqlite") if row[1]]
    assert len(accepted) > 0.9 * COUNT
    assert set(counts["charged"]) == set(replies(tmp_path / "killed.sqlite"))
    assert set(counts["charged"].values()) == {1}  # one charge for each reply, the cut ones included


def test_where_the_server_forgets_only_what_was_under_way_is_paid_twice(context: Any, tmp_path: Path) -> None:
    words = ["--faults", *(f"{name}={share}" for name, share in MILD.items()), "--latency", "0.01", "--forgetful"]
    with apart(*words) as url:
        blows = run_with_kills(context, url, tmp_path / "killed.sqlite", 3, random.Random(6), direct=True)
        charged = told(url)["charged"]
    kept = replies(tmp_path / "killed.sqlite")
    assert set(charged) == set(kept)
    assert sum(charged.values()) - len(kept) <= blows * 2 * LIMITS.concurrency  # in flight, or on the way to the disk


def test_a_second_run_over_a_finished_one_asks_nobody(tmp_path: Path) -> None:
    with serving() as server, Ledger(tmp_path / "l.sqlite") as ledger:
        for _ in range(2):
            outcome = ask_all(queries(50), teacher(server.url), ledger)
        assert server.counts.calls == 50
    assert outcome.progress.known == 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_under_way_end(context: Any, tmp_path: Path, number: int) -> None:
    """Every call that the server charged is in the ledger, and the process says how to be read."""
    with apart("--latency", "0.2") as url:
        process = begin(context, url, tmp_path / "l.sqlite", COUNT, LIMITS, tmp_path / "left")
        while told(url)["calls"] < 40:
            time.sleep(0.01)
        assert process.pid
        os.kill(process.pid, number)
        process.join(20)
        charged = told(url)["charged"]
    kept = replies(tmp_path / "l.sqlite")
    assert set(charged) == set(kept)
    assert len(kept) < COUNT
    code, count, tokens = (tmp_path / "left").read_text().split()
    assert (int(code), int(count)) == (128 + number, len(kept))
    assert int(tokens) > 0


def test_the_second_signal_drops_what_is_under_way(context: Any, tmp_path: Path) -> None:
    with apart("--latency", "60") as url:
        process = begin(context, url, tmp_path / "l.sqlite", COUNT, Limits(concurrency=4), tmp_path / "left")
        while told(url)["calls"] < 4:
            time.sleep(0.01)
        assert process.pid
        for _ in range(2):
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.3)
        process.join(5)
    assert (tmp_path / "left").read_text().split()[0] == str(128 + signal.SIGTERM)


@pytest.mark.parametrize(
    ("fault", "code"), [("unauthorized", "bad_key"), ("forbidden", "forbidden"), ("quota", "no_credit"), ("no_model", "no_such_model")]
)
def test_a_server_that_lets_nobody_in_is_asked_no_more(tmp_path: Path, fault: str, code: str) -> None:
    with serving(Manners(faults={fault: 1.0}, latency=0.01)) as server, Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(ResponderError) as caught:
            ask_all(queries(COUNT), teacher(server.url), ledger, limits=LIMITS)
        assert caught.value.code == code
        assert server.counts.calls <= LIMITS.concurrency


def test_credit_that_runs_out_loses_nothing(tmp_path: Path) -> None:
    with serving(Manners(credit=60, latency=0.01)) as server, Ledger(tmp_path / "l.sqlite") as ledger:
        with pytest.raises(ResponderError) as caught:
            ask_all(queries(COUNT), teacher(server.url), ledger, limits=LIMITS)
        assert caught.value.code == "no_credit"
        assert {key for key, _, _ in ledger.replies()} == set(server.counts.charged)


def test_a_servers_room_is_found(tmp_path: Path) -> None:
    """Room for 5 calls, a ceiling of 32: all are answered, and few are turned away after the start."""
    with serving(Manners(room=5, latency=0.005, retry_after=0.05)) as server, Ledger(tmp_path / "l.sqlite") as ledger:
        limits = Limits(concurrency=32, first_wait=0.02)
        outcome = ask_all(queries(200), teacher(server.url), ledger, limits=limits)
    assert outcome.progress.accepted == 200
    assert server.counts.most_under_way <= 5
    assert server.counts.faults["throttle"] < 150


def test_a_budget_stops_with_what_the_server_counted(tmp_path: Path) -> None:
    price = Price(prompt=1.0, reply=2.0)
    with serving(Manners(latency=0.005)) as server, Ledger(tmp_path / "l.sqlite") as ledger:
        limits = Limits(concurrency=8, budget=Budget(money=0.004, price=price))
        first = ask_all(queries(COUNT), teacher(server.url), ledger, limits=limits)
        assert first.spent_up
        assert first.progress.money is not None
        assert first.progress.money <= 0.004
        spent = ledger.spent("teacher")
        assert first.progress.money == pytest.approx((spent.prompt_tokens + 2 * spent.reply_tokens) / 1e6)
        second = ask_all(queries(COUNT), teacher(server.url), ledger, limits=limits)  # the budget is the job's, not the run's
    assert second.spent_up
    assert second.progress.known <= first.progress.accepted
    assert server.counts.charged.total() == spent.replies == second.progress.spent.replies
