"""What a step does, driven by hand: fair shares, leaving at any moment, what fails and what does not, bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import SMALL, Steps, picture
from torch import Tensor

from llavakit.assistant import Assistant
from llavakit.errors import LlavaError
from llavakit.serve.job import Job
from llavakit.serve.room import Pace
from llavakit.types import Conversation, Sampling, assistant, user

SHORT, LONG = Sampling(max_new_tokens=6), Sampling(max_new_tokens=200)
WORDS = Conversation.ask("Is there a star?")
MANY_WORDS = Conversation.ask("How many things are there? " * 20)
PICTURES = Conversation.ask("Which one?", *(picture(seed) for seed in range(6)))


def begun(steps: Steps, sampling: Sampling = LONG) -> Job:
    """A reply under way."""
    job = steps.job(WORDS, sampling)
    while not job.taken:
        steps.scheduler.step()
    return job


@pytest.mark.parametrize("talk", [MANY_WORDS, PICTURES], ids=["words", "pictures"])
def test_a_long_prompt_holds_nobody_up_for_more_than_a_chunk(helper: Assistant, talk: Conversation) -> None:
    steps = Steps(helper)
    writing = begun(steps)
    steps.parts.clear()
    reading = steps.job(talk, SHORT)
    count = len(writing.taken)
    while not reading.taken:
        steps.scheduler.step()
        count += 1
        assert len(writing.taken) == count, "a token a step, whatever else is read"
    assert all(parts[0] == 1 and sum(parts[1:]) <= SMALL.chunk for parts in steps.parts)
    assert sum(sum(parts[1:]) for parts in steps.parts) == reading.prompt_tokens - reading.cached


def test_the_tower_works_in_slices_while_somebody_writes(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper, SMALL.but(views=1))
    begun(steps)
    layers: list[int] = []
    for layer in helper.model.vision_tower.vision_model.encoder.layers:
        layer.register_forward_hook(lambda *_: layers.append(len(steps.parts)))
    monkeypatch.setattr(steps.scheduler.tower, "view_cost", SMALL.chunk + 1.0)  # a layer is a chunk's worth
    reading = steps.job(PICTURES, SHORT)
    while not reading.taken:
        steps.scheduler.step()
    assert len(layers) == 6 * helper.model.vision_tower.run_layers
    assert len(set(layers)) == len(layers), "one layer a step"
    for layer in helper.model.vision_tower.vision_model.encoder.layers:
        layer._forward_hooks.clear()


def test_a_short_question_passes_a_long_one_and_the_long_one_goes_on(helper: Assistant) -> None:
    steps = Steps(helper)
    begun(steps)
    long, short = steps.job(MANY_WORDS, SHORT), steps.job(WORDS.then(assistant("No.")).then(user("Yes?")), SHORT)
    read = 0
    while not short.taken:
        steps.scheduler.step()
        assert long.read > read
        read = long.read
    assert not long.taken


def _phases(steps: Steps) -> list[tuple[str, Callable[[Job], bool]]]:
    return [
        ("waiting", lambda job: job in steps.scheduler.waiting),
        ("seeing", lambda job: steps.scheduler.tower.busy),
        ("reading", lambda job: 0 < job.read < job.prompt_tokens),
        ("writing", lambda job: len(job.taken) > 1),
    ]


@pytest.mark.parametrize("phase", range(4))
def test_who_leaves_is_gone_a_step_later_and_holds_nothing(helper: Assistant, phase: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper, SMALL.but(views=1))
    scheduler = steps.scheduler
    monkeypatch.setattr(scheduler.tower, "view_cost", 30.0)
    writing = begun(steps)
    held = scheduler.reserved
    leaving = steps.job(PICTURES, LONG)
    name, reached = _phases(steps)[phase]
    while not reached(leaving):
        scheduler.step()
    before = len(writing.taken)
    leaving.cancel()
    leaving.cancel()
    scheduler.step()
    done = steps.said(leaving)
    assert (done.end.finish, done.end.error) == ("cancelled", None), name
    assert scheduler.jobs == [writing]
    assert scheduler.reserved == held
    assert not scheduler.tower.busy
    assert len(writing.taken) == before + 1
    assert leaving.memory is None
    leaving.cancel()
    again = steps.job(PICTURES, SHORT)
    while scheduler.reading or scheduler.waiting or again in scheduler.writing:
        scheduler.step()
    assert steps.said(again).text == "".join(helper.reply(PICTURES, SHORT)), "what was read before is of use"
    assert again.cached >= (36 if name in ("reading", "writing") else 0)


def test_two_who_ask_for_one_picture_see_it_once_though_the_first_leaves(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper, SMALL.but(chunk=1000, chunk_alone=1))
    monkeypatch.setattr(steps.scheduler.tower, "view_cost", 1.0)
    first = steps.job(Conversation.ask("What?", picture(1)), SHORT)
    second = steps.job(Conversation.ask("Which one?", picture(1)), SHORT)
    steps.scheduler.step()
    assert steps.scheduler.tower.busy
    first.cancel()
    steps.finish()
    assert steps.said(first).end.finish == "cancelled"
    assert steps.said(second).text == "".join(helper.reply(Conversation.ask("Which one?", picture(1)), SHORT))


def _fails_once(error: BaseException) -> Callable[..., Any]:
    state = {"calls": 0}

    def read(*_: Any) -> Any:
        state["calls"] += 1
        raise error

    return read


def test_a_step_that_fails_ends_its_replies_and_no_others(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper)
    job = begun(steps)
    waiting = [steps.job(WORDS, SHORT) for _ in range(SMALL.running)]
    with monkeypatch.context() as patch:
        patch.setattr(steps.reader, "read", _fails_once(RuntimeError("a secret")))
        steps.scheduler.step()
    error = steps.said(job).end.error
    assert isinstance(error, LlavaError)
    assert error.code == "engine_error"
    assert "secret" not in str(error)
    steps.finish()
    last = steps.said(waiting[-1])
    assert last.text == "".join(helper.reply(WORDS, SHORT))
    assert steps.scheduler.reserved == 0


def test_a_picture_that_breaks_the_tower_ends_its_own_reply(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper)
    writing = begun(steps, LONG)
    with monkeypatch.context() as patch:
        patch.setattr(helper.model.vision_tower, "in_slices", _fails_once(RuntimeError("broken")))
        broken = steps.job(Conversation.ask("What?", picture(2)), SHORT)
        steps.scheduler.step()
    assert steps.said(broken).end.finish == "error"
    assert steps.scheduler.jobs == [writing]
    assert not steps.scheduler.tower.busy


def test_scores_that_are_no_numbers_end_one_reply(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper)
    jobs = [begun(steps), begun(steps)]
    read = steps.reader.read

    def spoiled(parts: Any) -> Tensor:
        scores = read(parts)
        scores[0] = torch.nan
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(steps.reader, "read", spoiled)
        steps.scheduler.step()
    assert steps.said(jobs[0]).end.finish == "error"
    assert steps.scheduler.jobs == [jobs[1]]


def test_a_full_machine_gives_up_what_it_remembers(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper)
    steps.job(PICTURES, SHORT)
    steps.finish()
    assert steps.scheduler.prefixes.held
    assert steps.scheduler.features.held
    job = begun(steps)
    with monkeypatch.context() as patch:
        patch.setattr(steps.reader, "read", _fails_once(MemoryError()))
        steps.scheduler.step()
    error = steps.said(job).end.error
    assert error is not None
    assert error.code == "out_of_memory"
    assert (steps.scheduler.prefixes.held, steps.scheduler.features.held, steps.scheduler.kv_bytes) == (0, 0, 0)


def test_bytes_stay_in_their_bounds_whatever_is_asked(helper: Assistant) -> None:
    one = Steps(helper).reader.shape.bytes_for(128)
    limits = SMALL.but(kv_bytes=4 * one, feature_bytes=10_000, chunk_alone=200)
    steps = Steps(helper, limits)
    for number in range(60):
        steps.job(Conversation.ask(f"Number {number}?", picture(number % 18, 40 + number // 18)), SHORT)
        while len(steps.scheduler.jobs) > 6:
            steps.scheduler.step()
        held = sum(job.memory.nbytes for job in steps.scheduler.jobs if job.memory is not None) + steps.scheduler.prefixes.held
        assert held <= steps.scheduler.kv_bytes <= limits.kv_bytes
        assert steps.scheduler.features.held <= limits.feature_bytes
    steps.finish()
    assert steps.scheduler.reserved == 0
    assert steps.scheduler.counts["stop"] == 60
    assert len(steps.scheduler.prefixes) >= 3


def test_a_turn_takes_over_what_the_last_one_read_even_if_there_is_room_for_one(helper: Assistant) -> None:
    talk = Conversation.ask("What is in the picture?", picture(4))
    room = Steps(helper).reader.shape.bytes_for(192)
    steps = Steps(helper, SMALL.but(kv_bytes=room))
    steps.job(talk, SHORT)
    steps.finish()
    second = steps.job(talk.then(assistant("A red circle.")).then(user("How many?")), SHORT)
    steps.finish()
    assert second.cached > 40
    assert steps.scheduler.prefixes.held <= room


def test_the_words_of_a_reply_are_not_read_again(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(helper)
    reply = "A red circle left of a blue square."
    ids = helper.processor.tokenizer(reply, add_special_tokens=False).input_ids
    script = iter([*ids, helper.processor.tokenizer.eos_token_id])
    monkeypatch.setattr(steps.scheduler, "_drawn", lambda *_: next(script))
    talk = Conversation.ask("What is in the picture?", picture(4))
    first = steps.job(talk, Sampling(temperature=1, max_new_tokens=99))
    steps.finish()
    assert steps.said(first).text == reply
    second = steps.job(talk.then(assistant(reply)).then(user("How many?")), SHORT)
    steps.finish()
    assert second.cached == first.prompt_tokens + len(ids), "its end and what comes after are new"


def test_a_slow_machine_takes_smaller_chunks() -> None:
    pace = Pace(SMALL.but(chunk=200, chunk_alone=400, pause=0.5))
    first = pace.budget(alone=True)
    assert first == pace.budget(alone=False) < 200
    for _ in range(20):
        pace.took(100, 1.0)
    assert (round(pace.budget(alone=False)), round(pace.budget(alone=True))) == (50, 200)
    pace.took(3, 100.0)  # a step of tokens alone says nothing about reading
    assert round(pace.budget(alone=False)) == 50
    for _ in range(40):
        pace.took(100, 1000.0)
    assert pace.budget(alone=False) == 16, "it goes on"
    for _ in range(40):
        pace.took(100, 0.001)
    assert (pace.budget(alone=False), pace.budget(alone=True)) == (200, 400)
