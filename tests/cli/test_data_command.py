"""``llava data``: every problem with its place, figures, other formats, and one sample as a person reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Llava = Callable[..., Any]


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = {"id": "one", "image": "photo.png", "conversations": turns("<image>\nWhat is this?", "A red picture.", "Sure?", "Yes.")}
WORDS = {"id": "two", "conversations": turns("Say hello.", "Hello, <image>!")}
BAD = {"id": "three", "image": "none.png", "conversations": turns("<image>a", " ")}


@pytest.fixture
def data(folder: Path) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps([GOOD, WORDS]))
    return path


@pytest.fixture
def bad(folder: Path) -> Path:
    path = folder / "bad.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (GOOD, BAD, WORDS, 7)))
    return path


def test_check_is_quiet_about_good_files(llava: Llava, data: Path) -> None:
    done = llava("data", "check", data, "--open")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "2 records: 0 faults, 1 remark"
    assert "marker_in_reply data.json:[1] (id two)" in done.out


def test_check_lists_every_problem_and_fails(llava: Llava, data: Path, bad: Path) -> None:
    done = llava("data", "check", data, bad, "no-such-file.json")
    assert (done.code, done.err) == (1, "")
    for words in (
        "empty_reply bad.jsonl:2 (id three)",
        "image_missing bad.jsonl:2 (id three)",
        "bad_record bad.jsonl:4",
        "bad_file no-such-file.json",
    ):
        assert f"fault {words}" in done.out
    told = json.loads(llava("data", "check", data, bad, "--json").out)
    assert (told["records"], told["faults"], told["remarks"]) == (6, 3, 2)
    assert [finding["code"] for finding in told["files"][1]["findings"] if finding["kind"] == "fault"] == [
        "empty_reply",
        "bad_record",
        "image_missing",
    ]
    assert all(finding["where"] and finding["what"] for file in told["files"] for finding in file["findings"])


def test_stats(llava: Llava, data: Path, bad: Path, tiny_model_dir: Path) -> None:
    done = llava("data", "stats", data, bad)
    assert done.code == 0
    assert "2 usable samples" in done.out
    assert "1 with 0, 1 with 1" in done.out
    assert "bad.jsonl: 2 samples cannot be used" in done.err
    (told,) = json.loads(llava("data", "stats", data, "--model", tiny_model_dir, "--max-length", 10, "--json").out)
    assert (told["records"], told["samples"], told["images"], told["left_out"]) == (2, 2, {"0": 1, "1": 1}, 0)
    assert told["spreads"]["turns"]["total"] == 3
    assert told["cut"] == sum(n > 10 for n in tokens(llava, data, tiny_model_dir))
    llava("data", "stats", data, "--max-length", 10).failed(2, "--model")


def tokens(llava: Llava, data: Path, model: Path) -> list[int]:
    """As ``llava show`` counts them, which encodes the samples."""
    shown = [json.loads(llava("show", "--data", data, "--index", i, "--model", model, "--json").out) for i in range(2)]
    return [one["tokens"] for one in shown]


def test_stats_and_show_count_the_same_tokens(llava: Llava, data: Path, tiny_model_dir: Path) -> None:
    (told,) = json.loads(llava("data", "stats", data, "--model", tiny_model_dir, "--json").out)
    assert told["spreads"]["tokens"]["total"] == sum(tokens(llava, data, tiny_model_dir))


def test_convert_there_and_back(llava: Llava, data: Path, bad: Path) -> None:
    assert llava("data", "convert", data, "rows.jsonl").out == "rows.jsonl: 2 samples\n"
    assert llava("data", "convert", "rows.jsonl", "back.json").code == 0
    assert json.loads(Path("back.json").read_text()) == json.loads(data.read_text())
    llava("data", "convert", bad, "never.json").failed(1, "bad.jsonl:2 (id three)", "empty reply")
    assert not Path("never.json").exists()
    done = llava("data", "convert", bad, "some.json", "--skip-bad")
    assert done.out == "some.json: 2 samples\n"
    assert "left out empty_reply: 1 of 4" in done.err
    llava("data", "convert", data, "data.txt").failed(2, "does not end like")


def test_show_marks_what_is_learned(llava: Llava, data: Path) -> None:
    done = llava("data", "show", data)
    assert (done.code, done.err) == (0, "")
    assert "[[ A red picture.</s>]]" in done.out
    assert "[[ Yes.</s>]]" in done.out
    assert "<image>\nWhat is this?" in done.out
    assert "photo.png" in done.out
    told = json.loads(llava("data", "show", data, "--id", "two", "--json").out)
    assert told["id"] == "two"
    assert "".join(segment["text"] for segment in told["segments"] if segment["learned"]) == " Hello, <image>!</s>"
    llava("data", "show", data, 2).failed(2, "no sample 2", "it has 2")
    llava("data", "show", data, "--id", "x").failed(2, "no sample with the id")


def test_what_a_sample_says_cannot_steer_the_terminal(llava: Llava, data: Path) -> None:
    data.write_text(json.dumps([WORDS | {"conversations": turns("a\x1b[2J", "b\x1b]0;x\x07")}]))
    assert "\x1b" not in llava("data", "show", data).out
