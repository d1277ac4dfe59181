"""ScienceQA's files: problems and splits, what LLaVA's converter writes, files of answers in every published form, the result file.

problems.json + pid_splits.json   load(folder) -> Problem ...      llava_test_QCM-LEA.json   read_converted -> {id: what is asked}
images/test/ID/image.png          pictures(folder)                 answers, results          read_predictions -> Predictions
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.data.scienceqa import Problem, read_problem
from llavakit.errors import DataError
from llavakit.eval.files import json_file
from llavakit.eval.official import read_object, read_text
from llavakit.types import IMAGE_MARKER

SPLIT = "test"
RESULT = "scienceqa_result.json"
_NAMES, _WORDS = ("question_id", "id"), ("text", "output")  # how files call a question and its answer


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A file of answers: texts by problem and, where the file says so, which choice each was read as and how many were right."""

    texts: Mapping[str, str]
    parsed: Mapping[str, int]
    problems: Mapping[str, Any]
    "Problems that came with them, unchecked."
    correct: int | None = None
    count: int | None = None


def load(folder: Path, *, split: str = SPLIT) -> list[Problem]:
    """The problems of a split in its order. Captions are left out: LLaVA sees the picture.

    Raises DataError: ``bad_file``, ``bad_json``, ``unknown_split``, ``unknown_problem``, ``bad_problem``.
    """
    where, splits = folder / "problems.json", read_object(folder / "pid_splits.json")
    problems = read_object(where)
    if not isinstance(splits.get(split), list):
        remedy = f"it has {', '.join(splits)}"
        raise DataError(f"no split {split!r}", code="unknown_split", where=str(folder / "pid_splits.json"), remedy=remedy)
    names = dict.fromkeys(str(name) for name in splits[split])
    if absent := next((name for name in names if name not in problems), None):
        what = f"no problem {absent}, which the split {split} names"
        raise DataError(what, code="unknown_problem", where=str(where), remedy="take both files anew")
    return [read_problem(name, problems[name], where=str(where)) for name in names]


def pictures(folder: Path) -> Path:
    """Where the pictures of the split lie. They are opened only when a question is asked: to score, none is needed."""
    places = (folder / "images" / SPLIT, folder / SPLIT, folder / "images")
    return next((place for place in places if place.is_dir()), places[0])


def read_converted(path: Path, problems: Sequence[Problem]) -> dict[str, str]:
    """What a file of the original's converter asks about each problem, without the picture's place. Raises DataError."""
    records, asked = _read(path), {}
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        try:
            name, value = record["id"], record["conversations"][0]["value"]
        except (KeyError, IndexError, TypeError):
            name, value = None, None
        if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(value, str):
            remedy = "give a list of {id, conversations: [{from, value}, ...]}"
            raise DataError(f"record {number} asks nothing", code="bad_record", where=str(path), remedy=remedy)
        asked[str(name)] = value.replace(IMAGE_MARKER, "").strip()
    if absent := next((problem.id for problem in problems if problem.id not in asked), None):
        remedy = "take the file anew, or away: then the questions are made from problems.json"
        raise DataError(f"nothing is asked about problem {absent}", code="unknown_problem", where=str(path), remedy=remedy)
    return asked


def write_result(folder: Path, outputs: Mapping[str, str], results: Mapping[str, int], *, correct: int) -> Path:
    """The result file of the original's script: acc, correct, count, results {id: index}, outputs {id: text}."""
    result = {
        "acc": correct / len(results) * 100 if results else None,
        "correct": correct,
        "count": len(results),
        "results": results,
        "outputs": outputs,
    }
    return json_file(folder / RESULT, result, indent=2)


def read_predictions(path: Path) -> Predictions:
    """Answers in any form that was published, in plain words:

    lines (or a list) of {question_id, text}; {outputs: {id: text}, results, correct, count}, the result file of the original's script;
    {id: {output, parsed}} and {id: text}, alone or as ``predictions``. Of two answers to a question the last one counts, as in the
    original. Raises DataError.
    """
    value = _read(path)
    whole = value if isinstance(value, dict) else {}
    held = next((whole[key] for key in ("outputs", "predictions") if key in whole), value)
    if isinstance(held, list):
        entries = [(_first(one, _NAMES), one, f"{path}:{number}") for number, one in enumerate(held, 1)]
    elif isinstance(held, dict):
        entries = [(name, one, f"{path} problem {name}") for name, one in held.items()]
    else:
        entries = [(None, None, str(path))]
    texts: dict[str, str] = {}
    parsed: dict[str, int] = {}
    for name, one, where in entries:
        text = one if isinstance(one, str) else _first(one, _WORDS)
        if isinstance(name, bool) or not isinstance(name, str | int) or not isinstance(text, str):
            remedy = "give lines of {question_id, text}, or a result file of LLaVA's script"
            raise DataError("no answer", code="bad_answer", where=where, remedy=remedy)
        texts[str(name)] = text
        if isinstance(number := _first(one, ("parsed",)), int):
            parsed[str(name)] = number
    results = whole.get("results")
    if isinstance(results, dict):
        parsed |= {name: number for name, number in results.items() if isinstance(number, int)}
    correct, count = (number if isinstance(number := whole.get(key), int) else None for key in ("correct", "count"))
    problems = whole.get("problems")
    return Predictions(texts=texts, parsed=parsed, problems=problems if isinstance(problems, dict) else {}, correct=correct, count=count)


def _first(one: Any, keys: Sequence[str]) -> Any:
    """The value under the first key that is there."""
    return next((one[key] for key in keys if key in one), None) if isinstance(one, dict) else None


def _read(path: Path) -> Any:
    """JSON, or lines of JSON as a list."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _lines(text, path, error)
    return [value] if isinstance(value, dict) and "question_id" in value else value  # a single line


def _lines(text: str, path: Path, whole: Exception) -> list[Any]:
    """Lines of JSON. Where not even the first is one, the file was meant as a whole."""
    values: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            where, why = (f"{path}:{number}", error) if values else (str(path), whole)
            raise DataError(f"not JSON: {why}", code="bad_json", where=where, remedy="take the file anew") from error
    return values
