"""A reply that is begun: its ids are those of training, what follows is what would have followed, and two passes are built on that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llavakit.assistant import Assistant
from llavakit.chat_template import JinjaTemplate
from llavakit.errors import PromptError
from llavakit.eval.answers import match, read
from llavakit.eval.benchmark import Protocol, Question
from llavakit.eval.harness import Job, by_model
from llavakit.eval.run_folder import Run
from llavakit.eval.scienceqa import extract
from llavakit.eval.two_pass import TwoPass
from llavakit.model import generation
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES, spelled
from llavakit.scenes.draw import draw
from llavakit.scenes.world import make_scene
from llavakit.text_stream import TextStream, finished_text, held_ids, text_behind
from llavakit.tiling import Tiling
from llavakit.types import Conversation, Image, Sampling, assistant, user
from talks import conversations, ordinary, words
from tokenizers_for_tests import FAMILIES, family

SHORT = Sampling(max_new_tokens=24)
TOKENIZERS = {name: family(name) for name in FAMILIES}
EXACT = ["vicuna_v1", "llava_hf", "chatml_direct"]  # a special token ends a reply, and nothing stands before it
JOINED = ["mistral_instruct", "llava_llama_2", "llava_v0"]  # ordinary characters follow, which a tokenizer may join


def make(name: str, template: str) -> Processor:
    made: dict[str, Any] = {"max_length": 100_000, "preprocess": Preprocess(size=28), "tiling": Tiling(side=28)}
    return Processor(tokenizer=TOKENIZERS[name], template=TEMPLATES[template], **made)


PROCESSORS = {(name, template): make(name, template) for name in FAMILIES for template in (*EXACT, *JOINED)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("template", EXACT)
@given(conversation=conversations(words))
@settings(max_examples=25, deadline=None)
def test_a_begun_reply_has_the_ids_it_is_trained_on_but_for_the_end(name: str, template: str, conversation: Conversation) -> None:
    if name == "unigram" and any(control in str(conversation) for control in ("</s>", "<unk>", "<s>")):
        return
    processor = PROCESSORS[name, template]
    begun, told = processor.encode(conversation, learn=False, begun=True), processor.encode(conversation, learn=True)
    asked = processor.encode(Conversation(conversation.messages[:-1]), learn=False).input_ids.tolist()
    if not conversation.messages[-1].text:
        assert begun.input_ids.tolist() == asked
        return
    assert begun.input_ids.tolist() == told.input_ids.tolist()[:-1]
    assert begun.labels.tolist() == told.labels.tolist()[:-1]
    assert begun.input_ids.tolist()[: len(asked)] == asked


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("template", JOINED)
@given(conversation=conversations(ordinary))
@settings(max_examples=25, deadline=None)
def test_where_more_characters_end_a_reply_the_ids_are_those_of_the_text_without_them(
    name: str, template: str, conversation: Conversation
) -> None:
    processor = PROCESSORS[name, template]
    text = spelled(processor.template.render(conversation, begun=True))
    assert text.endswith(conversation.messages[-1].text)
    assert processor.template.render(conversation)[: len(processor.template.render(conversation, begun=True))] == (
        processor.template.render(conversation, begun=True)
    )
    ids = processor.encode(conversation, learn=False, begun=True).input_ids.tolist()
    assert ids == processor.tokenizer(text.replace("<image>", "<image>" * 4)).input_ids


def test_a_published_chat_template_stops_there_too() -> None:
    source = "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{%- endfor -%}"
    template = JinjaTemplate(name="published", end="<|im_end|>", source=source)
    talk = Conversation((user("Q"), assistant("A"), user("Why?"), assistant("So <|im_end|>")))
    shown = template.render(talk, begun=True)
    assert shown[-1].kind == "text"
    assert spelled(shown) + "<|im_end|>" == spelled(template.render(talk)).rstrip("\n")


def test_what_is_not_begun_cannot_go_on() -> None:
    processor = PROCESSORS["legacy", "vicuna_v1"]
    with pytest.raises(PromptError) as caught:
        processor.encode(Conversation((user("Q"),)), learn=False, begun=True)
    assert (caught.value.code, caught.value.where) == ("no_reply", "messages[0]")


# ---- what follows


@given(data=st.data(), name=st.sampled_from(["legacy", "bytes"]), stop=st.lists(st.sampled_from(["###", " a", "\n", "e"]), max_size=2))
@settings(max_examples=200, deadline=None)
def test_joined_pieces_are_the_text_behind_what_was_said(data: st.DataObject, name: str, stop: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    held = held_ids(tokenizer.get_vocab(), tokenizer.added_tokens_decoder)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    said = tokenizer(data.draw(ordinary), add_special_tokens=False).input_ids
    ids = tokenizer(data.draw(ordinary), add_special_tokens=False).input_ids
    stream = TextStream(decode, held=held, stop=stop, said=said)
    pieces = [*(stream.push(number) for number in ids), stream.finish()]
    assert "".join(pieces) == finished_text(text_behind(said, ids, decode), stop, begun=True)


@pytest.fixture(scope="module")
def seeing() -> Assistant:
    """The built-in model: what it writes is text that its tokenizer cuts as it does (mostly)."""
    return Assistant.load(device="cpu", dtype="float32")


SCENES = [Conversation.ask("Describe the picture.", draw(make_scene(seed))) for seed in (3, 8)]


@pytest.mark.parametrize("conversation", SCENES)
def test_a_greedy_reply_goes_on_from_its_own_beginning(seeing: Assistant, conversation: Conversation) -> None:
    """Wherever the tokenizer cuts the beginning as the model wrote it."""
    processor = seeing.processor
    asked = processor.encode(conversation, learn=False)
    batch = processor.collate([asked], side="left")
    (ids,) = generation.generate(seeing.model, batch, sampling=SHORT, stop_ids=seeing.stop_ids)
    whole = seeing.reply_batch([conversation], SHORT)[0]
    begun, rests = [], []
    for cut in range(1, len(ids)):
        text = processor.decode(ids[:cut])
        one = conversation.then(assistant(text))
        if text and whole.startswith(text) and processor.encode(one, learn=False, begun=True).input_ids.tolist() == [
            *asked.input_ids.tolist(), *ids[:cut],
        ]:  # fmt: skip
            begun.append(one)
            rests.append((whole[len(text) :], len(ids) - cut))
    assert len(begun) >= 5, "the law would say nothing"
    for one, (rest, room) in zip(begun, rests, strict=True):
        assert "".join(seeing.reply(one, SHORT.but(max_new_tokens=room), begun=True)) == rest
    assert any(rest.startswith(" ") for rest, _ in rests)  # the blank in front is not lost
    longest = seeing.reply_batch(begun, SHORT, begun=True)
    assert all(more.startswith(rest) for more, (rest, _) in zip(longest, rests, strict=True))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(ordinary, min_size=2, max_size=4), stop=st.lists(st.sampled_from(["a", "e ", "\n"]), max_size=2))
@pytest.mark.parametrize("beams", [1, 2])
def test_begun_replies_go_on_alone_as_together(helper: Assistant, texts: list[str], stop: list[str], beams: int) -> None:
    sampling = Sampling(max_new_tokens=8, stop=tuple(stop), num_beams=beams)
    begun = [Conversation.ask("Which one?").then(assistant(text)) for text in texts]
    assert helper.reply_batch(begun, sampling, begun=True) == ["".join(helper.reply(one, sampling, begun=True)) for one in begun]


def test_nothing_begun_is_the_open_question(helper: Assistant) -> None:
    question = Conversation.ask("Which one?")
    assert helper.reply_batch([question.then(assistant(""))], SHORT, begun=True) == helper.reply_batch([question], SHORT)


# ---- two passes


class Told:
    """Says what it is told to, and remembers how it was asked."""

    def __init__(self, *batches: list[str]) -> None:
        self.batches = list(batches)
        self.asked: list[tuple[list[Conversation], Sampling]] = []
        self.begun: list[Conversation] = []

    def encode(self, conversation: Conversation, sampling: Sampling, *, begun: bool = False) -> Conversation:
        self.begun += [conversation] if begun else []
        return conversation

    def reply_encoded(self, encoded: Sequence[Conversation], sampling: Sampling) -> list[str]:
        self.asked.append((list(encoded), sampling))
        return self.batches.pop(0)


def test_the_second_pass_goes_on_behind_the_reasons() -> None:
    told = Told(["LECTURE: L.\nSOLUTION: S.", ""], [" B.", " C "])
    questions = [Conversation.ask("Which?"), Conversation.ask("Why?")]
    sampling = Sampling(max_new_tokens=1024, temperature=0.7, seed=1)
    asks = TwoPass(told)
    said = asks.reply_encoded([asks.encode(one, sampling) for one in questions], sampling)
    assert said == ["LECTURE: L.\nSOLUTION: S.\n The answer is B.", "\n The answer is C"]
    assert [extract(text) for text in said] == ["B", "FAILED"]  # the full stop is the model's to write, as in the original
    (first, how), (second, then) = told.asked
    assert (first, told.begun) == (questions, second)
    assert [one.messages[-1].text for one in second] == ["LECTURE: L.\nSOLUTION: S. ###\nANSWER:", " ###\nANSWER:"]
    assert [Conversation(one.messages[:-1]) for one in second] == questions
    assert (how.max_new_tokens, then.max_new_tokens) == (1024, 64)
    assert how.but(max_new_tokens=64) == then
    assert how.stop == ("###",)
    assert (how.temperature, how.seed) == (0.7, 1)


def test_one_question_is_a_batch_of_one() -> None:
    assert list(TwoPass(Told(["S."], ["A."])).reply(Conversation.ask("Which?"))) == ["S.\n The answer is A."]


def test_the_harness_asks_two_passes_like_any_model(seeing: Assistant, tmp_path: Path) -> None:
    """In a run's folder, whatever shares a batch with whom."""
    protocol = Protocol(name="v0", max_new_tokens=12, passes=2)
    questions = [
        Question(id=str(seed), given=seed, prompt=f"Describe the picture{'!' * seed}", image=Image.of(draw(make_scene(seed))))
        for seed in range(5)
    ]
    run = Run(
        benchmark="scienceqa", protocol=protocol, model="tiny", prompts_sha256="0", questions=5, asked=5, versions={}, date="2026-11-21"
    )
    by_model(Job(questions=questions, run=run, out=tmp_path / "run"), TwoPass(seeing), batch=2)
    answered = match(questions, read(tmp_path / "run" / "answers.jsonl")).answered
    for one in answered:
        assert one.text == "".join(TwoPass(seeing).reply(one.question.conversation(), protocol.sampling))


def test_two_passes_of_a_model_are_its_two_replies(seeing: Assistant) -> None:
    sampling = Sampling(max_new_tokens=12)
    asks = TwoPass(seeing)
    said = asks.reply_encoded([asks.encode(one, sampling) for one in SCENES], sampling)
    reasons = seeing.reply_batch(SCENES, sampling.but(stop=("###",)))
    assert all(text.startswith(reason + "\n The answer is") for text, reason in zip(said, reasons, strict=True))
