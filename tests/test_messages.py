"""Laws of ``messages``: LLaVA's way and HF's say the same, and the way there and back loses nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.data.messages import normal, to_llava, to_messages
from llavakit.data.rules import examine
from llavakit.data.sources import read_llava
from llavakit.errors import DataError
from llavakit.types import Conversation, Image, Text

WORDS = st.text(st.sampled_from("ab <image>\n\u2028é"), max_size=12) | st.sampled_from(["", "<image>", "a<image>", "<image>\nWhat?"])
NAMES = st.sampled_from(["a.png", "b/c.jpg", "d"])
OTHERS = st.dictionaries(st.sampled_from(["model", "source", "weight"]), st.none() | st.integers() | st.text(max_size=3), max_size=2)
IDS = st.integers() | st.text(max_size=4) | st.none()


@st.composite
def llava_records(draw: st.DrawFn) -> dict[str, Any]:
    """Records as people write them: ids of any kind, further keys, a system's turn, markers where they please."""
    asked = [draw(WORDS) for _ in range(draw(st.integers(1, 3)))]
    turns = [{"from": "system", "value": draw(WORDS)}] * draw(st.integers(0, 1))
    for question in asked:
        turns += [{"from": "human", "value": question} | draw(OTHERS), {"from": "gpt", "value": draw(WORDS)} | draw(OTHERS)]
    count = sum(question.count("<image>") for question in asked)
    names = draw(st.lists(NAMES, min_size=count, max_size=count))
    image: Any = names[0] if count == 1 and draw(st.booleans()) else names or draw(st.sampled_from([[], None]))
    held = {"image": image} if names or draw(st.booleans()) else {}
    return draw(OTHERS) | {"id": draw(IDS), **held, "conversations": turns}


PART = st.builds(lambda text: {"type": "text", "text": text}, st.text("ab <>", max_size=5)) | st.just({"type": "image"})


@st.composite
def message_records(draw: st.DrawFn) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        content = draw(st.text("ab ", max_size=5) | st.lists(PART, max_size=4))
        told += [{"role": "user", "content": content}, {"role": "assistant", "content": draw(st.text("ab ", max_size=5))} | draw(OTHERS)]
    count = sum(part["type"] == "image" for message in told for part in message["content"] if isinstance(part, dict))
    names = draw(st.lists(NAMES, min_size=count, max_size=count))
    held = {"image": names[0]} if count == 1 and draw(st.booleans()) else {"images": names} if names else {}
    return draw(OTHERS) | {"id": draw(IDS)} | held | {"messages": told}


@settings(deadline=None)
@given(llava_records())
def test_llava_there_and_back_is_the_same(record: dict[str, Any]) -> None:
    before = copy.deepcopy(record)
    assert to_llava(json.loads(json.dumps(to_messages(record)))) == record
    assert record == before, "the caller's record is the caller's"


@settings(deadline=None)
@given(message_records())
def test_messages_there_and_back_are_the_same_in_their_normal_form(record: dict[str, Any]) -> None:
    before = copy.deepcopy(record)
    plain = normal(record)
    assert normal(plain) == plain
    assert to_messages(to_llava(record)) == plain
    assert record == before


@settings(deadline=None)
@given(llava_records())
def test_both_ways_are_the_same_sample_to_training(record: dict[str, Any]) -> None:
    """Also what is wrong with it: the same findings, but for the words that name a place."""
    one, other = (examine(r, where="x", allow_outside=True) for r in (record, to_messages(record)))
    assert spoken(one.conversation) == spoken(other.conversation)
    assert one.id == other.id
    assert [finding.code for finding in one.findings] == [finding.code for finding in other.findings]


def spoken(conversation: Conversation | None) -> Any:
    """Without texts of no characters, which one side writes and the other leaves out."""
    messages = conversation.messages if conversation else ()
    return [(message.role, [part for part in message.parts if part != Text("")]) for message in messages]


