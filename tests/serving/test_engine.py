"""The engine: many at once == each alone, whoever comes, goes, asks again, asks too much or breaks."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from engines import SMALL, engine_of, picture, read, said
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavakit.assistant import Assistant
from llavakit.errors import BusyError, ConfigError, ContextError, LlavaError, PromptError, SamplingError
from llavakit.model.cpu import CpuLinear
from llavakit.serve.engine import AssistantEngine
from llavakit.serve.protocol import Ask, End, Engine
from llavakit.types import Conversation, Sampling, assistant, system, user

SHORT = Sampling(max_new_tokens=12)
RED, BLUE = picture(0), picture(7)
TALKS = (
    Conversation.ask("What is in the picture?", RED),
    Conversation.ask("Yes or no?"),
    Conversation.ask("", BLUE),
    Conversation((system("Be short."), user(RED, BLUE, "\nWhich one?"), assistant("A red circle."), user("How many things are there?"))),
    Conversation.ask("How many? " * 30, picture(3)),
)


def alone(helper: Assistant, talk: Conversation, sampling: Sampling) -> str:
    return "".join(helper.reply(talk, sampling))


@pytest.mark.parametrize("seed", range(2))
def test_sixteen_mixed_requests_at_random_moments_are_each_alone(helper: Assistant, seed: int) -> None:
    dice = random.Random(seed)
    asked = [
        (
            dice.choice(TALKS),
            Sampling(max_new_tokens=dice.randint(1, 30), temperature=dice.choice([0, 0, 0.7]), top_p=0.9, seed=dice.randint(0, 9)),
        )
        for _ in range(16)
    ]

    async def run() -> list[str]:
        async with engine_of(helper) as engine:

            async def one(talk: Conversation, sampling: Sampling) -> str:
                await asyncio.sleep(dice.random() / 4)
                return (await said(engine, talk, sampling)).text

            return list(await asyncio.gather(*(one(*what) for what in asked)))

    assert asyncio.run(run()) == [alone(helper, *what) for what in asked]


def test_it_is_an_engine_that_reads_all_at_once(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            checked: Engine = engine
            assert checked.alive
            assert engine.together
            assert engine.context == 1024
        assert not engine.alive

    asyncio.run(run())


def test_counts_are_exact(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            reply = await engine.submit(Ask(conversation=TALKS[3], sampling=SHORT))
            inputs = helper.processor.encode(TALKS[3], learn=False)
            assert (reply.prompt_tokens, reply.image_tokens) == (len(inputs.input_ids), 32)
            done = await read(reply)
            assert done.end.finish == "length"
            assert done.end.reply_tokens == 12 >= sum(piece.tokens for piece in done.pieces)
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.finished, stats.prompt_tokens) == (0, 0, 1, len(inputs.input_ids))

    asyncio.run(run())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stop_string_ends_the_reply_and_is_not_shown(helper: Assistant, data: st.DataObject) -> None:
    talk = data.draw(st.sampled_from(TALKS))
    whole = alone(helper, talk, SHORT)
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    sampling = SHORT.but(stop=(whole[start : start + 3] or "x", "never said"))

    async def run() -> Any:
        async with engine_of(helper) as engine:
            return await said(engine, talk, sampling)

    done = asyncio.run(run())
    assert done.text == alone(helper, talk, sampling)
    assert done.end.finish == ("stop" if sampling.stop[0] in whole else "length")


def test_a_third_turn_reads_only_what_is_new(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            talk = Conversation.ask("What is in the picture?", RED)
            before = 0
            for _ in range(3):
                done = await said(engine, talk, SHORT)
                new = done.end.prompt_tokens - done.end.cached_tokens
                assert new <= done.end.prompt_tokens - before  # words chosen at random may come back from text as other tokens
                before = done.end.prompt_tokens
                assert done.text == alone(helper, talk, SHORT)
                talk = talk.then(assistant(done.text.replace("\0", "") or "Yes.")).then(user("How many things are there?"))
            assert engine.stats().feature_misses == 1

    asyncio.run(run())


def test_the_same_picture_with_another_question_reads_the_question(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            first = await said(engine, Conversation.ask("What is in the picture?", RED), SHORT)
            again = await said(engine, Conversation.ask("How many things?", RED), SHORT)
            other = await said(engine, Conversation.ask("How many things?", BLUE), SHORT)
            assert first.end.cached_tokens == 0
            head = helper.processor.encode(Conversation.ask("", RED), learn=False)
            through = max(at for at, number in enumerate(head.input_ids.tolist()) if number == helper.processor.image_token_id) + 1
            assert again.end.cached_tokens >= through
            assert other.end.cached_tokens < through - 15, "a picture of equal size is another text"
            assert other.text == alone(helper, Conversation.ask("How many things?", BLUE), SHORT)
            assert engine.stats().feature_misses == 2

    asyncio.run(run())


def test_an_edited_history_keeps_what_stands_before_the_edit(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            begun = (user(RED, "\nWhat?"), assistant("A red circle."))
            await said(engine, Conversation((*begun, user("Is there a star?"))), SHORT)
            edited = Conversation((*begun, user("Yes or no?")))
            done = await said(engine, edited, SHORT)
            assert done.text == alone(helper, edited, SHORT)
            assert done.end.prompt_tokens - done.end.cached_tokens < 25
            again = await said(engine, edited, SHORT)
            assert again.end.cached_tokens == again.end.prompt_tokens - 1
            assert again.text == done.text

    asyncio.run(run())


def test_eight_at_once_about_one_picture_read_it_once(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper, SMALL.but(running=8)) as engine:
            talks = [Conversation.ask(f"{'How many? ' * 9}{number}", RED) for number in range(8)]
            done = await asyncio.gather(*(said(engine, talk, SHORT) for talk in talks))
            assert [one.text for one in done] == [alone(helper, talk, SHORT) for talk in talks]
            assert sum(one.end.cached_tokens == 0 for one in done) == 1
            assert engine.stats().feature_misses <= 8

    asyncio.run(run())


def test_low_detail_is_the_base_view(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            low, high = [await said(engine, TALKS[0], SHORT, detail) for detail in ("low", "high")]
            assert low.text == high.text, "this model has one view"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("talk", "sampling", "kind"),
    [
        (Conversation((user(" "),)), SHORT, PromptError),
        (Conversation((user("hello"), assistant("yes"))), SHORT, PromptError),
        (Conversation((user("word " * 2000),)), SHORT, ContextError),
        (TALKS[1], SHORT.but(max_new_tokens=1024), ContextError),
        (TALKS[1], SHORT.but(num_beams=2), SamplingError),
        (Conversation.ask("What?", b"no picture"), SHORT, LlavaError),
    ],
)
def test_what_cannot_be_asked_is_refused_and_leaves_no_trace(
    helper: Assistant, talk: Conversation, sampling: Sampling, kind: type[LlavaError]
) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            with pytest.raises(kind):
                await engine.submit(Ask(conversation=talk, sampling=sampling))
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.refused) == (0, 0, 0)
            assert (await said(engine, TALKS[1], SHORT)).text == alone(helper, TALKS[1], SHORT)

    asyncio.run(run())


def test_a_full_engine_turns_away_and_says_when_to_come_back(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper, SMALL.but(running=2, waiting=3)) as engine:
            results = await asyncio.gather(
                *(engine.submit(Ask(conversation=TALKS[n % 3], sampling=SHORT)) for n in range(50)), return_exceptions=True
            )
            refused = [one for one in results if isinstance(one, BusyError)]
            assert len(refused) == 45
            assert all(one.code == "overloaded" and one.retry_after >= 1 for one in refused)
            assert engine.stats().refused == 45
            taken = [await read(one) for one in results if not isinstance(one, BaseException)]
            assert all(one.end.finish == "length" for one in taken)
            assert (await said(engine, TALKS[1], SHORT)).text == alone(helper, TALKS[1], SHORT)

    asyncio.run(run())


def test_drain_lets_go_on_what_fits_the_grace_and_cancels_the_rest(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            short = await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT))
            draining = asyncio.create_task(engine.drain(30))
            await asyncio.sleep(0)
            with pytest.raises(BusyError) as caught:
                await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT))
            assert caught.value.code == "shutting_down"
            assert (await read(short)).end.finish == "length"
            await draining
            assert not engine.alive
        async with engine_of(helper) as engine:
            long = await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT.but(max_new_tokens=900)))
            await engine.drain(0)
            assert (await read(long)).end.finish == "cancelled"

    asyncio.run(run())


def test_giving_up_from_another_thread_twice_and_after_the_end(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            reply = await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT.but(max_new_tokens=900)))
            async for item in reply:
                if isinstance(item, End):
                    assert item.finish == "cancelled"
                    assert item.reply_tokens < 900
                    break
                for _ in range(2):
                    threading.Thread(target=reply.cancel).start()
            reply.cancel()
            assert engine.stats().cancelled == 1
            assert (await said(engine, TALKS[1], SHORT)).text == alone(helper, TALKS[1], SHORT)

    asyncio.run(run())


def test_who_leaves_while_his_picture_is_decoded_frees_his_place(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with engine_of(helper) as engine:
            going = threading.Event()
            encode = engine._encode
            monkeypatch.setattr(engine, "_encode", lambda ask: going.wait(5) and encode(ask))
            task = asyncio.create_task(engine.submit(Ask(conversation=TALKS[0], sampling=SHORT)))
            await asyncio.sleep(0.02)
            assert engine.stats().waiting == 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert engine.stats().waiting == 0
            going.set()
            assert (await said(engine, TALKS[0], SHORT)).text == alone(helper, TALKS[0], SHORT)

    asyncio.run(run())


def test_pictures_on_their_way_in_are_bounded_in_bytes(helper: Assistant) -> None:
    async def run() -> None:
        async with engine_of(helper, SMALL.but(request_bytes=100_000)) as engine:
            big = Conversation.ask("What?", picture(1, 300, 300))
            results = await asyncio.gather(
                *(engine.submit(Ask(conversation=big, sampling=SHORT)) for _ in range(3)), return_exceptions=True
            )
            assert [isinstance(one, BusyError) for one in results] == [False, True, True]
            await read(results[0])

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_told_to_everyone(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        engine = AssistantEngine.start(helper, limits=SMALL)
        reply = await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT.but(max_new_tokens=900)))
        monkeypatch.setattr(engine._scheduler, "step", lambda: 1 / 0)
        done = await read(reply)
        assert done.end.finish == "error"
        assert done.end.error is not None
        assert done.end.error.code == "engine_stopped"
        engine._thread.join(10)
        assert not engine.alive
        with pytest.raises(BusyError):
            await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT))
        assert engine.stats().waiting == 0
        await engine.drain(0)

    asyncio.run(run())


def test_a_reader_whose_loop_has_ended_harms_nobody(helper: Assistant) -> None:
    engine = AssistantEngine.start(helper, limits=SMALL)
    asyncio.run(_left_behind(engine))
    assert asyncio.run(said(engine, TALKS[1], SHORT)).text == alone(helper, TALKS[1], SHORT)
    asyncio.run(engine.drain(0))
    assert not engine.alive


async def _left_behind(engine: AssistantEngine) -> None:
    await engine.submit(Ask(conversation=TALKS[1], sampling=SHORT.but(max_new_tokens=900)))


@pytest.mark.parametrize(("field", "value"), [("running", 0), ("chunk", 0), ("waiting", -1), ("feature_bytes", -1)])
def test_limits_are_checked(field: str, value: int) -> None:
    with pytest.raises(ConfigError):
        SMALL.but(**{field: value})


def test_in_bfloat16_weights_are_laid_anew_and_everyone_is_served(tiny_model_dir: Path) -> None:
    made = Assistant.load(tiny_model_dir, device="cpu", dtype="bf16")
    made.stop_ids = frozenset()

    async def run() -> None:
        async with engine_of(made) as engine:
            linears = [module for module in made.model.language_model.modules() if isinstance(module, CpuLinear)]
            assert linears
            assert len({module.keep_packed for module in linears}) == 1
            done = await asyncio.gather(*(said(engine, talk, SHORT) for talk in TALKS * 2))
            assert all(one.end.finish == "length" for one in done)

    asyncio.run(run())
