"""A folder of pictures: a line for each, in order, resumable, with bad pictures told and not in the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llavakit.datagen import library
from llavakit.errors import DataError
from llavakit.responder import InTurn, Ledger, Limits, ScriptedResponder, ask_all
from llavakit.types import Sampling

SCHEMA = {"type": "object", "properties": {"people": {"type": "integer"}}, "required": ["people"]}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number, name in enumerate(("b.png", "sub/a.JPG", "sub/deep/c.webp", ".hidden/d.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def job(folder: Path, **changes: object) -> library.Library:
    given = {"folder": folder, "names": library.pictures(folder), "questions": ("What?",), "sampling": Sampling(), "again": 1} | changes
    return library.Library(**given)  # type: ignore[arg-type]


def run(one: library.Library, replies: list[str], out: Path) -> dict[str, int]:
    with Ledger(out.with_suffix(".ledger")) as ledger:
        ask_all(one.queries(), InTurn(ScriptedResponder(replies), "script"), ledger, limits=Limits(again=one.again), judge=one.judge)
        return dict(+library.write(one, "script", ledger, out))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pictures_are_found_in_order(photos: Path, tmp_path: Path) -> None:
    assert library.pictures(photos) == ["b.png", "sub/a.JPG", "sub/deep/c.webp"]
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(DataError, match=str(bad)):
            library.pictures(bad)


def test_a_line_for_each_and_nothing_asked_twice(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    assert run(job(photos), ["One.", "Two.", "Three."], out) == {"answered": 3}
    expected = [
        {"image": name, "text": text, "teacher": "script"}
        for name, text in zip(library.pictures(photos), ("One.", "Two.", "Three."), strict=True)
    ]
    assert lines(out) == expected
    (photos / "b.png").rename(photos / "z.png")
    assert run(job(photos), [], out) == {"answered": 3}, "a renamed picture is known by its bytes"
    assert [line["image"] for line in lines(out)] == ["sub/a.JPG", "sub/deep/c.webp", "z.png"]


def test_several_questions(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    run(job(photos, questions=("What?", "Where?")), [str(number) for number in range(6)], out)
    assert [(line["image"], line["question"], line["text"]) for line in lines(out)][:2] == [
        ("b.png", "What?", "0"),
        ("b.png", "Where?", "1"),
    ]


def test_json_by_schema_is_checked_and_asked_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "album.jsonl"
    replies = ["two people", "none", '{"people": 2}', "none at all", '{"people": 0}', '{"people": 0}']
    found = run(job(photos, schema=SCHEMA, sampling=Sampling(temperature=1.0)), replies, out)
    assert sum(found.values()) >= 3
    known = [line["answer"] for line in lines(out)]
    assert {"people": 2} in known
    assert all(set(value) == {"people"} for value in known)
    wrong = lines(library.rejects_of(out))
    assert {line["text"] for line in wrong} == {"two people", "none", "none at all"}
    assert {line["reason"] for line in wrong} == {"no_json"}


def test_a_teacher_without_words_is_told_and_others_go_on(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    found = run(job(photos), ["One."], out)
    assert found == {"answered": 1, "failed": 2}
    assert {line["reason"] for line in lines(library.rejects_of(out))} == {"no_reply"}
