"""MMMU (validation): questions of six disciplines and thirty subjects, most with options, some to be answered freely.

    <Subject>/validation-*.parquet   id, question, options, answer, question_type, image_1 ... image_7    as on the Hub
    validation.jsonl or .json        the same fields, image_1 a path                                      as one writes them oneself

Pictures stand in the text as ``<image 1>``, ``<image 2>``; as in MMMU's own script for LLaVA, the first one is shown and the text stays.

A reply is read as the official parser reads it: a letter in brackets, else between blanks, else, in more than five words, an option's text,
each time the last one said. Where nothing is found, MMMU guesses; here that is wrong, unless a ``guess`` is given. Free answers are
searched for the answer's text, or for its number to two places.
"""

from __future__ import annotations

import ast
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.eval import intervals
from llavakit.eval.benchmark import LETTER, LLAVA_15, LLAVA_16, SHORT, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import unique
from llavakit.eval.choices import LETTERS, lettered
from llavakit.eval.files import json_file
from llavakit.eval.official import Row, parquets, picture, read_rows, there
from llavakit.eval.published import with_numbers
from llavakit.types import Image

DISCIPLINES: Mapping[str, tuple[str, ...]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power", "Materials"),
        "Mechanical_Engineering",
    ),
}
CHOICE = "multiple-choice"
_ENDS = (",", ".", "!", "?", ";", ":", "'")
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = (":", ",", ".", "!", "?", ";", "'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.2e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.2, .5
)


def choice(text: str, options: Mapping[str, str], *, guess: random.Random | None = None) -> str | None:
    """The letter that a reply means; ``options``: letter -> text. Where none is found, None, or one that ``guess`` draws as MMMU does."""
    for end in _ENDS:
        text = text.strip(end)
    text = f" {text} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if found := {letter: place for letter, place in places.items() if place >= 0}:
            return max(found, key=lambda letter: found[letter])
    if len(text.split()) > 5:
        small = text.lower()
        places = {letter: small.rfind(option.lower()) for letter, option in options.items()}
        if found := {letter: place for letter, place in places.items() if place >= 0}:
            return max(found, key=lambda letter: found[letter])
    return None if guess is None else guess.choice(list(options))


def normal(text: str) -> tuple[float | str, ...]:
    """A number rounded to two places, or small letters; a single letter with a blank before or behind, lest it be found everywhere."""
    text = text.strip()
    try:
        return (round(float(text.replace(",", "")), 2),)
    except ValueError:
        small = text.lower()
        return (f" {small}", f"{small} ") if len(small) == 1 else (small,)


def free(text: str) -> set[float | str]:
    """What a free reply may have answered: the ends of its telling sentences, and all numbers in them."""
    ends = _telling(text)
    numbers = [found for end in ends for pattern in _NUMBERS for found in pattern.findall(end)]
    return {value for part in (*ends, *numbers) for value in normal(part)}


