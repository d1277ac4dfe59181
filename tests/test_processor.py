"""Ids and labels: equal to transformers' on ordinary text, and true to the conversation on any text (spec 1.8, 3.3, 3.5, 3.6)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.errors import CheckpointError, ContextError, ImageError, PromptError
from llavakit.preprocess import Preprocess
from llavakit.processor import IGNORED, Inputs, Processor
from llavakit.prompts import TEMPLATES, spelled
from llavakit.tiling import Grid, Tiling
from llavakit.types import Conversation, Image, assistant, system, user
from picture_files import encoded, noise, png
from talks import PICTURES, conversations, ordinary, words
from tokenizers_for_tests import FAMILIES, family

TOKENIZERS = {name: family(name) for name in FAMILIES}
LOSSLESS = [name for name in FAMILIES if name != "unigram"]  # which knows no bytes
TOKENS = 4  # of a 28-pixel view in patches of 14


def make(name: str = "legacy", template: str = "vicuna_v1", **changes: Any) -> Processor:
    fields: dict[str, Any] = {"max_length": 100_000, "preprocess": Preprocess(size=28), "tiling": Tiling(side=28)}
    return Processor(tokenizer=TOKENIZERS[name], template=TEMPLATES[template], **fields | changes)


FORMATS = ["vicuna_v1", "llava_hf", "mistral_instruct", "llava_llama_2", "chatml_direct", "llava_v0"]
PROCESSORS = {(name, template): make(name, template) for name in FAMILIES for template in FORMATS}
families = pytest.mark.parametrize("name", FAMILIES)
lossless = pytest.mark.parametrize("name", LOSSLESS)
formats = pytest.mark.parametrize("template", FORMATS)


def expanded(processor: Processor, conversation: Conversation) -> list[int]:
    """What transformers makes of the same text, each picture's marker repeated."""
    text = spelled(processor.template.render(conversation)).replace("<image>", "<image>" * TOKENS)
    ids: list[int] = processor.tokenizer(text).input_ids
    return ids


def learned_runs(inputs: Inputs) -> list[list[int]]:
    pairs = zip(inputs.input_ids.tolist(), inputs.labels.tolist(), strict=True)
    return [[token for token, _ in run] for learned, run in groupby(pairs, lambda pair: pair[1] != IGNORED) if learned]


# Equal to transformers


# ChatML puts no blank before a reply: one that joins "assistant\n" is encoded apart here (module docstring of processor.py)
@families
@pytest.mark.parametrize("template", [template for template in FORMATS if template != "chatml_direct"])
@given(conversation=conversations(ordinary))
@settings(max_examples=40, deadline=None)
def test_ordinary_text_has_the_ids_of_transformers(name: str, template: str, conversation: Conversation) -> None:
    processor = PROCESSORS[name, template]
    assert processor.encode(conversation, learn=True).input_ids.tolist() == expanded(processor, conversation)
    asked = Conversation(conversation.messages[:-1])
    assert processor.encode(asked, learn=False).input_ids.tolist() == expanded(processor, asked)


@families
def test_plain_has_the_ids_of_transformers(name: str) -> None:
    processor = make(name, "plain")
    told = Conversation((user(PICTURES[0]), assistant("a red circle")))
    inputs = processor.encode(told, learn=True)
    assert inputs.input_ids.tolist() == expanded(processor, told)
    assert len(learned_runs(inputs)) == 1
    assert processor.decode(learned_runs(inputs)[0]).strip(" ") == "a red circle\n"


def test_where_the_blank_goes() -> None:
    """LLaMA's first tokenizers write a blank after a picture, later ones only at the very beginning (spec 8, trap 11)."""
    conversation = Conversation((system("Hi"), user(PICTURES[0], "\nHello"), assistant("x"), user("y")))
    for name, pictured in (("legacy", "▁"), ("metaspace", "\n")):
        processor = make(name)
        pieces = processor.tokenizer.convert_ids_to_tokens(processor.encode(conversation, learn=False).input_ids.tolist())
        assert pieces[pieces.index("<image>") + TOKENS] == pictured
        assert pieces[1].startswith("▁")
    original = make("metaspace", image_pieces="original")
    pieces = original.tokenizer.convert_ids_to_tokens(original.encode(conversation, learn=False).input_ids.tolist())
    assert pieces[pieces.index("<image>") + TOKENS] == "▁"
    assert pieces[pieces.index("</s>") + 1] != "▁USER"


