"""Which objects a text names, and which of them nobody has seen.

    "A dog sleeps beside two mugs."  ->  dog: {dog}, mugs: {cup}        words, and the categories that each may mean

The vocabulary is ``objects.txt``: COCO's 80 categories with other words for them. What it cannot do: objects outside these categories
(trees, buildings, clothes) are neither known nor unknown; a word with several meanings ("glasses", "bike") counts as known when one of
them is; numbers, colours and places are not compared; "no dog" names a dog. So its share is a measure for sorting, not a proof.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llavakit.datagen.context import CROWD

_WORD = re.compile(r"[a-z]+(?:[-'.][a-z]+)*")
FILE = Path(__file__).parent / "objects.txt"
LONGEST = 3  # words of a name


@dataclass(frozen=True)
class Named:
    """The words of a text that mean objects, each once, and those among them that a context does not know."""

    words: tuple[str, ...]
    unknown: tuple[str, ...]

    @property
    def share(self) -> float:
        return len(self.unknown) / len(self.words) if self.words else 0.0


def named(text: str, known: str) -> Named:
    """What ``text`` names against what ``known`` (captions and categories) names."""
    seen = {category for _, categories in objects(known) for category in categories}
    said = objects(text)
    unknown = tuple(word for word, categories in said if not categories & seen)
    return Named(tuple(word for word, _ in said), unknown)


def naming(text: str, categories: Collection[str]) -> Iterator[str]:
    """Those of the categories that a text names, by any of their words; a category that the vocabulary does not have, by its own."""
    said = {category for _, meant in objects(text) for category in meant}
    known = {category for meant in vocabulary().values() for category in meant}
    plain = text.lower()
    for category in categories:
        name = category.removeprefix(CROWD)
        if name in said if name in known else re.search(rf"\b{re.escape(name.lower())}", plain):
            yield category


def objects(text: str) -> list[tuple[str, frozenset[str]]]:
    """Every name of an object in a text with the categories it may mean, longest names first, each name once, in reading order."""
    words = _WORD.findall(text.lower())
    table = vocabulary()
    found: dict[str, frozenset[str]] = {}
    at = 0
    while at < len(words):
        for length in range(LONGEST, 0, -1):
            name = " ".join(words[at : at + length])
            if name in table:
                found.setdefault(name, table[name])
                at += length
                break
        else:
            at += 1
    return list(found.items())


@cache
def vocabulary() -> dict[str, frozenset[str]]:
    """Word -> categories."""
    table: dict[str, set[str]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        category, _, others = line.partition(":")
        names = [category, *(name.strip() for name in others.split(",") if name.strip())]
        for name in names:
            for form in (name[1:],) if name.startswith("=") else (name, _plural(name)):
                table.setdefault(form, set()).add(category)
    return {name: frozenset(categories) for name, categories in table.items()}


def _plural(name: str) -> str:
    if name.endswith("y") and name[-2:-1] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")