def contents(record: dict[str, Any]) -> Any:
    return normal(record)["messages"][0]["content"]


def said(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "b"}]


def test_pictures_without_a_place_stand_before_the_first_users_words() -> None:
    told = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    record = normal({"images": ["1", "2"], "messages": told})
    assert record["messages"][1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\na"}]
    assert to_llava(record)["conversations"][1]["value"] == "<image><image>\na"


def test_the_spellings_of_tables_and_of_chats() -> None:
    """Columns give every part every key; ``index`` says which picture; a picture may stand in its part."""
    text = {"type": "text", "text": "a", "index": None}
    placed = normal(
        {"images": ["1", "2"], "messages": said({"type": "image", "text": None, "index": 1}, text, {"type": "image", "index": 0})}
    )
    assert placed["images"] == ["2", "1"]
    assert contents(placed) == [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]
    inside = normal({"messages": said({"type": "image", "image": "1"}, {"type": "image_url", "image_url": {"url": "data:x"}})})
    assert inside["images"] == ["1", "data:x"]


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"messages": []}, "no_turns"),
        ({"messages": [7]}, "bad_record"),
        ({"messages": [{"content": "a"}]}, "bad_record"),
        ({"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}, "bad_content"),
        ({"messages": said({"type": "sound"})}, "bad_content"),
        ({"messages": said({"type": "text", "text": None})}, "bad_content"),
        ({"messages": said(7)}, "bad_content"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown_role"),
        ({"messages": said({"type": "image"})}, "image_count"),
        ({"messages": said({"type": "image", "index": 4}), "images": ["1"]}, "image_count"),
        ({"messages": said({"type": "text", "text": "a"}), "images": ["1"]}, "image_count"),
        ({"messages": said("a"), "images": ["1"]}, "bad_content"),
        ({"messages": said({"type": "image"}), "images": ["../1"]}, "image_outside"),
        ({"messages": said({"type": "image"}), "images": [7]}, "bad_record"),
        ({"messages": said({"type": "image"}), "images": ["data:image/png;base64,?"]}, "image_bad_base64"),
        ({"messages": [*said({"type": "text", "text": "a"}), *said()[:1]]}, "open_conversation"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}, "empty_reply"),
        ({"messages": [said()[0], {"role": "assistant", "content": [{"type": "image"}]}], "images": ["1"]}, "image_not_from_user"),
        ({"messages": [*said({"type": "text", "text": "a"}), {"role": "assistant", "content": "c"}]}, "bad_turn_order"),
    ],
)
def test_messages_that_cannot_be_used(record: dict[str, Any], code: str) -> None:
    found = examine({"id": 1} | record, where="x:1")
    assert found.fault is not None
    assert (found.fault.code, found.fault.where.split(" messages")[0]) == (code, "x:1 (id 1)")


def test_what_llava_cannot_say_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        to_llava({"messages": said({"type": "text", "text": "the word <image>"})})
    assert caught.value.code == "marker_in_text"
    for convert in (to_llava, to_messages):
        with pytest.raises(DataError) as caught:
            convert({"messages": said(), "conversations": [{"from": "human", "value": "a"}]})
        assert caught.value.code == "bad_record"


KEYS = ("messages", "images", "image", "role", "content", "type", "text", "index", "image_url", "from", "value", "conversations")
ANYTHING = st.recursive(
    st.none() | st.integers() | st.sampled_from(["user", "image", "text", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(ANYTHING)
def test_nothing_raises_whatever_stands_in_a_file(entry: Any) -> None:
    assert examine(entry, where="x").findings or examine(entry, where="x").conversation


def test_a_file_of_messages_is_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"id": "m", "images": ["a.png"], "messages": said({"type": "image"}, {"type": "text", "text": "\na"})}))
    sample = read_llava(path)[0]
    assert sample.conversation.messages[0].parts == (Image(tmp_path / "a.png"), Text("\na"))
    assert sample.conversation.messages[1].text == "b"