@families
@given(conversation=conversations(ordinary, closed=False, systems=False))
@settings(max_examples=30, deadline=None)
def test_original_pieces_follow_the_specification(name: str, conversation: Conversation) -> None:
    """Spec 3.3: pieces between pictures tokenised one by one, the beginning token of all but the first dropped."""
    processor = make(name, image_pieces="original")
    pieces = [processor.tokenizer(piece).input_ids for piece in spelled(processor.template.render(conversation)).split("<image>")]
    begin = len(processor.tokenizer("").input_ids)
    wanted = pieces[0] + [token for piece in pieces[1:] for token in [processor.image_token_id] * TOKENS + piece[begin:]]
    assert processor.encode(conversation, learn=False).input_ids.tolist() == wanted


# True to the conversation


@lossless
@given(conversation=conversations(words))
@settings(max_examples=60, deadline=None)
def test_learned_tokens_spell_the_replies_and_their_ends(name: str, conversation: Conversation) -> None:
    processor = PROCESSORS[name, "vicuna_v1"]
    inputs = processor.encode(conversation, learn=True)
    replies = [message.text for message in conversation.turns if message.role == "assistant"]
    blank = " " if name == "bytes" else ""  # LLaMA's decoders take the first blank away
    assert [processor.decode(run, special=True) for run in learned_runs(inputs)] == [blank + r + processor.template.end for r in replies]
    assert all(label in (IGNORED, token) for token, label in zip(inputs.input_ids.tolist(), inputs.labels.tolist(), strict=True))


@lossless
@pytest.mark.parametrize("template", [template for template in FORMATS if template != "llava_hf"])
@given(conversation=conversations(words))
@settings(max_examples=20, deadline=None)
def test_every_format_learns_the_replies_and_their_ends(name: str, template: str, conversation: Conversation) -> None:
    processor = PROCESSORS[name, template]
    known = processor.template
    runs = [processor.decode(run, special=True) for run in learned_runs(processor.encode(conversation, learn=True))]
    replies = [message.text for message in conversation.turns if message.role == "assistant"]
    expected = [known.reply_space + reply + known.reply_end + known.end for reply in replies]
    assert all(run in (full, full.removeprefix(" ")) for run, full in zip(runs, expected, strict=True))


@lossless
@given(conversation=conversations(words))
@settings(max_examples=30, deadline=None)
def test_llava_hf_learns_the_replies_and_the_last_end(name: str, conversation: Conversation) -> None:
    processor = PROCESSORS[name, "llava_hf"]
    runs = learned_runs(processor.encode(conversation, learn=True))
    replies = [message.text for message in conversation.turns if message.role == "assistant"]
    ends = [""] * (len(replies) - 1) + [processor.template.end]
    blank = " " if name == "bytes" else ""
    assert [processor.decode(run, special=True) for run in runs] == [blank + r + end for r, end in zip(replies, ends, strict=True)]


@families
@formats
@given(conversation=conversations(words))
@settings(max_examples=40, deadline=None)
def test_ids_of_a_prompt_are_the_beginning_of_the_ids_learned(name: str, template: str, conversation: Conversation) -> None:
    processor = PROCESSORS[name, template]
    whole = processor.encode(conversation, learn=True)
    for count in range(1, len(conversation.messages)):
        part = Conversation(conversation.messages[:count])
        if part.open:
            asked = processor.encode(part, learn=False)
            length = len(asked.input_ids)
            assert asked.input_ids.tolist() == whole.input_ids[:length].tolist()
            assert whole.labels[length] != IGNORED
            assert (asked.labels == IGNORED).all()


@families
@formats
@given(conversation=conversations(words))
@settings(max_examples=40, deadline=None)
def test_no_text_becomes_a_special_token(name: str, template: str, conversation: Conversation) -> None:  # P3
    processor = PROCESSORS[name, template]
    inputs = processor.encode(conversation, learn=True)
    ids = inputs.input_ids.tolist()
    written = "".join(one.text for one in processor.template.render(conversation) if one.kind == "control")
    named = {token: processor.tokenizer.convert_ids_to_tokens(token) for token in processor.stop_ids}
    assert ids.count(processor.image_token_id) == sum(grid.tokens for grid in inputs.grids) == TOKENS * len(conversation.images)
    assert {token: ids.count(token) for token in named} == {token: written.count(name) for token, name in named.items()}
    begin = processor.tokenizer.bos_token_id
    assert begin is None or ids.count(begin) == 1 + written.count(processor.tokenizer.bos_token)


