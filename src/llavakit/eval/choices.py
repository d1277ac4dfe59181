"""Multiple choice: how options are shown, which letter an answer means, and which questions count as right.

    question                      rounds of CircularEval: the options move up, the letters stay
    A. cat      B  cat    A  dog    A  owl    ...
    B. dog      -> round 0  A cat  B dog  C owl     round 1  A dog  B owl  C cat     round 2  A owl  B cat  C dog
    C. owl      a question counts if it is right in every round; in MMBench's files the rounds are rows, 1,000,000 apart

``infer`` is the matching of MMBench's own evaluation as far as it needs no judge, ``infer_llava`` that of LLaVA's scripts. SEED-Bench
takes the letter alone. None always means: no option can be read from this.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, TypeVar

LETTERS = ascii_uppercase
SHIFT = 1_000_000  # between the rows of one question in MMBench's files
_Option = TypeVar("_Option")


def lettered(question: str, options: Sequence[str], *, form: str = "{}. {}") -> str:
    """The question, then one option a line."""
    return "\n".join([question, *(form.format(letter, option) for letter, option in zip(LETTERS, options, strict=False))])


def rotated(options: Sequence[_Option], turns: int) -> tuple[_Option, ...]:
    """The options of a later round: the first ones have moved to the end."""
    turns %= len(options) or 1
    return (*options[turns:], *options[:turns])


def absent(cell: Any) -> bool:
    """No value: None, a NaN, or a text that spells one of them."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell)) or (isinstance(cell, str) and cell.lower() in ("nan", "none"))


def until_absent(cells: Iterable[Any]) -> tuple[str, ...]:
    """The options of a row: those before the first that is absent."""
    options = []
    for cell in cells:
        if absent(cell):
            break
        options.append(str(cell))
    return tuple(options)


def infer(text: str, options: Mapping[str, str]) -> str | None:
    """As MMBench's evaluation (VLMEvalKit) matches without a judge. ``options``: letter -> text.

    Exactly one of the letters among the words, once ``.()[],:;!*#{}`` are blanks; else Z, if it is among them and no letter is; else the
    only option whose text stands in the answer, capitals or not.
    """
    words = text.translate(_BLANKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    small = text.lower()
    contained = [letter for letter, option in options.items() if str(option).lower() in small]
    return contained[0] if len(contained) == 1 else None


_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def infer_llava(text: str, options: Mapping[str, str]) -> str | None:
    """As LLaVA's eval_mmbench.py matches before it asks a judge.

    The letter alone, full stops around it aside; else the first letter of which ``the answer is X.`` is said; else the only option in
    whose text the whole answer stands. (Here an empty answer stands in every text, and so means an option only where there is but one.)
    """
    letter = text.strip(".").strip().upper()
    if letter in options:
        return letter
    small = text.lower()
    stated = [letter for letter in options if f"the answer is {letter}.".lower() in small]
    if stated:
        return stated[0]
    containing = [letter for letter, option in options.items() if small in str(option).lower()]
    return containing[0] if len(containing) == 1 else None


def circular(hits: Iterable[tuple[int, bool]]) -> dict[int, bool]:
    """(index of a row, whether it was right) -> question -> right in all its rows.

    Rows of one question have the same index up to a multiple of ``SHIFT``, or the same index (rounds). As in the reference, rows whose
    first one is not there are left out.
    """
    rows: dict[int, list[bool]] = defaultdict(list)
    firsts: dict[int, None] = {}
    for index, right in hits:
        rows[index % SHIFT].append(right)
        if index < SHIFT:
            firsts[index] = None
    return {first: all(rows[first]) for first in firsts}


def seed_score(
    questions: Iterable[Mapping[str, Any]], answers: Mapping[int | str, str], *, only: str | None = None
) -> tuple[dict[int, float], float]:
    """Percent right of each type and of all, from official questions and answers by id. ``only``: image or video.

    The answer must be the letter, nothing else. Ids are numbers where they can be read as such; what is not answered is wrong.
    """
    hits: dict[int, list[bool]] = defaultdict(list)
    for question in questions:
        if only is None or question["data_type"] == only:
            hits[question["question_type_id"]].append(answers.get(_id(question["question_id"])) == question["answer"])
    every = [hit for of_type in hits.values() for hit in of_type]
    return {kind: 100 * sum(of) / len(of) for kind, of in sorted(hits.items())}, 100 * sum(every) / len(every) if every else 0.0


def _id(given: Any) -> int | str:
    try:
        return int(given)
    except (TypeError, ValueError):
        return str(given)
