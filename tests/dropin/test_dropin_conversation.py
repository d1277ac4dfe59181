"""The old conversations write what llavakit's templates write, and what the specification says where there is no template."""

from __future__ import annotations

import base64
import io
import json

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava.conversation import SeparatorStyle, conv_templates, default_conversation
from llavakit.errors import PromptError
from llavakit.prompts import CURIOUS_HUMAN, TEMPLATES, spelled
from llavakit.types import Conversation, Image, Pixels, assistant, user

BOTH = sorted(set(TEMPLATES) & set(conv_templates) - {"plain"})  # stage 1 drops what the user says; the old class writes it
IMAGE = Image(Pixels(width=1, height=1, rgb=bytes(3)))
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


def prompt(name: str, *said: str | None) -> str:
    conversation = conv_templates[name].copy()
    for index, text in enumerate(said):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


def test_vicuna_is_the_default() -> None:
    assert {"vicuna_v1", "llava_v1"} <= set(BOTH)
    assert default_conversation is conv_templates["vicuna_v1"] is conv_templates["v1"]


@pytest.mark.parametrize("name", BOTH)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), last=WORDS)
def test_prompts_equal_our_templates(name: str, turns: list[tuple[str, str]], last: str) -> None:
    messages = [part for question, reply in turns for part in (user(question), assistant(reply))]
    messages[0] = user(IMAGE, "\n" + turns[0][0])
    said = [text for turn in turns for text in turn]
    said[0] = "<image>\n" + said[0]
    assert prompt(name, *said) == spelled(TEMPLATES[name].render(Conversation(tuple(messages))))
    asked = Conversation((*messages, user(last)))
    assert prompt(name, *said, last, None) == spelled(TEMPLATES[name].render(asked))


LLAVA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("mistral_instruct", "[INST] Q [/INST]", " A </s>[INST] R [/INST]"),
        ("llava_llama_2", f"[INST] <<SYS>>\n{LLAVA_2}\n<</SYS>>\n\nQ [/INST]", " A </s><s>[INST] R [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n",
            "A<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\n",
        ),
        ("llava_v0", f"{CURIOUS_HUMAN}###Human: Q###Assistant:", " A###Human: R###Assistant:"),
        ("llava_v1", f"{CURIOUS_HUMAN} USER: Q ASSISTANT:", " A</s>USER: R ASSISTANT:"),
    ],
)
def test_prompts_of_the_specification(name: str, one: str, two: str) -> None:
    assert prompt(name, "Q", None) == one
    assert prompt(name, "Q", "A", "R", None) == one + two


@pytest.mark.parametrize("name", sorted(conv_templates))
@given(question=WORDS, reply=WORDS)
def test_an_open_prompt_begins_the_closed_one(name: str, question: str, reply: str) -> None:
    assert prompt(name, question, reply).startswith(prompt(name, question, None))


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_a_copy_is_written_to_and_a_template_is_not(name: str) -> None:
    template = conv_templates[name]
    first, second = template.copy(), template.copy()
    first.append_message(first.roles[0], "Q")
    first.append_message(first.roles[1], None)
    first.messages[-1][-1] = "A"
    assert second.messages == []
    assert (second.system, second.roles, second.sep, second.sep2, second.version) == (
        template.system, template.roles, template.sep, template.sep2, template.version,
    )  # fmt: skip
    with pytest.raises(AttributeError):
        template.append_message("USER", "Q")


def test_a_bracketed_conversation_begins_with_the_user() -> None:
    with pytest.raises(PromptError, match="first message"):
        prompt("mistral_instruct", None)


def test_a_picture_held_by_a_message_is_written_before_its_words() -> None:
    picture = PIL.Image.new("RGB", (4, 2))
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message("USER", ("Why? <image>", picture, "Default"))
    conversation.append_message("ASSISTANT", None)
    assert conversation.get_prompt() == prompt("vicuna_v1", "<image>\nWhy?", None)
    conversation.version = "v1_mmtag"
    assert conversation.get_prompt() == prompt("vicuna_v1", "<Image><image></Image>", "Received.", "Why?", None)


@pytest.mark.parametrize(
    ("size", "mode", "shown"),
    [
        ((300, 200), "Default", (300, 200)),
        ((300, 200), "Crop", (300, 200)),
        ((300, 200), "Pad", (300, 300)),
        ((300, 200), "Resize", (336, 336)),
        ((2000, 1000), "Default", (1344, 672)),
        ((1000, 2000), "Default", (672, 1344)),
        ((4000, 1000), "Default", (1344, 336)),
        ((1500, 1400), "Default", (720, 672)),
    ],
)
def test_pictures_as_the_page_shows_them(size: tuple[int, int], mode: str, shown: tuple[int, int]) -> None:
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message("USER", ("Why?", PIL.Image.new("RGB", size, "red"), mode))
    (picture,) = conversation.get_images(return_pil=True)
    (text,) = conversation.get_images()
    sent = PIL.Image.open(io.BytesIO(base64.b64decode(text)))
    assert picture.size == sent.size == shown
    assert (sent.format, sent.tobytes()) == ("PNG", picture.tobytes())
    if mode == "Pad":
        assert picture.getpixel((0, 0)) == (122, 116, 104)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="image_process_mode"):
        conv_templates["v1"].process_image(PIL.Image.new("RGB", (1, 1)), "Stretch")


def test_a_log_keeps_words_and_a_page_shows_pairs() -> None:
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message("USER", ("<image>\nWhy?", PIL.Image.new("RGB", (4, 2)), "Default"))
    conversation.append_message("ASSISTANT", "So.")
    conversation.append_message("USER", "And?")
    conversation.append_message("ASSISTANT", None)
    assert json.loads(json.dumps(conversation.dict()))["messages"][0] == ["USER", "<image>\nWhy?"]
    (asked, replied), rest = conversation.to_gradio_chatbot()
    assert asked is not None
    assert asked.startswith('<img src="data:image/jpeg;base64,')
    assert asked.endswith("/>Why?")
    assert (replied, rest) == ("So.", ["And?", None])


def test_every_style_is_used() -> None:
    assert {template.sep_style for template in conv_templates.values()} == set(SeparatorStyle)
