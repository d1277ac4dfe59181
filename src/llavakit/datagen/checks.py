"""What makes a well-formed reply unfit to learn from: small pure functions, each with the code it gives.

    coordinates      numbers of a box stand in the text                "at [0.12, 0.34, 0.56, 0.78]"
    names_source     captions, boxes or "the information provided"     the learner will see a picture and no such thing
    gives_away       the question holds its own answer                 "What is the brown dog doing?" "It is a brown dog."
    refusal          an answer begins as refusals do
    unfinished       a long answer stops without an end of a sentence
    marker           somebody spells <image>
    unknown_objects  too many of the objects named are in no caption and no box (``objects`` says what it can tell)

Every check gets question and answer and, where it matters, the context; it returns what it found, or None. Duplicates are a matter of a
whole run: ``duplicates``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from llavakit.datagen.context import Context
from llavakit.datagen.objects import named
from llavakit.datagen.parse import Kind, Reject, Turns, refuses
from llavakit.types import IMAGE_MARKER

_NUMBERS = re.compile(r"[\[(]\s*[01]?\.\d+\s*,\s*[01]?\.\d+|\b[01]\.\d{3}\b|\b[xy][12]\s*[=:]|\bx1\b.{0,12}\by1\b")
_THINGS = r"(?:box(?:es)?|objects?|captions?|coordinates|descriptions?|information|context|sentences?|details)"
_SOURCE = re.compile(
    r"\bbounding[- ]box|\bcaption(?:s|ed)?\b"
    r"|\b(?:box(?:es)?|list) of (?:detected )?objects\b"
    rf"|\b(?:detected|given|provided|listed|labell?ed|annotated) {_THINGS}\b"
    rf"|\b{_THINGS} (?:that (?:is|are|was|were) )?(?:given|provided)\b"
    r"|\b(?:the|these|those|your|its) (?:box )?coordinates\b|\bboxes (?:indicate|show|suggest|tell|reveal)"
    r"|\b(?:based on|according to|from|in|by) (?:the|this|these|your) (?:written )?(?:description|sentence|annotation|metadata)s?\b"
    r"|\b(?:is|are|was|were|as) described (?:as|in|by)\b"
    r"|\b(?:description|sentence|annotation)s? (?:do(?:es)? not |doesn['’]t |don['’]t )?(?:say|mention|state|indicate|specify|provide)",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\bor\b|\bwhich of\b", re.IGNORECASE)
_WORD = re.compile(r"[a-z0-9]+(?:['’][a-z]+)?")
_END = re.compile(r"[.!?…][\"'”’)\]*_`]*$|[:;|`]$")
_EMPTY = frozenset(
    re.findall(
        r"\w+",
        """
a an the is are was were be been being am do does did it its this that these those there here in on at of to and with by for from as
what which who whom whose where when why how can could you see i we they he she his her their them has have had not image picture photo
photograph scene shown seen visible depicted shows show one
""",
    )
)
CODES = (
    "coordinates", "names_source", "gives_away", "refusal", "unfinished", "marker", "unknown_objects", "duplicate",
)  # fmt: skip
SHORT = 12  # words: an answer below that may end as it likes ("A red kite")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Which checks are made. ``unknown_objects`` is the greatest share of objects that nobody knows, by kind; kinds not named are free.

    Reasoning is free by default: what may come along a road is rightly named in an answer about its dangers.
    """

    unknown_objects: Mapping[Kind, float] = field(default_factory=lambda: {"conversation": 0.5, "detail": 0.5})
    near_duplicates: float = 0.9  # share of the text in common, see ``duplicates``
    off: frozenset[str] = frozenset()  # codes that are let through


def check(kind: Kind, turns: Turns, context: Context | None, rules: Rules) -> Reject | None:
    """The first thing that is wrong with the turns of one reply. Without a context nothing can be unknown."""
    known = context.words() if context is not None else ""
    for question, answer in turns:
        for found in (
            marker(question + answer),
            coordinates(f"{question}\n{answer}"),
            names_source(f"{question}\n{answer}", known) if context is not None else None,
            refusal(answer),
            gives_away(question, answer),
            unfinished(answer),
        ):
            if found is not None and found.code not in rules.off:
                return found
    limit = rules.unknown_objects.get(kind)
    if context is None or limit is None or "unknown_objects" in rules.off:
        return None
    return unknown_objects(turns, context, limit)


def marker(text: str) -> Reject | None:
    return Reject("marker", f"the text spells {IMAGE_MARKER}") if IMAGE_MARKER in text else None


def coordinates(text: str) -> Reject | None:
    found = _NUMBERS.search(text)
    return Reject("coordinates", f"{found[0]!r}") if found else None


def names_source(text: str, known: str = "") -> Reject | None:
    """A word for the source is no fault where the picture itself has one: a cartoon with a caption."""
    own = known.lower()
    found = next((hit for hit in _SOURCE.finditer(text) if hit[0].lower().rstrip("s") not in own), None)
    return Reject("names_source", f"{found[0]!r}") if found else None


def refusal(answer: str) -> Reject | None:
    return Reject("refusal", answer[:120]) if refuses(answer) else None


def gives_away(question: str, answer: str) -> Reject | None:
    """The answer adds no word to the question. Choices and yes or no are answers; so is what a question of bare text gets."""
    asked, told = _content(question), _content(answer)
    if not asked or not told or told - asked or _CHOICE.search(question):
        return None
    return Reject("gives_away", f"{question[:80]!r} holds its answer {answer[:80]!r}")


def unfinished(answer: str) -> Reject | None:
    if len(answer.split()) < SHORT or _END.search(answer.rstrip()):
        return None
    return Reject("unfinished", f"it ends with {answer[-40:]!r}")


def unknown_objects(turns: Turns, context: Context, limit: float) -> Reject | None:
    found = named(said(turns), context.words())
    if found.share <= limit:
        return None
    return Reject("unknown_objects", f"{', '.join(found.unknown)}: {len(found.unknown)} of {len(found.words)} that are named")


def said(turns: Turns) -> str:
    """The answers alone: a question may ask for what is not there."""
    return "\n".join(answer for _, answer in turns)


def _content(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _EMPTY
