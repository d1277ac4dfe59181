"""Checks find what they are for and leave good text alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.datagen import checks
from llavakit.datagen.checks import CODES, Rules, check
from llavakit.datagen.context import Box, Context
from llavakit.datagen.duplicates import SHORT, Seen
from llavakit.datagen.kinds import KINDS, Prompts
from llavakit.datagen.objects import named, objects, vocabulary
from llavakit.datagen.parse import Kind, Reject, read

CONTEXT = Context("1", "1.jpg", ("A man and his puppy sit on a bench.", "There is a kite."), (Box("dog", 0, 0, 0.5, 0.5),))
STRICT = Rules(unknown_objects={"conversation": 0.34, "detail": 0.34})
fractions = st.integers(0, 1000).map(lambda value: value / 1000)


@given(fractions, fractions, fractions, fractions)
def test_numbers_of_boxes_are_found(a: float, b: float, c: float, d: float) -> None:
    box = Box("dog", a, b, c, d)
    numbers = box.line.partition(" ")[2]
    for text in (f"The dog is at {numbers}.", f"It starts at ({a:.2f}, {b:.2f}).", f"Its left edge is {a:.3f} from the side."):
        assert checks.coordinates(text)


@pytest.mark.parametrize(
    "text", ["It is 0.5 miles away.", "A bottle of 1.75 liters", "On the left (behind the 2 chairs)", "At 10:30", "v1.5"]
)
def test_other_numbers_are_none(text: str) -> None:
    assert checks.coordinates(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "According to the captions, a dog sleeps.",
        "The caption says so.",
        "Its bounding box is large.",
        "Based on the provided information, it is noon.",
        "The boxes show two dogs.",
        "The given descriptions mention a kite.",
        "They are described as antique.",
        "The coordinates tell that it is on the left.",
        "From the description, the man is old.",
        "The description does not mention a hat.",
    ],
)
def test_words_for_the_source_are_found(text: str) -> None:
    assert checks.names_source(text)


@pytest.mark.parametrize(
    "text",
    [
        "A cardboard box stands on the table, beside two pizza boxes.",
        "The sign provides information for visitors.",
        "One could give a description of the thief.",
        "He lists the objects he wants to sell.",
        "In this context, the man waits.",
    ],
)
def test_other_uses_of_these_words_are_none(text: str) -> None:
    assert checks.names_source(text) is None


def test_a_caption_in_the_picture_is_no_source() -> None:
    assert checks.names_source("The caption reads HELLO.", "A cartoon with a caption.") is None


@pytest.mark.parametrize(
    ("question", "answer", "found"),
    [
        ("What is the brown dog on the sofa doing?", "The brown dog is on the sofa.", True),
        ("What does the red car on the street look like?", "It is a red car.", True),
        ("Is the dog brown?", "Yes, the dog is brown.", False),
        ("Is the star small or big?", "big", False),
        ("Which is in front, the cat or the dog?", "the dog", False),
        ("What color is the dog?", "The dog is brown.", False),
        ("How many dogs are there?", "3", False),
        ("What is this?", "It is.", False),
    ],
)
def test_questions_that_hold_their_answer(question: str, answer: str, found: bool) -> None:
    assert (checks.gives_away(question, answer) is not None) == found


def test_answers_that_stop_in_the_middle() -> None:
    long = "The man sits on a bench and the dog lies in front of it because the"
    assert checks.unfinished(long)
    for end in (".", "!", "?", '."', ".)", "**.**"):
        assert checks.unfinished(long + " sun shines" + end) is None
    assert checks.unfinished("A red kite") is None


def test_the_marker_and_refusals() -> None:
    assert checks.marker("See the <image> above.")
    assert checks.refusal("I'm sorry, but I cannot see the picture.")
    assert checks.refusal("The man is sorry.") is None


def test_unknown_objects_are_counted_by_categories() -> None:
    assert named("A man with a dog and a kitten near three cars", CONTEXT.words()).unknown == ("kitten", "cars")
    assert named("A person, a puppy, dogs, kites and a seat", CONTEXT.words()).unknown == ()
    assert named("Trees and the sky", CONTEXT.words()).share == 0
    turns = (("What is there?", "A cat, a car and a man."),)
    assert checks.unknown_objects(turns, CONTEXT, 0.7) is None
    found = check("detail", turns, CONTEXT, Rules())
    assert found
    assert found.code == "unknown_objects"
    assert check("reasoning", turns, CONTEXT, Rules()) is None
    assert check("detail", turns, CONTEXT, Rules(off=frozenset(("unknown_objects",)))) is None


def test_longest_names_win_and_every_category_is_known() -> None:
    assert [word for word, _ in objects("a hot dog, a teddy bear and a wine glass")] == ["hot dog", "teddy bear", "wine glass"]
    assert len({category for categories in vocabulary().values() for category in categories}) == 80


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_examples_pass_our_parser_and_checks(kind: Kind) -> None:
    for text, reply in Prompts.load().of(kind).examples:
        captions, _, drawn = text.partition("\n\n")
        boxes = tuple(Box(line.partition(":")[0], 0, 0, 1, 1) for line in drawn.split("\n") if line)
        turns = read(kind, reply)
        assert not isinstance(turns, Reject)
        assert check(kind, turns, Context("1", "1.jpg", tuple(captions.split("\n")), boxes), STRICT) is None


def test_every_code_can_be_switched_off() -> None:
    for code, answer in (("coordinates", "At [0.1, 0.2]."), ("names_source", "The caption says so."), ("refusal", "I'm sorry, I am lost.")):
        turns = (("Why?", answer),)
        assert code in CODES
        assert check("reasoning", turns, CONTEXT, Rules()) is not None
        assert check("reasoning", turns, CONTEXT, Rules(off=frozenset((code,)))) is None


TEXT = " ".join(f"word{number}" for number in range(2 * SHORT))


def test_duplicates_whole_and_near() -> None:
    seen = Seen(0.9)
    assert seen.add("a", TEXT) is None
    assert seen.add("b", TEXT.upper() + "!") == ("a", 1.0)
    near = seen.add("c", TEXT + " and more")
    assert near
    assert near[0] == "a"
    assert 0.9 <= near[1] < 1
    assert seen.add("d", " ".join(reversed(TEXT.split()))) is None
    assert seen.add("e", "Short.") is None
    assert seen.add("f", "short") == ("e", 1.0)
    assert seen.add("g", "Short too.") is None


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=90), st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=90))
def test_the_second_of_two_equal_texts_is_found_whatever_came_between(one: list[str], other: list[str]) -> None:
    seen = Seen(0.9)
    assert seen.add("one", " ".join(one)) is None
    seen.add("other", " ".join(other))
    assert seen.add("again", " ".join(one)) == ("one", 1.0)
