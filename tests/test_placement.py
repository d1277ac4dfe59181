"""Laws of ``data.placement``: pictures move beside their words, none is lost, and the coin is a pure function of seed and sample."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.data.placement import Placement, heads, place
from llavakit.types import IMAGE_MARKER, Conversation, Image, Message, Text, assistant, user
from talks import PICTURES, conversations

placements = st.sampled_from(get_args(Placement))
plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0<"), max_size=20)  # no "<": no marker by chance


def words_of(message: Message) -> str:
    return message.text.strip()


@settings(max_examples=80, deadline=None)
@given(talk=conversations(), placement=placements, seed=st.integers(0, 9), sample_id=st.text(max_size=4))
def test_nothing_is_lost_and_twice_is_once(talk: Conversation, placement: Placement, seed: int, sample_id: str) -> None:
    placed = place(talk, placement, seed=seed, sample_id=sample_id)
    assert [m.images for m in placed.messages] == [m.images for m in talk.messages]
    assert [words_of(m) for m in placed.messages] == [words_of(m) for m in talk.messages]
    assert all(after == before for before, after in zip(talk.messages, placed.messages, strict=True) if len(before.images) != 1)
    assert placed == place(talk, placement, seed=seed, sample_id=sample_id) == place(placed, placement, seed=seed, sample_id=sample_id)


@settings(max_examples=80, deadline=None)
@given(talk=conversations(), seed=st.integers(0, 9))
def test_random_touches_the_first_turn_alone(talk: Conversation, seed: int) -> None:
    placed = place(talk, "random", seed=seed, sample_id="x")
    opening = talk.messages.index(talk.turns[0])
    assert placed.messages[:opening] + placed.messages[opening + 1 :] == talk.messages[:opening] + talk.messages[opening + 1 :]


@settings(max_examples=60, deadline=None)
@given(before=plain, after=plain, later=plain)
def test_first_is_the_rule_of_the_original(before: str, after: str, later: str) -> None:
    """Spelled on text, as the original does it: the marker taken out, the rest stripped, marker and newline put in front, stripped."""
    record = {"image": ["a.png", "b.png"], "conversations": []}
    values = [f"{before}{IMAGE_MARKER}{after}", "Yes.", f"{later}{IMAGE_MARKER}", "No."]
    record["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    placed = place(Conversation.from_llava(record), "first").to_llava(image_names=["a.png", "b.png"])
    spelled = [f"{IMAGE_MARKER}\n{value.replace(IMAGE_MARKER, '').strip()}".strip() if IMAGE_MARKER in value else value for value in values]
    assert [turn["value"] for turn in placed["conversations"]] == spelled


@given(words=plain.filter(lambda text: bool(text.strip())), seed=st.integers(0, 99), sample_id=st.text(max_size=4))
def test_random_gives_one_of_two_orders(words: str, seed: int, sample_id: str) -> None:
    picture = PICTURES[0]
    talk = Conversation((user(picture, words), assistant("ok")))
    first = (picture, Text("\n" + words.strip()))
    last = (Text(words.strip() + "\n"), picture)
    assert place(talk, "random", seed=seed, sample_id=sample_id).turns[0].parts == (first if heads(seed, sample_id) else last)
    assert place(Conversation((Message("user", last), assistant("ok"))), "first").turns[0].parts == first


def test_the_coin_is_fair_and_stays_as_it_fell() -> None:
    falls = [heads(0, str(i)) for i in range(4000)]
    assert abs(sum(falls) - 2000) < 150  # 4.7 standard deviations
    assert falls != [heads(1, str(i)) for i in range(4000)]
    assert [heads(0, str(i)) for i in range(8)] == STORED


STORED = [False, True, True, False, False, False, True, True]  # a change would move pictures of runs that are resumed


@pytest.mark.parametrize("placement", ["random", "first"])
def test_several_pictures_in_one_turn_stay(placement: Placement) -> None:
    """The original would keep one of two markers; then the second picture would answer for the next sample."""
    a, b = Image(Path("a.png")), Image(Path("b.png"))
    talk = Conversation((user("Is ", a, " older than ", b, "?"), assistant("No.")))
    assert place(talk, placement) == talk
    assert place(Conversation((user("\n", a),)), placement).turns[0].parts == (a,)