def test_a_reply_that_would_join_the_prompt_is_kept_apart() -> None:
    from dataclasses import replace

    chatml = replace(TEMPLATES["vicuna_v1"], user_end="<|im_end|>", reply_start="<|im_start|>assistant\n", reply_space="", end="<|im_end|>")
    processor = Processor(
        tokenizer=TOKENIZERS["bytes"], template=chatml, preprocess=Preprocess(size=28), tiling=Tiling(side=28), max_length=999
    )
    inputs = processor.encode(Conversation((user("Q"), assistant("\n\nA"))), learn=True)
    assert processor.decode(learned_runs(inputs)[0], special=True) == "\n\nA<|im_end|>"
    assert inputs.input_ids.tolist().count(processor.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 1


@pytest.mark.parametrize("text", ["\u202eright to left", "a\u200bb\ufeff", "🙂" * 50_000], ids=["rtl", "zero width", "200 kB of emoji"])
@lossless
def test_unusual_text_is_read_whole(name: str, text: str) -> None:  # P6
    processor = make(name, max_length=10**7)
    ids = processor.encode(Conversation((system(""), user(text))), learn=False).input_ids
    assert text in processor.decode(ids)


def test_the_end_is_one_the_tokenizer_knows() -> None:
    assert make("legacy").template.end == "</s>"
    processor = make("bytes")
    assert processor.template.end == "<|im_end|>"
    assert processor.template.stop == ("<|im_end|>",)
    assert processor.stop_ids == {processor.tokenizer.eos_token_id}
    assert make("bytes", "plain").template.end == "\n"


# Views, lengths, batches


def test_views_and_grids_follow_the_pictures() -> None:
    processor = make()
    inputs = processor.encode(Conversation((user(PICTURES[0], "a", PICTURES[1]), assistant("b"), user(PICTURES[2]))), learn=False)
    assert inputs.views.shape == (3, 3, 28, 28)
    assert inputs.grids == (Grid.single(28),) * 3
    alone = [processor.encode(Conversation.ask("?", picture), learn=False).views[0] for picture in PICTURES]
    assert torch.equal(inputs.views, torch.stack(alone))
    assert processor.encode(Conversation.ask("?"), learn=False).views.shape == (0, 3, 28, 28)
    assert (
        make(tiling=Tiling(side=28, class_token=True)).encode(Conversation.ask("?", PICTURES[0]), learn=False).grids[0].tokens == TOKENS + 1
    )


@given(room=st.integers(0, 50), spare=st.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_what_does_not_fit_is_refused_with_numbers(room: int, spare: int) -> None:  # P4
    conversation = Conversation.ask("How many?", PICTURES[0])
    count = len(make().encode(conversation, learn=False).input_ids)
    processor = make(max_length=count + room + spare)
    if spare >= 0:
        assert len(processor.encode(conversation, learn=False, room=room).input_ids) == count
        return
    with pytest.raises(ContextError) as caught:
        processor.encode(conversation, learn=False, room=room)
    assert caught.value.code == "context_length_exceeded"
    for number in (count, TOKENS, processor.max_length):
        assert str(number) in str(caught.value)


def test_length_is_checked_before_any_picture_is_opened() -> None:  # I17
    broken = Conversation.ask("?" * 500, Image(b"no picture"))
    with pytest.raises(ContextError):
        make(max_length=100).encode(broken, learn=False)
    with pytest.raises(ImageError):
        make().encode(broken, learn=False)
    with pytest.raises(ImageError):
        make().encode(Conversation.ask("?", Image(png(9000, 9000))), learn=False)


def test_tiles_are_counted_and_bounded_before_any_picture_is_opened() -> None:  # I17
    tiling = Tiling(side=28, canvases=((56, 56), (28 * 20, 28 * 20)), merge="spatial_unpad")
    huge, hollow = (Conversation.ask("?", Image(png(side, side))) for side in (100_000, 8000))
    with pytest.raises(ContextError):  # 1600 features of 400 tiles; its data are not there
        make(tiling=tiling, max_length=1000).encode(hollow, learn=False)
    for conversation, code in ((huge, "image_too_many_pixels"), (hollow, "image_truncated")):
        with pytest.raises(ImageError) as caught:
            make(tiling=tiling).encode(conversation, learn=False)
        assert caught.value.code == code


def test_the_broken_picture_is_named_by_its_place_or_file(tmp_path: Any) -> None:
    for image, where in ((Image(b"broken"), "images[1]"), (Image(tmp_path / "none.png"), str(tmp_path / "none.png"))):
        with pytest.raises(ImageError) as caught:
            make().encode(Conversation.ask("?", PICTURES[0], image), learn=False)
        assert caught.value.where == where


def test_a_reply_to_learn_and_a_question_to_answer() -> None:  # P9
    asked = Conversation((system("S"), user("Q")))
    told = asked.then(assistant("A"))
    for conversation, learn, code, where in ((asked, True, "no_reply", "messages[1]"), (told, False, "no_question", "messages[2]")):
        with pytest.raises(PromptError) as caught:
            make().encode(conversation, learn=learn)
        assert (caught.value.code, caught.value.where) == (code, where)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_pad_where_they_are_told(side: Any) -> None:
    processor = make()
    talks = [Conversation.ask(text, *pictures) for text, pictures in (("a", PICTURES[:2]), ("a longer question", ()), ("b", PICTURES[2:]))]
    rows = [processor.encode(talk, learn=False) for talk in talks]
    rows.append(processor.encode(talks[1].then(assistant("reply")), learn=True))
    batch = processor.collate(rows, side=side)
    longest = max(len(row.input_ids) for row in rows)
    assert batch.input_ids.shape == batch.labels.shape == batch.mask.shape == batch.positions.shape == (4, longest)
    for index, row in enumerate(rows):
        count = len(row.input_ids)
        real = batch.mask[index]
        assert real.tolist() == ([True] * count + [False] * (longest - count))[:: 1 if side == "right" else -1]
        assert torch.equal(batch.input_ids[index][real], row.input_ids)
        assert torch.equal(batch.labels[index][real], row.labels)
        assert (batch.labels[index][~real] == IGNORED).all()
        assert batch.positions[index][real].tolist() == list(range(count))
        assert (batch.positions[index][~real] == 0).all()
    assert torch.equal(batch.views, torch.cat([row.views for row in rows]))
    assert len(batch.grids) == 3
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.views.dtype == torch.bfloat16
    assert moved.input_ids.dtype == torch.long


def test_a_tokenizer_without_the_image_token_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        make(image_token="<picture>")
    assert caught.value.code == "image_token_missing"


# The cache of views


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many views were made since."""
    calls: list[None] = []
    views = Preprocess.views
    monkeypatch.setattr(Preprocess, "views", lambda self, image, canvas: (calls.append(None), views(self, image, canvas))[1])
    return lambda: len(calls)


def test_the_same_picture_is_made_once_whoever_sends_it(counted: Callable[[], int], tmp_path: Any) -> None:  # I18
    data = encoded(noise(40, 30), "PNG")
    file = tmp_path / "other name.png"
    file.write_bytes(data)
    processor = make()
    for index in range(1000):
        processor.encode(Conversation.ask(f"{index}?", Image(file if index % 2 else data)), learn=False)
    assert counted() == 1
    file.write_bytes(encoded(noise(40, 30, seed=1), "PNG"))  # the name stays, the content does not
    changed = processor.encode(Conversation.ask("?", Image(file)), learn=False)
    assert counted() == 2
    assert not torch.equal(changed.views, processor.encode(Conversation.ask("?", Image(data)), learn=False).views)


def test_training_keeps_nothing(counted: Callable[[], int]) -> None:
    processor = make()
    for _ in range(3):
        processor.encode(Conversation.ask("?", PICTURES[0]).then(assistant("!")), learn=True)
    assert counted() == 3
    assert processor.cache.held == 0


def test_the_cache_is_bounded_in_bytes_and_forgets_the_oldest(counted: Callable[[], int]) -> None:  # I18
    view = 3 * 28 * 28 * 4
    processor = make(cache_bytes=10 * view)
    pictures = [Image(encoded(noise(5, 5, seed=seed), "PNG")) for seed in range(30)]
    for picture in pictures:
        processor.encode(Conversation.ask("?", pictures[0], picture), learn=False)
        assert processor.cache.held <= 10 * view
    assert counted() == 30  # the first, used all the time, stayed
    processor.encode(Conversation.ask("?", pictures[29]), learn=False)
    assert counted() == 30
    processor.encode(Conversation.ask("?", pictures[15]), learn=False)
    assert counted() == 31
    none = make(cache_bytes=0)
    for _ in range(2):
        none.encode(Conversation.ask("?", pictures[0]), learn=False)
    assert counted() == 33


def test_changing_the_views_of_one_reply_does_not_change_the_next() -> None:
    processor = make()
    first = processor.encode(Conversation.ask("?", PICTURES[0]), learn=False)
    kept = first.views.clone()
    first.views.zero_()
    assert torch.equal(processor.encode(Conversation.ask("?", PICTURES[0]), learn=False).views, kept)


@families
def test_a_processor_travels_to_another_process(name: str) -> None:
    processor = make(name)
    conversation = Conversation.ask("What?", PICTURES[0])
    here = processor.encode(conversation, learn=False)
    there = pickle.loads(pickle.dumps(processor))
    assert there.cache.held == 0
    assert torch.equal(there.encode(conversation, learn=False).input_ids, here.input_ids)
