"""Questions to answers: in order, each once, the same bytes however the run was cut, shared or killed; a fault costs one question."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from asked import Echo, job, questions, run, slowly
from hypothesis import given
from hypothesis import strategies as st

from llavakit.assistant import Assistant
from llavakit.errors import ConfigError, DataError, ResponderError
from llavakit.eval import answers, harness
from llavakit.eval.benchmark import Protocol, Question
from llavakit.eval.harness import Job, batches, by_model, by_server
from llavakit.eval.run_folder import RunFolder, Share
from llavakit.responder import InTurn, Limits, Progress, ScriptedResponder, ServerCompleter
from llavakit.types import Image, Sampling
from misbehaving import Manners, serving

COUNT = 40


def ids(out: Path) -> list[str]:
    return [str(json.loads(line)["metadata"]["id"]) for line in (out / "answers.jsonl").read_text().splitlines()]


def in_order(count: int = COUNT) -> list[str]:
    return [question.id for question in questions(count)]


def failures(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The answers of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    assert by_model(job(out), Echo(), batch=3).whole
    return (out / "answers.jsonl").read_bytes()


# --- batches --------------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 17))
def test_batches_hold_every_question_once_and_lie_in_their_window(count: int, batch: int) -> None:
    asked = questions(count)
    made = batches(asked, batch)
    assert sorted(int(q.id[1:]) for one in made for q in one) == list(range(count))
    assert all(0 < len(one) <= batch for one in made)
    width = harness.WINDOW * batch
    for at in range(0, count, width):
        window = [q for one in made[at // batch : (at + width) // batch] for q in one]
        assert {q.id for q in window} == {q.id for q in asked[at : at + width]}
        lengths = [len(q.prompt) for q in window]
        assert lengths == sorted(lengths, reverse=True)


def test_the_size_that_is_given_decides() -> None:
    made = batches(questions(6), 2, size=lambda question: -int(question.id[1:]))
    assert [[q.id for q in one] for one in made] == [["q0", "q1"], ["q2", "q3"], ["q4", "q5"]]


# --- the file -------------------------------------------------------------------------------------------------------------------------


def test_answers_stand_in_the_order_of_the_questions(tmp_path: Path, whole: bytes) -> None:
    told: list[Progress] = []
    outcome = by_model(job(tmp_path), Echo(), batch=3, tell=told.append)
    assert (outcome.answered, outcome.fresh, outcome.whole, list(outcome.failures)) == (COUNT, COUNT, True, [])
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert ids(tmp_path) == in_order()
    assert [now.done for now in told] == [*range(3, COUNT, 3), COUNT]
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "run.json"}


def test_a_second_run_asks_nothing(tmp_path: Path, whole: bytes) -> None:
    by_model(job(tmp_path), Echo(), batch=3)
    again = Echo()
    outcome = by_model(job(tmp_path), again, batch=3)
    assert (outcome.answered, outcome.fresh, again.batches) == (COUNT, 0, [])
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


def test_a_limit_can_be_raised(tmp_path: Path, whole: bytes) -> None:
    by_model(job(tmp_path, limit=6), Echo(), batch=3)
    assert ids(tmp_path) == in_order(6)
    assert json.loads((tmp_path / "run.json").read_text())["asked"] == 6
    assert by_model(job(tmp_path), Echo(), batch=3).fresh == COUNT - 6
    assert ids(tmp_path) == in_order()
    by_model(job(tmp_path, limit=6), Echo(), batch=3)
    assert ids(tmp_path) == in_order()  # a lower one loses nothing


@pytest.mark.parametrize("change", [{"model": "other"}, {"protocol": Protocol(name="plain", suffix="Briefly.")}, {"count": 41}])
def test_another_model_or_protocol_does_not_go_on_here(tmp_path: Path, change: dict[str, Any], whole: bytes) -> None:
    by_model(job(tmp_path), Echo(), batch=3)
    with pytest.raises(DataError) as caught:
        by_model(job(tmp_path, **change), Echo(), batch=3)
    assert caught.value.code == "other_run"
    assert "run.json" in str(caught.value)
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


def test_answers_without_their_description_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"without run\.json"):
        by_model(job(tmp_path), Echo())
    assert (tmp_path / "answers.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("cut", [1, 2, 30, 200, 700])
def test_a_torn_end_is_healed_and_whole_batches_are_computed_again(tmp_path: Path, whole: bytes, cut: int) -> None:
    """Echo's answers name their batch: they equal those of an undisturbed run only if the batches do."""
    by_model(job(tmp_path), Echo(), batch=3)
    (tmp_path / "answers.jsonl").write_bytes(whole[:-cut])
    assert by_model(job(tmp_path), Echo(), batch=3).whole
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


