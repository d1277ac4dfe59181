"""ScienceQA's files to LLaVA records, in every format code (spec 6.4).

    problems.json   {id: question, choices, answer, hint, image, lecture, solution, ...}        code  QCM-LEA
    pid_splits.json {split: [id, ...]}                                                          asked ---^ ^--- answered

    letter   asked                              answered
    Q        Question: ...                      --
    C        Context: hint (and caption); N/A   --
    M        Options: (A) x (B) y               --
    L, E     BECAUSE: lecture, solution         lecture, solution: before the answer, or after it behind BECAUSE:
    A        --                                 The answer is X.

    LEPA     LECTURE: ... / SOLUTION: ... / ### / ANSWER: X.                 LLaVA v0 was fine-tuned on QCM-LEPA, v1.3 on QCM-LEA
    bare     question / A. x / B. y, answered by the letter alone            the evaluation file of LLaVA-1.5, image first

Byte for byte what the original's converter writes, oddities included: runs of two blanks become one, once; the labels ``Question: `` and
``Answer: `` go wherever they stand; where lecture and solution are both empty, LEA begins with a blank. One thing differs: the original
answers AL with the solution and AE with the lecture; here the letters mean what they say. No released model was trained on those two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.types import IMAGE_MARKER

LETTERS = "ABCDE"
BARE = "bare"
_BECAUSE = "BECAUSE:"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question, checked. ``caption`` is empty without a file of captions; all from ``lecture`` on may be empty too."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str = ""
    caption: str = ""
    lecture: str = ""
    solution: str = ""
    image: str | None = None
    split: str = ""
    subject: str = ""
    grade: str = ""

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]

    @property
    def context(self) -> str:
        return f"{self.hint} {self.caption}".strip()


def convert_scienceqa(
    folder: Path, *, split: str = "train", code: str = "QCM-LEA", captions: Path | None = None, split_in_name: bool = False
) -> list[dict[str, Any]]:
    """The records of one split (train, val, test, minitrain, minival, minitest: the keys of pid_splits.json), in its order.

    ``code``: asked-answered, as above, or "bare". ``captions``: ScienceQA's captions.json, to stand in the context behind the hint. Image
    names are ``id/image.png``, relative to the images of one split; with ``split_in_name`` ``split/id/image.png``, relative to all images
    (the mini splits draw from train, val and test).

    Raises DataError: ``bad_file``, ``bad_json``, ``unknown_split``, ``unknown_code``, ``unknown_problem``, ``bad_problem`` (a key that is
    missing or of the wrong type, with the problem's id).
    """
    check_code(code)
    splits, where = _object(folder / "pid_splits.json"), folder / "problems.json"
    problems = _object(where)
    told = _object(captions).get("captions", {}) if captions is not None else {}
    if split not in splits:
        raise DataError(
            f"no split {split!r}", code="unknown_split", where=str(folder / "pid_splits.json"), remedy=f"use one of {', '.join(splits)}"
        )
    records = []
    for number in splits[split]:
        name = str(number)
        if name not in problems:
            raise DataError(
                f"no problem {name}, which the split {split} names", code="unknown_problem", where=str(where), remedy="take both files anew"
            )
        problem = read_problem(name, problems[name], caption=str(told.get(name, "")), where=str(where))
        records.append(to_llava(problem, code, split_in_name=split_in_name))
    return records


def to_llava(problem: Problem, code: str, *, split_in_name: bool = False) -> dict[str, Any]:
    """One record of a LLaVA file: the question as the human's turn, the target as the model's."""
    question, answer = turns(problem, code)
    record: dict[str, Any] = {"id": problem.id}
    if problem.image is not None:
        folder = f"{problem.split}/{problem.id}" if split_in_name else problem.id
        record["image"] = f"{folder}/{problem.image}"
        question = f"{IMAGE_MARKER}\n{question}" if code == BARE else f"{question}\n{IMAGE_MARKER}"
    return record | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def turns(problem: Problem, code: str) -> tuple[str, str]:
    """What is asked and what is answered, without the picture's marker."""
    check_code(code)
    if code == BARE:
        context = [f"Context: {problem.context}"] if problem.context else []
        options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False)]
        return "\n".join([*context, problem.question, *options]), problem.letter
    asked, answered = code.split("-")
    return _unlabelled(_asked(problem, asked), "Question: "), _unlabelled(_answered(problem, answered), "Answer: ")


