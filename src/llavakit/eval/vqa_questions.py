"""The questions of VQAv2, VizWiz and TextVQA, from LLaVA's own question files or from the official ones: the same prompts, byte for byte.

    LLaVA's     {question_id, image, text, category} a line; the suffix is in the text
    VQAv2       {"questions": [{question_id, image_id, question}]}    {"annotations": [{question_id, answer_type, answers: [{answer}]}]}
    VizWiz      [{image, question, (answers: [{answer}], answer_type)}]                               asked as "What is this? and ..."
    TextVQA     {"data": [{question_id, image_id, question, answers: [text]}]}  OCR: {"data": [{image_id, ocr_tokens}]}  likewise

VizWiz' and TextVQA's questions are asked with one capital, at the start, as upstream wrote them (``str.capitalize``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.eval.benchmark import Protocol, Question
from llavakit.eval.checks import unique
from llavakit.eval.official import Row, bad, find, pictures, read_rows, there
from llavakit.types import Image

PEOPLE = 10  # who answered each question
OCR = "Reference OCR token: "
_TEXTVQA, _UPSTREAM_OCR, _ROSETTA = "TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl", "TextVQA_Rosetta_OCR_v0.2_val.json"


def upstream(path: Path, folder: Path, protocol: Protocol) -> list[Question]:
    """A question file of LLaVA's. Right answers are not in it."""
    return [_upstream(row, path, folder, protocol) for row in read_rows(path)]


def _upstream(row: Row, path: Path, folder: Path, protocol: Protocol) -> Question:
    given = row.id("question_id")
    return Question(
        id=str(given), given=given, prompt=protocol.asked(row.text("text")), image=Image(folder / row.text("image")),
        category=str(row.get("category", "")), origin=path,
    )  # fmt: skip


def vqav2_listing(folder: Path) -> Path:
    """The file of all test2015 questions, which the upload must list."""
    return find(folder, "llava_vqav2_mscoco_test2015.jsonl", "v2_OpenEnded_mscoco_test2015_questions.json")


def vqav2_test_dev(folder: Path, protocol: Protocol) -> list[Question]:
    path = find(folder, "llava_vqav2_mscoco_test-dev2015.jsonl", "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    vqav2_listing(folder)  # missing at the end of a day of answers would be late
    if path.suffix == ".jsonl":
        return unique(upstream(path, pictures(folder, "test2015"), protocol), path)
    return unique([_vqav2(row, path, "test2015", protocol, None) for row in read_rows(path, "questions")], path)


def vqav2_val(folder: Path, protocol: Protocol) -> list[Question]:
    path = find(folder, "v2_OpenEnded_mscoco_val2014_questions.json")
    notes = find(folder, "v2_mscoco_val2014_annotations.json")
    known = {row.id("question_id"): row for row in read_rows(notes, "annotations")}
    found = []
    for row in read_rows(path, "questions"):
        given = row.id("question_id")
        if given not in known:
            raise bad(f"no annotation of question {given}", notes, "take questions and annotations of the same release")
        found.append(_vqav2(row, path, "val2014", protocol, known[given]))
    return unique(found, path)


def _vqav2(row: Row, path: Path, split: str, protocol: Protocol, note: Row | None) -> Question:
    given, number = row.id("question_id"), row.id("image_id")
    return Question(
        id=str(given),
        given=given,
        prompt=protocol.asked(row.text("question")),
        image=Image(path.parent / split / f"COCO_{split}_{int(number):012d}.jpg"),
        category="" if note is None else str(note.get("answer_type", "")),
        truth=None if note is None else people(note),
        origin=path,
    )


def people(row: Row) -> tuple[str, ...]:
    """What ten people answered: texts, or objects with an ``answer``."""
    listed = row.list("answers")
    entries = [each.get("answer") if isinstance(each, Mapping) else each for each in listed]
    said = tuple(each for each in entries if isinstance(each, str))
    if not len(said) == len(listed) == PEOPLE:
        raise row.fail(f"{len(listed)} answers, not {PEOPLE} texts")
    return said


def vizwiz_test(folder: Path, protocol: Protocol) -> list[Question]:
    """The id is the picture's name, by which the upload goes; question_id is upstream's, the place in the official file."""
    path = find(folder, "llava_test.jsonl", "test.json")
    place = pictures(folder, "test")
    return unique([_vizwiz(row, number, path, place, protocol) for number, row in enumerate(read_rows(path))], path)


def vizwiz_val(folder: Path, protocol: Protocol) -> list[Question]:
    path = find(folder, "val.json")
    place = pictures(folder, "val")
    return unique([_vizwiz(row, number, path, place, protocol) for number, row in enumerate(read_rows(path))], path)


def _vizwiz(row: Row, number: int, path: Path, place: Path, protocol: Protocol) -> Question:
    image = row.text("image")
    text = row.text("text") if "text" in row else row.text("question").capitalize()
    return Question(
        id=image,
        given=row.id("question_id") if "question_id" in row else number,
        prompt=protocol.asked(text),
        image=Image(place / image),
        category=str(row.get("answer_type", "")),
        truth=people(row) if "answers" in row else None,
        origin=path,
    )


def textvqa(folder: Path, protocol: Protocol) -> list[Question]:
    """``given`` is the picture's id, as in upstream's files. As there, of two equal questions on a picture the last one's people count."""
    path = find(folder, _TEXTVQA)
    notes = list(read_rows(path, "data"))
    place = pictures(folder, "train_images")
    hints = _Hints(folder) if protocol.hints else None
    truth = {_key(row): people(row) for row in notes}
    found = []
    for number, row in enumerate(notes):
        picture, text = row.text("image_id"), row.text("question").capitalize()
        lines = [text] if hints is None else [text, OCR + hints.of(row)]
        found.append(
            Question(
                id=str(row.get("question_id", f"{picture}-{number}")),
                given=picture,
                prompt=protocol.asked("\n".join(lines)),
                image=Image(place / f"{picture}.jpg"),
                truth=truth[_key(row)],
                origin=path,
            )
        )
    return unique(found, path)


def _key(row: Row) -> tuple[str, str]:
    return row.text("image_id"), row.text("question").lower()


class _Hints:
    """OCR tokens: of a question, in LLaVA's file, or else of a picture, in Rosetta's."""

    def __init__(self, folder: Path) -> None:
        self._upstream = there(folder, _UPSTREAM_OCR)
        self._path = self._upstream or find(folder, _UPSTREAM_OCR, _ROSETTA)
        self._tokens: dict[Any, str] = {}
        for row in read_rows(self._path, None if self._upstream else "data"):
            if self._upstream:
                self._tokens[row.text("question_id"), _line(row, 0).lower()] = _line(row, 1).removeprefix(OCR)
            else:
                self._tokens[row.text("image_id")] = ", ".join(map(str, row.list("ocr_tokens")))

    def of(self, row: Row) -> str:
        key = _key(row) if self._upstream else row.text("image_id")
        if key not in self._tokens:
            raise bad(f"no OCR tokens for {row.where}", self._path, "take the file of the same version (v0.5.1)")
        return self._tokens[key]


def _line(row: Row, number: int) -> str:
    lines: Sequence[str] = row.text("text").split("\n")
    if len(lines) != 3 or not lines[1].startswith(OCR):
        raise row.fail(f"not a question, a line {OCR!r} and a suffix", "take LLaVA's file anew")
    return lines[number]