def test_a_broken_middle_is_an_error_with_its_line(tmp_path: Path, whole: bytes) -> None:
    by_model(job(tmp_path), Echo(), batch=3)
    lines = whole.split(b"\n")
    (tmp_path / "answers.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(DataError, match=r"answers\.jsonl:2"):
        by_model(job(tmp_path), Echo(), batch=3)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    held = job(tmp_path)
    with held.folder(), pytest.raises(DataError) as caught:
        by_model(job(tmp_path), Echo())
    assert caught.value.code == "answers_in_use"
    assert by_model(job(tmp_path), Echo()).whole


def test_replies_that_are_drawn_are_drawn_alike(tmp_path: Path, tiny_model_dir: Path) -> None:
    assistant, asked = Assistant.load(tiny_model_dir, device="cpu"), questions(5)
    drawn = run(asked, protocol=Protocol(name="plain", temperature=1.0, max_new_tokens=6))
    for out in ("a", "b"):
        by_model(Job(questions=asked, run=drawn, out=tmp_path / out), assistant, batch=3)
    assert (tmp_path / "a" / "answers.jsonl").read_bytes() == (tmp_path / "b" / "answers.jsonl").read_bytes()
    colder = run(asked, protocol=Protocol(name="plain", temperature=0.5, max_new_tokens=6))
    with pytest.raises(DataError, match=r"temperature 1\.0, now 0\.5"):
        by_model(Job(questions=asked, run=colder, out=tmp_path / "a"), assistant)


# --- faults ---------------------------------------------------------------------------------------------------------------------------


def test_what_fails_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    outcome = by_model(job(tmp_path), Echo(bad=["7", "8"], broken=["20"]), batch=4)
    assert (outcome.answered, outcome.whole) == (COUNT - 3, True)
    assert ids(tmp_path) == [name for name in in_order() if name not in ("q7", "q8", "q20")]
    assert [(one["id"], one["code"]) for one in failures(tmp_path)] == [
        ("q7", "image_truncated"),
        ("q8", "image_truncated"),
        ("q20", "fault"),
    ]
    assert failures(tmp_path)[0]["what"] == "x.png: it is torn. get it again"
    assert failures(tmp_path)[2]["what"] == "RuntimeError: out of memory"
    mended = by_model(job(tmp_path), Echo(), batch=4)
    assert (mended.fresh, list(mended.failures)) == (3, [])
    assert ids(tmp_path) == in_order()
    assert not (tmp_path / "failures.jsonl").exists()


def test_a_picture_that_is_missing_is_one_failure(tmp_path: Path, tiny_model_dir: Path) -> None:
    absent = Question(id="x", given=1, prompt="What?", image=Image(tmp_path / "none.png"))
    odd = Question(id="y", given=2, prompt="nul \0")
    asked = [absent, odd, Question(id="z", given=3, prompt="What?")]
    done = Job(questions=asked, run=run(asked, protocol=Protocol(name="plain", max_new_tokens=4)), out=tmp_path / "out")
    outcome = by_model(done, Assistant.load(tiny_model_dir, device="cpu"))
    assert ids(tmp_path / "out") == ["z"]
    assert [(one.id, one.code) for one in outcome.failures] == [("x", "image_not_found"), ("y", "bad_characters")]


def test_where_nobody_answers_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [str(n) for n in range(COUNT)]
    with pytest.raises(ResponderError, match="40 questions in a row"):
        by_model(job(tmp_path), Echo(bad=everything), batch=3)
    monkeypatch.setattr(harness, "IN_A_ROW", 10)
    with pytest.raises(ResponderError, match="10 questions in a row"):
        by_model(job(tmp_path), Echo(bad=everything[5:]), batch=3, size=lambda question: -int(question.id[1:]))
    assert ids(tmp_path) == in_order(5)  # what was answered is kept


def test_what_is_too_much_at_once_is_asked_in_parts(tmp_path: Path) -> None:
    class Small(Echo):
        def reply_encoded(self, encoded: Any, sampling: Sampling) -> list[str]:
            if len(encoded) > 2:
                raise MemoryError
            return super().reply_encoded(encoded, sampling)

    outcome = by_model(job(tmp_path), Small(), batch=16)
    assert (outcome.answered, list(outcome.failures)) == (COUNT, [])


# --- many processes, and killed ones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "world"), [(40, 2), (40, 3), (3, 5), (1, 2)])
def test_ranks_write_the_file_of_one_process(tmp_path: Path, count: int, world: int) -> None:
    assert by_model(job(tmp_path / "one", count), Echo(), batch=3).whole
    ends = [by_model(job(tmp_path / "many", count, share=Share(rank=r, world=world)), Echo(), batch=3).whole for r in range(world)]
    assert ends[-1]
    assert sum(ends) == 1 or count < world  # a rank that has nothing to do finds all settled
    assert (tmp_path / "many" / "answers.jsonl").read_bytes() == (tmp_path / "one" / "answers.jsonl").read_bytes()
    assert {path.name for path in (tmp_path / "many").iterdir()} == {"answers.jsonl", "run.json"}


def test_ranks_that_stopped_are_continued_by_any_number(tmp_path: Path, whole: bytes) -> None:
    by_model(job(tmp_path, share=Share(rank=1, world=3)), Echo(bad=["5"]), batch=3)
    part = tmp_path / "answers.rank-1-of-3.jsonl"
    part.write_bytes(part.read_bytes()[:-10])
    assert not by_model(job(tmp_path, share=Share(rank=0, world=2)), Echo(), batch=3).whole
    assert by_model(job(tmp_path), Echo(), batch=3).whole
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "run.json"}