def _telling(text: str) -> list[str]:
    """Of each line that says "is", "answer", ... the shortest rest behind one of these; "=" counts in the last line. Else the whole reply.

    (The reference means to part sentences too, at a full stop before a capital, but has made all letters small before.)
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for place, line in enumerate(lines):
        keys = (*_KEYS, "=") if place == len(lines) - 1 else _KEYS
        shortest = ""
        for rest in (line.split(key)[-1].strip() for key in keys if key in line):
            if not shortest or len(rest) < len(shortest):
                shortest = rest
        if shortest and shortest not in _TRIVIAL:
            found.append(shortest)
    return found or [text]


def free_right(said: set[float | str], truths: Sequence[str]) -> bool:
    """Whether one of the answers stands in a text that was said, or is a number that was said."""
    known = [value for truth in truths for value in normal(truth)]
    texts = [value for value in known if isinstance(value, str)]
    return any(any(text in one for text in texts) if isinstance(one, str) else one in known for one in said)


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    own = there(folder, "validation.jsonl", "validation.json")
    paths = [own] if own is not None else parquets(folder, "validation", instead="validation.jsonl")
    return unique([_question(row, path, protocol) for path in paths for row in read_rows(path)], folder)


def _question(row: Row, path: Path, protocol: Protocol) -> Question:
    name, question, lettered_one = row.text("id"), row.text("question"), row.text("question_type") == CHOICE
    as_mmmu = protocol.name == "llava-1.5"
    options, answers = _list(row.get("options")) if lettered_one else (), _list(row.get("answer"))
    if lettered_one and (answers[0] not in LETTERS[: len(options)] or not answers[0]):
        raise row.fail(f"the answer is {answers[0]!r} of {len(options)} options")
    if lettered_one:
        prompt = f"{lettered(question, options, form='({}) {}' if as_mmmu else '{}. {}')}\n\n{LETTER}"
    else:
        prompt = f"{question}\n{SHORT}" if as_mmmu else f"{question}\n\n{SHORT}"
    return Question(
        id=name,
        given=name,
        prompt=prompt,
        image=Image(path.parent / row["image_1"]) if isinstance(row.get("image_1"), str) else picture(row, "image_1", path),
        category="_".join(name.split("_")[1:-1]),
        truth=answers[0] if lettered_one else answers,
        row=(("options", options),),
    )


def _list(value: Any) -> tuple[str, ...]:
    """A list of texts; also a text that spells one, as in the files of the Hub. Any other text is a list of one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return (value,)
    return tuple(map(str, value)) if isinstance(value, list | tuple) and value else (str(value),)


def says(answered: Answered, *, guess: random.Random | None = None) -> Any:
    """A letter or None; for a free question the set of what may be meant."""
    options = dict(answered.question.row)["options"]
    if answered.text is None:
        return None
    return choice(answered.text, dict(zip(LETTERS, options, strict=False)), guess=guess) if options else free(answered.text)


def right(answered: Answered, *, guess: random.Random | None = None) -> bool:
    said, truth = says(answered, guess=guess), answered.question.truth
    return said == truth if isinstance(truth, str) else said is not None and free_right(said, truth)


def scores(answered: Sequence[Answered], *, guess: random.Random | None = None) -> list[Score]:
    """All questions, each discipline, each subject. ``guess=random.Random(42)`` draws where MMMU does."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for one in answered:
        hits[one.question.category].append(right(one, guess=guess))
    if not hits:
        return []
    found = [intervals.mean("accuracy", [hit for of in hits.values() for hit in of], headline=True)]
    for discipline, subjects in DISCIPLINES.items():
        together = [hit for subject in subjects for hit in hits.get(subject, ())]
        found += [intervals.mean(discipline, together)] if together else []
    return found + [intervals.mean(subject, of) for subject, of in hits.items()]


def verdict(answered: Answered) -> Verdict:
    said, truth = says(answered), answered.question.truth
    parsed = said or "" if isinstance(truth, str) else " | ".join(sorted(map(str, said or ())))
    return Verdict(parsed=parsed, points=float(right(answered)), expected=truth if isinstance(truth, str) else " | ".join(truth))


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """What MMMU's main_eval_only.py reads: {id: letter, or the free reply}."""
    said = {one.question.id: (says(one) or "") if isinstance(one.question.truth, str) else (one.text or "") for one in answered}
    return json_file(folder / "submission.json", said, indent=4)


_NOTE = "only the first picture is shown; choices are followed by the instruction for a letter, the others by that for a word; "
MMMU = Benchmark(
    name="mmmu",
    title="MMMU: college questions of six disciplines",
    needs="the validation parquet files of MMMU/MMMU in any folders, or validation.jsonl with the same fields and paths of pictures",
    reference="eval_utils.py of MMMU-Benchmark/MMMU. Departure: where no letter can be read the answer is wrong, where there one is drawn"
    " (scores(answered, guess=random.Random(42)) draws)",
    protocols=with_numbers(
        "mmmu",
        "accuracy",
        LLAVA_16.but(note=f"{_NOTE}options as `A. text`, which is how we think it was asked"),
        LLAVA_15.but(note=f"{_NOTE}options as `(A) text`, as MMMU's own script asks"),
    ),
    questions=questions,
    score=scores,
    verdict=verdict,
    submit=submit,
)
