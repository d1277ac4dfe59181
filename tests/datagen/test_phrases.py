"""Noun phrases: captions with the phrases a person would mark, laws for any text, and the way to spaCy without spaCy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.datagen import phrases
from llavakit.datagen.phrases import Builtin, chunks, engine, normal
from llavakit.errors import ConfigError, MissingExtraError

MARKED = """
A brown dog sleeps on the old sofa. | brown dog; old sofa
two brown dogs are sleeping on a wooden bench | two brown dogs; wooden bench
a sleeping dog and a smiling girl | sleeping dog; smiling girl
A man riding a horse along the sandy beach | man; horse; sandy beach
man riding waves at sunset | man; waves; sunset
A car parked next to a parking meter | car; parking meter
three parked cars in a parking lot | three parked cars; parking lot
A living room with a couch, a lamp and a dining table. | living room; couch; lamp; dining table
a tall, narrow tower above the town | tall, narrow tower; town
a black and white photo of an orange and white cat | black and white photo; orange and white cat
The sky is blue and the sea is calm. | sky; sea
people walk through the park while birds fly overhead | people; park; birds
A woman stands behind the news stand. | woman; news stand
the boy watches his dog | boy; dog
a waiter balances seven plates on his arms | waiter; seven plates; arms
They are looking at it. |
someone is holding something for everyone |
A bear that walks into the woods | bear; woods
a man trying to catch a frisbee | man; frisbee
a quickly melting ice cream cone | quickly melting ice cream cone
a brightly painted wooden boat | brightly painted wooden boat
houses on a tree covered hill | houses; tree covered hill
a chocolate covered strawberry on a plate | chocolate covered strawberry; plate
A girl dressed in pink | girl
the girl's red shoes | girl's red shoes
a t-shirt and some well-worn jeans | t-shirt; well-worn jeans
a train arrives at platform 9 3/4 | train; platform 9 3/4
All of these toys belong to my little sister | toys; little sister
each of the two zebras | two zebras
a group of people sitting at a table full of food | group; people; table; food
the wedding of a young couple | wedding; young couple
a fresh bowl of fruit, nuts, and yogurt | fresh bowl; fruit; nuts; yogurt
football player celebrates scoring his first goal | football player; first goal
actor attends the premiere of film | actor; premiere; film
seamless pattern with hand drawn flowers , vector illustration | seamless pattern; hand drawn flowers; vector illustration
A family watching a butterfly on a lily | family; butterfly; lily
the tail of a fish in a dish | tail; fish; dish
a cat asleep under the bed | cat; bed
an airplane is flying over the red building | airplane; red building
portrait of smiling woman with long hair | portrait; smiling woman; long hair
""".strip().splitlines()


@pytest.mark.parametrize("line", MARKED)
def test_the_chunker_marks_what_a_person_would(line: str) -> None:
    caption, _, marked = line.partition("|")
    assert chunks(caption) == [phrase.strip() for phrase in marked.split(";") if phrase.strip()]


WORDS = sorted({word for line in MARKED for word in line.replace("|", " ").replace(";", " ").split()})
CAPTIONS = st.one_of(st.text(), st.lists(st.sampled_from([*WORDS, ",", "and", "the", "İ", "Σ", "\u2028", "e\u0301"])).map(" ".join))


@given(CAPTIONS)
def test_phrases_are_pieces_of_the_caption_in_its_order(caption: str) -> None:
    text, at = " ".join(caption.lower().split()), 0
    for phrase in chunks(caption):
        at = text.index(phrase, at) + len(phrase)  # contiguous, one after the other, none inside another
        assert phrase == " ".join(phrase.split())


@given(CAPTIONS)
def test_both_engines_would_write_a_phrase_alike(caption: str) -> None:
    found = chunks(caption)
    assert [normal(phrase) for phrase in found] == found
    assert [normal(f"The  {phrase}\n") for phrase in found] == found


@given(CAPTIONS)
def test_blanks_and_case_change_nothing(caption: str) -> None:
    assert chunks(f"  {' '.join(caption.lower().split())}\t") == chunks(caption)


@given(st.lists(CAPTIONS))
def test_many_captions_are_as_each_alone(captions: list[str]) -> None:
    assert list(Builtin().phrases(captions)) == [chunks(caption) for caption in captions]


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("The  Red\nCar", "red car"), ("it", ""), ("those two", ""), ("their own house", "own house"), ("another", ""), ("", "")],
)
def test_normal(phrase: str, expected: str) -> None:
    assert normal(phrase) == expected


def test_every_section_of_the_words_is_used_and_in_lower_case() -> None:
    for name, words in phrases._lists().items():
        assert words, name
        assert all(word == word.lower() for word in words)


# --- spaCy: a stand-in with its interface, since the project's tests run without it ---------------------------------------------------


class FakePipe:
    """Splits at commas where spaCy would parse."""

    def pipe(self, captions: list[str], *, batch_size: int) -> Iterator[SimpleNamespace]:
        assert batch_size > 0
        for caption in captions:
            yield SimpleNamespace(noun_chunks=[SimpleNamespace(text=part) for part in caption.split(",")])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that the chooser believes to be installed."""
    names: set[str] = set()
    monkeypatch.setattr(phrases, "find_spec", lambda name: ModuleSpec(name, None) if name in names else None)
    monkeypatch.setattr(phrases.metadata, "version", lambda name: "9.9")
    spacy = ModuleType("spacy")
    spacy.load = lambda model, exclude: FakePipe()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    return names


def test_without_spacy_the_chunker_is_taken(installed: set[str]) -> None:
    assert engine("auto").choice == engine("builtin").choice == "builtin"
    with pytest.raises(MissingExtraError, match=r"llavakit\[filter\]"):
        engine("spacy")


def test_without_a_model_too(installed: set[str]) -> None:
    installed.add("spacy")
    assert engine("auto").choice == "builtin"
    with pytest.raises(ConfigError, match="spacy download en_core_web_sm"):
        engine("spacy")


def test_with_a_model_spacy_is_taken_and_named(installed: set[str]) -> None:
    installed |= {"spacy", "en_core_web_md"}
    assert engine("builtin").choice == "builtin"
    found = engine("auto")
    assert (found.choice, found.name) == ("spacy", "spaCy 9.9 with en_core_web_md 9.9")
    assert list(found.phrases(["The Red Car,it,her  Two dogs", "they"])) == [["red car", "two dogs"], []]
