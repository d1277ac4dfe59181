"""What generated rows are, counted in one pass: kinds, turns, words, first words of questions, objects, nearest texts, a few samples.

    row      {"id", "image", "conversations", "kind", "teacher", ...}       as in rows.jsonl; further keys are of no matter
    reject   {"id", "kind", "reason", "detail", "text", ...}                as in rejects.jsonl
    context  {"image", "captions", "instances": [{"category", "bbox"}]}     what the teacher was told; found by the row's image

Memory is that of counters, of sketches (``nearest``), of the contexts' categories and of the few rows kept as samples.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.datagen.nearest import Nearest, Pair
from llavakit.errors import DataError
from llavakit.types import IMAGE_MARKER

SAMPLES = 8  # kept of each kind, and of each reason to reject
LONGEST = 400  # more words, turns or kinds of them than this are counted together
OTHER = "(other)"
Named = Callable[[str, Collection[str]], Iterable[str]]  # the categories, out of those given, that a text names
Row = Mapping[str, Any]
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_PEOPLE = ("people", "man", "men", "woman", "women", "child", "children", "boy", "boys", "girl", "girls", "someone", "player", "players")


@dataclass
class Kind:
    """The rows of one kind."""

    rows: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    asked: Counter[int] = field(default_factory=Counter)  # words of a question
    answered: Counter[int] = field(default_factory=Counter)  # words of an answer
    samples: list[Row] = field(default_factory=list)


@dataclass
class Coverage:
    """A category over the rows whose pictures have a box of it."""

    rows: int = 0
    named: int = 0


@dataclass
class Facts:
    """All that the report tells."""

    kinds: dict[str, Kind] = field(default_factory=lambda: defaultdict(Kind))
    teachers: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    openings: Counter[str] = field(default_factory=Counter)  # first two words of a question
    images: set[str] = field(default_factory=set)
    objects: dict[str, Coverage] = field(default_factory=lambda: defaultdict(Coverage))
    without_context: int = 0
    unknown: Counter[str] = field(default_factory=Counter)  # objects that neither captions nor boxes know
    unknown_rows: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)  # (reason, kind)
    rejected: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    nearest: list[Pair] = field(default_factory=list)
    not_compared: int = 0

    @property
    def rows(self) -> int:
        return sum(kind.rows for kind in self.kinds.values())


def count(
    rows: Iterable[Row],
    rejects: Iterable[Row] = (),
    contexts: Iterable[Row] = (),
    *,
    named: Named | None = None,
    seed: int = 0,
    samples: int = SAMPLES,
) -> Facts:
    """Count everything; ``samples`` are kept of each kind, and of each reason. Raises DataError for a row that is no conversation."""
    facts, nearest, draw, named = Facts(), Nearest(), random.Random(seed), named or plainly_named
    boxes = {str(context.get("image")): _categories(context) for context in contexts}
    for number, row in enumerate(rows, 1):
        said = _said(row, number)
        kind = facts.kinds[_limited(facts.kinds, str(row.get("kind", "")) or "row")]
        kind.rows += 1
        kind.turns[min(len(said), LONGEST)] += 1
        _sample(kind.samples, row, kind.rows, draw, samples)
        for question, answer in said:
            asked = _WORD.findall(question)
            kind.asked[min(len(asked), LONGEST)] += 1
            kind.answered[min(len(_WORD.findall(answer)), LONGEST)] += 1
            opening = " ".join(asked[:2]).lower()
            facts.openings[opening if opening in facts.openings or len(facts.openings) < 10_000 else OTHER] += 1
        _provenance(facts, row)
        text = "\n".join(answer for _, answer in said)
        nearest.add(str(row.get("id", number)), text)
        _objects(facts, row, boxes, f"{text}\n{' '.join(question for question, _ in said)}", named)
    for reject in rejects:
        reason = str(reject.get("reason", ""))
        reason = reason if len(facts.rejected) < LONGEST or reason in facts.rejected else OTHER
        facts.reasons[reason, str(reject.get("kind", ""))[:40]] += 1
        _sample(facts.rejected[reason], reject, sum(n for (r, _), n in facts.reasons.items() if r == reason), draw, samples)
    facts.nearest, facts.not_compared = nearest.pairs(), nearest.left_out
    return facts


def plainly_named(text: str, categories: Collection[str]) -> Iterator[str]:
    """Categories whose name, or its simple plural, stands in a text; a person has a few names more."""
    words = f" {' '.join(_WORD.findall(text.lower()))} "
    for category in categories:
        name = " ".join(_WORD.findall(category.lower()))
        forms = (name, f"{name}s", f"{name}es", f"{name[:-1]}ies" if name.endswith("y") else name, *(_PEOPLE if name == "person" else ()))
        if any(f" {form} " in words for form in forms):
            yield category


def json_lines(path: Path) -> Iterator[Row]:
    """The records of a file of JSON lines. Raises DataError with the line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(error), code="bad_file", where=str(path), remedy="give a file of JSON lines in UTF-8") from error


def _record(line: str, where: str) -> Row:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg}", code="bad_json", where=where, remedy="make the file again") from error
    if not isinstance(record, dict):
        raise DataError("no JSON object", code="bad_record", where=where, remedy="write one object a line")
    return record


def _said(row: Row, number: int) -> list[tuple[str, str]]:
    """Questions, without the picture's marker, and answers."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        remedy = "give rows in LLaVA's format"
        raise DataError("no conversation", code="bad_record", where=f"row {number} (id {row.get('id')})", remedy=remedy)
    values = [str(turn["value"]) for turn in turns]
    return [(question.replace(IMAGE_MARKER, " "), answer) for question, answer in zip(values[::2], values[1::2], strict=False)]


def _provenance(facts: Facts, row: Row) -> None:
    """Teacher and attempt, which stand in the row itself or under "provenance"."""
    told = row.get("provenance")
    made = {**row, **told} if isinstance(told, dict) else row
    teacher, attempt = str(made.get("teacher", "") or ""), made.get("attempt")
    if teacher:
        facts.teachers[teacher if teacher in facts.teachers or len(facts.teachers) < LONGEST else OTHER] += 1
    if isinstance(attempt, int):
        facts.attempts[min(attempt, LONGEST)] += 1


def _objects(facts: Facts, row: Row, boxes: Mapping[str, frozenset[str]], text: str, named: Named) -> None:
    image = str(row.get("image", ""))
    facts.images.add(image)
    if boxes and image not in boxes:
        facts.without_context += 1
    drawn = boxes.get(image, frozenset())
    said = set(named(text, drawn)) if drawn else set()
    for category in drawn:
        facts.objects[category].rows += 1
        facts.objects[category].named += category in said
    unknown = row.get("unknown")
    if isinstance(unknown, list) and unknown:
        facts.unknown_rows += 1
        facts.unknown.update(word for word in map(str, unknown) if word in facts.unknown or len(facts.unknown) < 10_000)


def _categories(context: Row) -> frozenset[str]:
    instances = context.get("instances")
    return frozenset(str(box.get("category")) for box in instances if isinstance(box, dict)) if isinstance(instances, list) else frozenset()


def _sample(kept: list[Row], row: Row, seen: int, draw: random.Random, most: int) -> None:
    """A fair sample of ``most`` rows out of however many come."""
    if len(kept) < most:
        kept.append(row)
    elif (place := draw.randrange(seen)) < most:
        kept[place] = row


def _limited(known: Collection[str], name: str) -> str:
    return name if name in known or len(known) < LONGEST else OTHER
