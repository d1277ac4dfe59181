"""The travelling values: pictures keep what they are, formats round-trip, and wrong orders are refused with their index."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from llavakit.errors import PromptError, SamplingError
from llavakit.images import open_image
from llavakit.types import Conversation, Image, Message, Pixels, Sampling, Text, assistant, decode_data_url, system, user

plain = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40).filter(lambda t: "<image>" not in t)


def test_a_pil_image_means_the_same_as_its_file() -> None:
    """Transparency and 16 bits follow the one rule of open_image, never PIL's convert (hardening I9, I10)."""
    clear = Pillow.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(Image.of(clear)).getpixel((0, 0)) == (255, 255, 255)
    deep = Pillow.fromarray(np.full((4, 4), 300, dtype=np.uint16))
    assert open_image(Image.of(deep)).getpixel((0, 0)) == (1, 1, 1)
    grey = Pillow.new("L", (3, 2), 7)
    assert Image.of(grey) == Image(Pixels(3, 2, bytes([7] * 18)))
    assert hash(Image.of(grey)) == hash(Image.of(grey.copy()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(plain, plain), min_size=1, max_size=4))
def test_llava_json_comes_back(turns: list[tuple[str, str]]) -> None:
    messages = [m for question, reply in turns for m in (user(question or "?"), assistant(reply or "."))]
    first = Message("user", (Image.of("a.jpg"), *messages[0].parts))
    conversation = Conversation((first, *messages[1:]))
    assert Conversation.from_llava(conversation.to_llava(image_names=["a.jpg"])) == conversation


def test_markers_and_images_must_agree() -> None:
    record = {"image": "a.jpg", "conversations": [{"from": "human", "value": "no marker"}, {"from": "gpt", "value": "."}]}
    with pytest.raises(PromptError) as caught:
        Conversation.from_llava(record)
    assert caught.value.code == "image_count"
    assert "0 <image> markers but 1 images" in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ((user("a"), user("b")), "messages[1]"),
        ((assistant("a"),), "messages[0]"),
        ((user("a"), system("b")), "messages[1]"),
        ((system("s"), assistant("a")), "messages[1]"),
        ((Message("tool", (Text("a"),)),), "messages[0]"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_order_names_its_index(messages: tuple[Message, ...], where: str) -> None:
    with pytest.raises(PromptError) as caught:
        Conversation(messages)
    assert caught.value.where == where


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_what_is_no_character_is_refused(text: str) -> None:
    with pytest.raises(PromptError) as caught:
        Conversation.ask(text)
    assert caught.value.code == "bad_characters"


def test_openai_messages_come_back() -> None:
    conversation = Conversation((system("be brief"), user(Image(b"abc"), Text("what?")), assistant("a cat")))
    assert Conversation.from_openai(conversation.to_openai()) == conversation


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "image_bad_data_url"),
        ("data:image/png,abc", "image_bad_data_url"),
        ("http://example.org/a.png", "image_bad_data_url"),
        ("data:image/png;base64,ab c=", "image_bad_base64"),
        ("data:image/png;base64,ab_-", "image_bad_base64"),
        ("data:image/png;base64,abc", "image_bad_base64"),
    ],
)
def test_data_urls_are_read_strictly(url: str, code: str) -> None:
    from llavakit.errors import ImageError

    with pytest.raises(ImageError) as caught:
        decode_data_url(url)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")), ("temperature", -1), ("temperature", 1e9), ("top_p", 0), ("top_p", 1.5), ("max_new_tokens", 0),
        ("max_new_tokens", -1), ("max_new_tokens", 10**9), ("seed", 2**64), ("num_beams", 0), ("stop", ("",)), ("stop", ("x",) * 17),
    ],
)  # fmt: skip
def test_sampling_names_the_parameter(field: str, value: object) -> None:
    with pytest.raises(SamplingError) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.where == field
