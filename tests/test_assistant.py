"""The assistant: streamed == batched == one by one, stop strings, questions that cannot be asked, and a session that re-reads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavakit.assistant import Assistant, Session
from llavakit.checkpoint import places
from llavakit.errors import CheckpointError, ContextError, LlavaError, PromptError
from llavakit.model import generation
from llavakit.model.cpu import CpuLinear
from llavakit.responder import Responder, ScriptedResponder
from llavakit.text_stream import finished_text
from llavakit.types import Conversation, Image, Message, Sampling, Text, assistant, system, user

SHORT = Sampling(max_new_tokens=12)


def _picture(seed: int) -> Image:
    return Image.of(PIL.Image.effect_mandelbrot((40 + seed, 60), (-2 + seed / 9, -1.5, 1, 1.5), 30).convert("RGB"))


RED, BLUE = _picture(0), _picture(7)
CONVERSATIONS = (
    Conversation.ask("What is in the picture?", RED),
    Conversation.ask("Yes or no?"),
    Conversation.ask("", BLUE),
    Conversation((system("Be short."), user(RED, BLUE, "\nWhich one?"), assistant("A red circle."), user("How many things are there?"))),
)


def _text(pieces: Iterator[str]) -> str:
    return "".join(pieces)


def test_an_assistant_is_a_responder(helper: Assistant) -> None:
    responders: list[Responder] = [helper, helper.session(), ScriptedResponder(["fine"])]
    assert all(isinstance(_text(one.reply(CONVERSATIONS[1], SHORT)), str) for one in responders)
    assert isinstance(next(m for m in helper.model.modules() if isinstance(m, torch.nn.Linear)), CpuLinear)


@pytest.mark.parametrize("sampling", [SHORT, SHORT.but(temperature=0.7, top_p=0.9, seed=5), SHORT.but(num_beams=2)])
def test_streamed_equals_batched_equals_finished_text(helper: Assistant, sampling: Sampling) -> None:
    batched = helper.reply_batch(CONVERSATIONS, sampling)
    assert batched == [_text(helper.reply(conversation, sampling)) for conversation in CONVERSATIONS]
    inputs = helper.processor.encode(CONVERSATIONS[0], learn=False)
    batch = helper.processor.collate([inputs], side="left")
    (ids,) = generation.generate(helper.model, batch, sampling=sampling, stop_ids=helper.stop_ids)
    assert batched[0] == finished_text(helper.processor.decode(ids), helper.processor.template.stop)
    assert len(set(batched)) > 1
    assert helper.reply_batch([]) == []


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_stop_string_ends_the_reply_and_is_not_shown(helper: Assistant, data: st.DataObject) -> None:
    conversation = data.draw(st.sampled_from(CONVERSATIONS))
    whole = _text(helper.reply(conversation, SHORT))
    start = data.draw(st.integers(0, max(0, len(whole) - 1)))
    stop = whole[start : start + data.draw(st.integers(1, 5))] or "x"
    sampling = SHORT.but(stop=(stop, "never said"))
    shown = _text(helper.reply(conversation, sampling))
    assert shown == whole.split(stop)[0].strip() or stop.isspace()
    assert stop not in shown
    assert helper.reply_batch([conversation, CONVERSATIONS[1]], sampling)[0] == shown


@pytest.mark.parametrize(
    ("conversation", "code"),
    [
        (Conversation((user(""),)), "empty_prompt"),
        (Conversation((user(" \n\t "),)), "empty_prompt"),
        (Conversation((user("\n\n"),)), "empty_prompt"),
        (Conversation(()), "empty_prompt"),
        (Conversation((user("hello"), assistant("yes"))), "no_question"),
        (Conversation((user("word " * 2000),)), "context_length_exceeded"),
        (Conversation((user(*(RED,) * 64, "Which one?"),)), "context_length_exceeded"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_at_once(helper: Assistant, conversation: Conversation, code: str) -> None:
    for call in (helper.reply, helper.session().reply, lambda one, how: helper.reply_batch([CONVERSATIONS[1], one], how)):
        with pytest.raises(LlavaError) as caught:
            call(conversation, SHORT)  # raised before the first piece is asked for
        assert caught.value.code == code
        assert isinstance(caught.value, ContextError if code == "context_length_exceeded" else PromptError)


def test_a_reply_longer_than_the_room_left_is_refused_with_numbers(helper: Assistant) -> None:
    count = len(helper.processor.encode(CONVERSATIONS[0], learn=False).input_ids)
    with pytest.raises(ContextError) as caught:
        helper.reply(CONVERSATIONS[0], Sampling(max_new_tokens=1024 - count + 1))
    assert all(str(number) in str(caught.value) for number in (count, 16, 1024 - count + 1, 1024))


class Counter:
    """Counts what a model reads: positions through the decoder, views through the tower."""

    def __init__(self, helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
        self.positions = self.views = 0
        embed, encode = helper.model.embed, helper.model.encode_views

        def counted_embed(batch: Any) -> Tensor:
            self.positions += batch.input_ids.shape[1]
            return embed(batch)

        def counted_encode(views: Tensor) -> Tensor:
            self.views += len(views)
            return encode(views)

        monkeypatch.setattr(helper.model, "embed", counted_embed)
        monkeypatch.setattr(helper.model, "encode_views", counted_encode)

    def since(self) -> tuple[int, int]:
        counted, self.positions, self.views = (self.positions, self.views), 0, 0
        return counted


def _say(monkeypatch: pytest.MonkeyPatch, helper: Assistant, *replies: str) -> None:
    """From now on the model chooses these words: random weights would choose pieces that no tokenizer puts together that way."""
    end = [helper.processor.tokenizer.eos_token_id]
    script = iter([n for text in replies for n in helper.processor.tokenizer(text, add_special_tokens=False).input_ids + end])
    monkeypatch.setattr(generation, "sample", lambda scores, *_: torch.tensor([next(script)]))


def test_a_session_reads_nothing_twice(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = Counter(helper, monkeypatch)
    _say(monkeypatch, helper, "A red circle.", "There are three things.", "Yes.")
    session = helper.session()
    lengths = []
    for question, pictures in (("What is in the picture?", [RED]), ("How many things are there?", []), ("And here?", [BLUE])):
        before = session.tokens_read
        assert _text(session.ask(question, *pictures, sampling=SHORT))
        length = len(helper.processor.encode(Conversation(session.conversation.messages[:-1]), learn=False).input_ids)
        assert counter.since() == (length - before, len(pictures))
        lengths.append(length)
    assert lengths[0] > 16
    assert lengths[1] < 2 * lengths[0]
    assert [message.text for message in session.conversation.turns if message.role == "assistant"] == [
        "A red circle.",
        "There are three things.",
        "Yes.",
    ]


def test_a_session_replies_as_if_it_read_everything(helper: Assistant) -> None:
    session, history = helper.session(), Conversation(())
    for question, pictures in (("What is in the picture?", [RED]), ("Which one?", []), ("And here?", [BLUE, RED]), ("Yes or no?", [])):
        history = history.then(Conversation.ask(question, *pictures).messages[0])
        expected = _text(helper.reply(history, SHORT))
        assert _text(session.ask(question, *pictures, sampling=SHORT)) == expected
        history = history.then(assistant(expected))
        assert session.conversation == history


EDITS = st.sampled_from(["question", "picture", "reply", "drop a turn", "same", "add a picture", "other system"])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDITS, min_size=1, max_size=4))
def test_an_edited_history_is_read_from_the_edit_on(helper: Assistant, edits: list[str]) -> None:
    history = CONVERSATIONS[3]
    session = helper.session()
    for edit in ("same", *edits):
        history = _edited(history, edit)
        assert _text(session.reply(history, SHORT)) == _text(helper.reply(history, SHORT))


def _edited(history: Conversation, edit: str) -> Conversation:
    messages = list(history.messages)
    first = next(at for at, message in enumerate(messages) if message.role == "user")
    pictures = messages[first].images
    if edit == "question":
        messages[-1] = Message("user", (*messages[-1].images, Text("Is there a star?")))
    elif edit == "picture":
        messages[first] = user(*reversed(pictures), messages[first].text)
    elif edit == "add a picture":
        messages[first] = user(*pictures, BLUE, messages[first].text)
    elif edit == "reply" and len(messages) > first + 1:
        messages[first + 1] = assistant("Three green stars.")
    elif edit == "drop a turn" and len(messages) > first + 2:
        del messages[first + 1 : first + 3]
    elif edit == "other system":
        messages[:first] = [system("Be kind.")]
    return Conversation(tuple(messages))


def test_an_exchanged_picture_is_noticed_though_its_tokens_are_the_same(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, session = Counter(helper, monkeypatch), helper.session()
    _text(session.reply(Conversation.ask("What is in the picture?", RED), SHORT))
    counter.since()
    other = Conversation.ask("What is in the picture?", BLUE)
    start = helper.processor.encode(other, learn=False).input_ids.tolist().index(helper.processor.image_token_id)
    reply = _text(session.reply(other, SHORT))
    positions, views = counter.since()
    assert (positions, views) == (len(helper.processor.encode(other, learn=False).input_ids) - start, 1)
    assert reply == _text(helper.reply(other, SHORT))


def test_a_reply_left_in_the_middle_is_history_as_far_as_it_was_shown(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    _say(monkeypatch, helper, "There are three things.")
    session = helper.session()
    pieces = session.ask("How many?", sampling=SHORT)
    shown = next(pieces)
    assert session.conversation == Conversation(())
    _say(monkeypatch, helper, "Yes.")
    assert _text(session.ask("Really?", sampling=SHORT)) == "Yes."
    assert [message.text for message in session.conversation.messages] == ["How many?", shown, "Really?", "Yes."]
    assert list(pieces) == []
    unheard = session.ask("Nobody listens", sampling=SHORT)
    del unheard
    assert len(session.conversation.messages) == 4


def test_an_interrupted_reading_is_forgotten(helper: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    session = helper.session()
    _text(session.ask("Is there a star?", RED, sampling=SHORT))
    layer = helper.model.language_model.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            _text(session.ask("And now?", sampling=SHORT))
    assert session.tokens_read == 0
    history = session.conversation.then(user("And now?"))
    assert _text(session.ask("And now?", sampling=SHORT)) == _text(helper.reply(history, SHORT))


def _interrupt(*_: Any, **__: Any) -> Tensor:
    raise KeyboardInterrupt


def test_beams_in_a_session_read_everything_and_keep_the_history(helper: Assistant) -> None:
    session: Session = helper.session()
    sampling = SHORT.but(num_beams=2)
    first = _text(session.ask("What is in the picture?", RED, sampling=sampling))
    assert first == _text(helper.reply(Conversation.ask("What is in the picture?", RED), sampling))
    assert len(session.conversation.messages) == 2
    assert session.tokens_read == 0


def test_without_a_path_the_built_in_model_is_loaded(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    monkeypatch.setattr(places.resources, "files", lambda _: package)
    with pytest.raises(CheckpointError, match="not part of this installation"):
        Assistant.load()
    (package / "weights").mkdir(parents=True)
    (package / "weights" / "tiny").symlink_to(tiny_model_dir)
    assert Assistant.load(device="cpu").model.dtype == torch.float32
    assert Assistant.load(device="cpu", dtype="bf16").model.dtype == torch.bfloat16


def test_a_script_says_its_lines() -> None:
    script = ScriptedResponder(["one two", ""])
    pieces = list(script.reply(CONVERSATIONS[1]))
    assert pieces == ["one ", "two"]
    assert _text(script.reply(CONVERSATIONS[0])) == ""
    assert script.asked == [CONVERSATIONS[1], CONVERSATIONS[0]]
    with pytest.raises(PromptError, match="no reply left"):
        script.reply(CONVERSATIONS[0])
    with pytest.raises(PromptError, match="no reply is due"):
        script.reply(Conversation((user("hi"), assistant("ho"))))