def test_failures_of_all_ranks_are_one_file(tmp_path: Path) -> None:
    for rank in (1, 0):
        outcome = by_model(job(tmp_path, share=Share(rank=rank, world=2)), Echo(bad=["3", "4", "9"]), batch=3)
    assert outcome.whole
    assert [one["id"] for one in failures(tmp_path)] == [one.id for one in outcome.failures] == ["q3", "q4", "q9"]
    assert len(ids(tmp_path)) == COUNT - 3


def test_a_rank_that_still_writes_is_waited_for_by_nobody(tmp_path: Path, whole: bytes) -> None:
    other = job(tmp_path, share=Share(rank=1, world=2))
    with RunFolder(tmp_path, other.run, other.questions, other.asked, other.share) as folder:
        for one in batches(other.asked, 3)[1::2]:
            said = Echo().reply_encoded([q.conversation().messages[-1].text for q in one], Sampling())
            folder.add(list(zip(one, said, strict=True)))
        assert not by_model(job(tmp_path, share=Share(rank=0, world=2)), Echo(), batch=3).whole
        assert not (tmp_path / "answers.jsonl").exists()
        assert folder.settle()
    assert (tmp_path / "answers.jsonl").read_bytes() == whole


def test_shares_are_read_from_the_environment() -> None:
    assert Share.of({}) == Share()
    assert Share.of({"RANK": "1", "WORLD_SIZE": "4"}) == Share(rank=1, world=4)
    for wrong in ({"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x"}):
        with pytest.raises(ConfigError, match="WORLD_SIZE"):
            Share.of(wrong)


def test_killed_ten_times_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    count, out, dice = 400, tmp_path / "killed", random.Random(1)
    by_model(job(tmp_path / "whole", count), Echo(), batch=4)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["asked"])
    blows = 0
    for number in range(10):
        process = context.Process(target=slowly, args=(out, count, 4))
        process.start()
        goal, path, end = count * (number + dice.random()) / 11, out / "answers.jsonl", time.monotonic() + 20
        while process.is_alive() and time.monotonic() < end and (path.read_bytes().count(b"\n") if path.exists() else 0) < goal:
            time.sleep(0.001)
        time.sleep(dice.random() * 0.01)
        process.kill()
        process.join()
        blows += process.exitcode == -signal.SIGKILL
        if number == 4:
            path.write_bytes(path.read_bytes()[:-5])  # as a blow within a write leaves it
    assert blows >= 9
    assert by_model(job(out, count), Echo(), batch=4).whole
    assert (out / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


# --- who is asked ---------------------------------------------------------------------------------------------------------------------


def test_batches_of_our_own_model_say_what_single_questions_do(tmp_path: Path, tiny_model_dir: Path) -> None:
    assistant = Assistant.load(tiny_model_dir, device="cpu", dtype=torch.float32)
    asked = questions(12)
    done = Job(questions=asked, run=run(asked, protocol=Protocol(name="plain", max_new_tokens=8)), out=tmp_path)
    by_model(done, assistant, batch=5)
    found = answers.match(asked, answers.read(tmp_path / "answers.jsonl"))
    alone = ["".join(assistant.reply(q.conversation(), done.sampling)) for q in asked]
    assert [one.text for one in found.answered] == alone


def test_a_server_is_asked_many_at_once_and_nothing_twice(tmp_path: Path) -> None:
    with serving(Manners(faults={"error": 0.1, "throttle": 0.1, "cut": 0.05}, latency=0.002, retry_after=0.01)) as server:
        completer = ServerCompleter("teacher", base_url=server.url)
        limits = Limits(concurrency=8, first_wait=0.01)
        first = by_server(job(tmp_path), completer, limits=limits)
        calls = server.counts.calls
        second = by_server(job(tmp_path), completer, limits=limits)
        assert server.counts.calls == calls
    assert (first.answered, first.whole, second.fresh) == (COUNT, True, 0)
    assert ids(tmp_path) == in_order()


def test_what_a_server_refuses_is_one_failure(tmp_path: Path) -> None:
    with serving(Manners(faults={"bad": 0.2, "filter": 0.1}, latency=0.001)) as server:
        outcome = by_server(job(tmp_path), ServerCompleter("teacher", base_url=server.url), limits=Limits(concurrency=4, first_wait=0.01))
    assert outcome.whole
    assert {one.code for one in outcome.failures} <= {"refused", "rejected"}
    assert outcome.failures
    assert len(ids(tmp_path)) + len(outcome.failures) == COUNT == outcome.answered + len(outcome.failures)


def test_any_responder_can_be_asked(tmp_path: Path) -> None:
    scripted = InTurn(ScriptedResponder(str(n) for n in range(COUNT)), "script")
    assert by_server(job(tmp_path), scripted).answered == COUNT
    with pytest.raises(ConfigError, match="torchrun"):
        by_server(job(tmp_path, share=Share(rank=0, world=2)), scripted)