def check_code(code: str) -> None:
    """Raises DataError ``unknown_code`` for letters that make no question or no answer."""
    asked, dash, answered = code.partition("-")
    told = answered.replace("A", "")
    fits = sorted(asked.replace("L", "", 1).replace("E", "", 1)) == ["C", "M", "Q"]
    fits &= answered == "LEPA" or (
        told in ("", "L", "E", "LE", "EL") and answered.count("A") == 1 and (answered[0] == "A" or answered[-1] == "A")
    )
    if code != BARE and not (dash and fits):
        raise DataError(
            f"no format code {code!r}",
            code="unknown_code",
            remedy="write asked-answered: Q, C, M once each (and L, E), then A first or last (and L, E), or LEPA: QCM-LEA; or bare",
        )


def read_problem(name: str, entry: Any, *, caption: str = "", where: str = "") -> Problem:
    """A problem of problems.json, checked. Raises DataError ``bad_problem`` naming the key."""

    def stop(what: str, remedy: str) -> DataError:
        return DataError(what, code="bad_problem", where=f"{where} problem {name}".strip(), remedy=remedy)

    if not isinstance(entry, Mapping):
        raise stop("no JSON object", "take problems.json anew")
    kinds: tuple[tuple[str, Any, str], ...] = (
        ("question", str, "text"),
        ("choices", list, "a list of texts"),
        ("answer", int, "the index of the right choice"),
        ("hint", str, "text, empty where there is none"),
        ("image", str | None, "a file name or null"),
        ("lecture", str, "text, empty where there is none"),
        ("solution", str, "text, empty where there is none"),
        ("split", str, "train, val or test"),
    )
    for key, kind, wanted in kinds:
        if key not in entry:
            raise stop(f"no key '{key}'", f"it holds {wanted}")
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            raise stop(f"'{key}' is {entry[key]!r}", f"it holds {wanted}")
    choices = tuple(entry["choices"])
    if not 0 < len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise stop(f"{len(choices)} choices: {choices!r}", f"give one to {len(LETTERS)} texts")
    if not 0 <= entry["answer"] < len(choices):
        raise stop(f"'answer' is {entry['answer']} of {len(choices)} choices", "it counts from 0")
    fields = {key: entry[key] for key, _, _ in kinds} | {"choices": choices}
    fields |= {key: str(entry.get(key, "")) for key in ("subject", "grade")}  # only scoring needs them
    return Problem(id=name, caption=caption, **fields)


def _asked(problem: Problem, letters: str) -> str:
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, problem.choices, strict=False))
    lines = {"Q": f"Question: {problem.question}", "C": f"Context: {problem.context or 'N/A'}", "M": f"Options: {options}"}
    written = []
    for reason, run in groupby(letters, key=lambda letter: letter in "LE"):
        together = "".join(run)
        written += [f"{_BECAUSE} {_told(problem, together)}"] if reason else [lines[letter] for letter in together]
    return _tidy("\n".join(written))


def _answered(problem: Problem, letters: str) -> str:
    if letters == "LEPA":
        lecture, solution = _told(problem, "L"), _told(problem, "E")
        written = [f"LECTURE: {lecture}"] if lecture.strip() else []
        written += [f"SOLUTION: {solution}"] if solution.strip() else []
        return _tidy("\n".join([*written, "###", f"ANSWER: {problem.letter}."]))
    answer = f"The answer is {problem.letter}."
    if letters == "A":
        return f"Answer: {answer}"
    told = _told(problem, letters.replace("A", ""))
    return _tidy(f"Answer: {answer} {_BECAUSE} {told}" if letters[0] == "A" else f"Answer: {told} {answer}")


def _told(problem: Problem, letters: str) -> str:
    """Lecture and solution in the order of the letters; a newline spelled as backslash and n becomes one."""
    return " ".join({"L": problem.lecture, "E": problem.solution}[letter].replace("\\n", "\n") for letter in letters)


def _tidy(text: str) -> str:
    text = text.replace("  ", " ").strip()
    return text.replace(_BECAUSE, "").strip() if text.endswith(_BECAUSE) else text


def _unlabelled(text: str, label: str) -> str:
    return text.replace(label, "") if text.startswith(label) else text


def _object(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            error.strerror or "cannot be read",
            code="bad_file",
            where=str(path),
            remedy="give the folder of problems.json and pid_splits.json",
        ) from error
    except ValueError as error:
        raise DataError(f"not JSON: {error}", code="bad_json", where=str(path), remedy="take the file anew") from error
    if not isinstance(content, Mapping):
        raise DataError("no JSON object", code="bad_file", where=str(path), remedy="take the file anew")
    return content
