"""SEED-Bench: four choices about pictures and about the middle frame of videos, twelve types of question; the letter must stand alone.

    SEED-Bench.json           questions with answers: "question_type": {name: number}, "questions": [...]
    llava-seed-bench.jsonl    how LLaVA asked, and where it kept the pictures; used if it is there, enough for an upload alone
    SEED-Bench-image/         the pictures, by data_id
    SEED-Bench-video-image/   one frame a video as LLaVA cut them, 10_<question_id>.png; or the eight frames that SEED-Bench hands out

Ids are text in the one file and numbers in the other: as in LLaVA's scorer they are numbers wherever they can be read as such.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from llavakit.eval import intervals
from llavakit.eval.benchmark import LETTER, LLAVA_15, LLAVA_16, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import unique
from llavakit.eval.choices import lettered
from llavakit.eval.files import json_lines
from llavakit.eval.official import Row, find, number, read_object, read_rows, there
from llavakit.eval.published import with_numbers
from llavakit.types import Image

_FRAMES = {10: "task10/ssv2_8_frame", 11: "task11/kitchen_8_frame", 12: "task12/breakfast_8_frame"}
_MIDDLE = "4.png"  # of the eight frames 0.png ... 7.png


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """In the order of the official file; wording and pictures as in upstream's file where it has the question."""
    upstream = there(folder, "llava-seed-bench.jsonl")
    remedy = "put it there, or at least llava-seed-bench.jsonl"
    official = find(folder, "SEED-Bench.json", remedy=remedy) if upstream is None else there(folder, "SEED-Bench.json")
    told = {} if upstream is None else {number(row.id("question_id")): row for row in read_rows(upstream)}
    if official is not None:
        return unique(_official(official, folder, protocol, told), official)
    return [_upstream(given, row, folder, protocol) for given, row in told.items()]


def _official(path: Path, folder: Path, protocol: Protocol, told: Mapping[int | str, Row]) -> list[Question]:
    whole = read_object(path)
    types = whole.get("question_type")
    if not isinstance(types, dict):
        raise whole.fail("question_type is no object")
    names = {kind: name for name, kind in types.items()}
    found = []
    for row in read_rows(path, "questions"):
        kind, data = row.whole("question_type_id"), row.one_of("data_type", "image", "video")
        if kind not in names:
            raise row.fail(f"no name for question type {kind}")
        given = number(row.id("question_id"))
        shown = [row.text(f"choice_{letter}") for letter in "abcd"]
        if given in told:
            question = _bare(told[given])
            picture = folder / told[given].text("image")
        else:
            question, picture = lettered(row.text("question"), shown), _picture(row, folder, kind, data)
        found.append(
            Question(
                id=str(given),
                given=given,
                prompt=protocol.asked(question),
                image=Image(picture),
                category=f"{data}/{names[kind]}",
                truth=row.one_of("answer", *"ABCD"),
                row=(("question_id", row.id("question_id")),),
            )
        )
    return found


def _upstream(given: int | str, row: Row, folder: Path, protocol: Protocol) -> Question:
    return Question(
        id=str(given),
        given=given,
        prompt=protocol.asked(_bare(row)),
        image=Image(folder / row.text("image")),
        category=f"{'video' if 'video' in row.text('image') else 'image'}/{row.get('category', '')}",
        row=(("question_id", str(given)),),
    )


def _bare(row: Row) -> str:
    return row.text("text").removesuffix(f"\n{LETTER}")


def _picture(row: Row, folder: Path, kind: int, data: str) -> Path:
    """A picture by its name, a video's middle frame as LLaVA or SEED-Bench keep it; LLaVA's place where there is none."""
    if data == "image":
        return folder / "SEED-Bench-image" / row.text("data_id")
    given = row.id("question_id")
    own, eight = f"SEED-Bench-video-image/{kind}_{given}.png", f"{_FRAMES.get(kind)}/{given}/{_MIDDLE}"
    return there(folder, own, eight, f"v1_video/{eight}", f"SEED-Bench-video-image/{eight}") or folder / own


def scores(answered: Sequence[Answered]) -> list[Score]:
    """All, pictures, videos, then type by type."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for one in answered:
        if one.question.truth is not None:
            data, _, name = one.question.category.partition("/")
            for metric in ("all", data, name):
                hits[metric].append(one.text == one.question.truth)
    names = [name for name in ("all", "image", "video") if name in hits]
    return [intervals.mean(name, hits.pop(name), headline=name == "all") for name in names] + [
        intervals.mean(*item) for item in hits.items()
    ]


def verdict(answered: Answered) -> Verdict:
    truth = answered.question.truth
    return Verdict(parsed=answered.text or "", points=float(truth is not None and answered.text == truth), expected=truth or "")


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """One line a question, with the official id as the official file spells it; empty where there is no answer."""
    rows = ({**dict(one.question.row), "prediction": one.text or ""} for one in answered)
    return json_lines(folder / "submission.jsonl", rows)


SEED = Benchmark(
    name="seed",
    title="SEED-Bench: choices about pictures and videos",
    needs="SEED-Bench.json, SEED-Bench-image/, SEED-Bench-video-image/; LLaVA's llava-seed-bench.jsonl is used if it is there",
    reference="convert_seed_for_submission.py of haotian-liu/LLaVA. Departure: the upload holds an empty prediction where there is no"
    " answer, where that script stops",
    protocols=with_numbers(
        "seed",
        "all",
        LLAVA_15.but(suffix=LETTER, note="videos by their middle frame"),
        LLAVA_16.but(suffix=LETTER, note="the prompt format is the checkpoint's own; published for pictures only"),
    ),
    questions=questions,
    score=scores,
    verdict=verdict,
    submit=submit,
)
