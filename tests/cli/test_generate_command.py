"""``llava generate`` and ``llava caption``: offline without options, resumable, and every wrong word answered."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavakit.cli.asking import Asking
from llavakit.responder import Limits

Llava = Callable[..., Any]


@pytest.fixture
def scenes(llava: Llava) -> Path:
    assert llava("scenes", "export", "scenes", "--count", 8, "--workers", 1).code == 0
    return Path("scenes")


def test_without_words_it_draws_asks_and_writes_what_training_reads(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("generate", "--out", "try")
    assert (done.code, done.out) == (0, "try/report.html\ntry/finetune.json\n")
    assert "rows: " in done.err
    rows = [json.loads(line) for line in Path("try/rows.jsonl").read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"conversation", "detail", "reasoning"}
    assert llava("data", "check", "try/finetune.json", "--images", "try/scenes/images", "--open").out.endswith(": 0 faults, 0 remarks\n")
    shown = llava("show", "--model", tiny_model_dir, "--data", "try/finetune.json", "--images", "try/scenes/images", "--index", 2, "--json")
    assert json.loads(shown.out)["learned"] > 0
    before = Path("try/finetune.json").read_bytes()
    again = llava("generate", "--out", "try")
    assert "answered already" in again.err
    assert Path("try/finetune.json").read_bytes() == before


def test_kinds_counts_and_a_sample_with_its_page(llava: Llava, scenes: Path) -> None:
    done = llava("generate", scenes, "--kinds", "detail=3,reasoning=4", "--sample", 5, "--out", "some")
    assert (done.code, done.out) == (0, "some/report.html\nsome/finetune.json\n")
    sampled = [json.loads(line)["id"] for line in Path("some/rows.jsonl").read_text().splitlines()]
    assert Path("some/report.html").read_text().count("data:image/jpeg") == len(sampled)
    assert llava("generate", scenes, "--kinds", "detail=3,reasoning=4", "--out", "some", "--allow", "duplicate").code == 0
    kinds = [json.loads(line)["kind"] for line in Path("some/rows.jsonl").read_text().splitlines()]
    assert (kinds.count("detail"), kinds.count("reasoning")) == (3, 4)
    assert [json.loads(line)["id"] for line in Path("some/rows.jsonl").read_text().splitlines()][: len(sampled)] == sampled
    done = llava("generate", scenes, "--kinds", "detail", "--count", 2, "--out", "two")
    assert "rows: 2 (2 detail)" in done.err


def test_a_dry_run_asks_nobody(llava: Llava, scenes: Path) -> None:
    words = ("generate", scenes, "--teacher", "http://localhost:9/v1", "--model", "x", "--out", "dry", "--dry-run")
    done = llava(*words, "--price-in", 1, "--price-out", 4)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("questions: ")
    assert "at the given prices" in done.out
    assert "[system]" in done.out
    assert not Path("dry").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("none.jsonl",), (1, "no such file")),
        (("scenes", "--kinds", "poem"), (2, "--kinds")),
        (("scenes", "--kinds", "detail=3,reasoning"), (2, "--kinds")),
        (("scenes", "--kinds", "detail=30"), (2, "ask for fewer")),
        (("scenes", "--teacher", "nobody"), (2, "--teacher")),
        (("scenes", "--teacher", "http://localhost:9/v1"), (2, "--model")),
        (("scenes", "--allow", "all"), (2, "--allow")),
        (("scenes", "--prompts", "none"), (2, "none")),
        (("scenes", "--price-in", 1), (2, "--price-out")),
        (("scenes", "--images", "nowhere"), (1, "--images")),
        (("own.jsonl",), (2, "--teacher")),
        (("own.jsonl", "--teacher", "scenes"), (2, "drawn scenes only")),
    ],
)
def test_wrong_words(llava: Llava, scenes: Path, words: tuple[Any, ...], told: tuple[int, str]) -> None:
    Path("own.jsonl").write_text('{"id": "1", "image": "photo.png", "captions": ["A red picture."]}\n')
    done = llava("generate", *words, "--out", "bad")
    assert done.code == told[0]
    assert told[1] in done.err
    assert "Traceback" not in done.err


def test_our_own_model_captions_a_folder(llava: Llava, tiny_model_dir: Path) -> None:
    done = llava("caption", ".", "--model", tiny_model_dir, "--max-tokens", 4)
    assert (done.code, done.out) == (0, "captions.jsonl\n")
    assert "1 picture: " in done.err
    kept = [json.loads(line) for name in ("captions.jsonl", "captions.rejects.jsonl") for line in Path(name).read_text().splitlines()]
    assert [line["image"] for line in kept] == ["photo.png"]
    assert "1 known" in llava("caption", ".", "--model", tiny_model_dir, "--max-tokens", 4).err
    llava("caption", ".", "--teacher", "scenes").failed(2, "--teacher")
    llava("caption", "nowhere").failed(1, "nowhere")
    Path("schema.json").write_text('{"pattern": "x"}')
    llava("caption", ".", "--schema", "schema.json").failed(2, "pattern")


@pytest.mark.parametrize("command", ["generate", "caption"])
def test_a_server_that_is_not_there_is_a_failure_with_its_reason(llava: Llava, scenes: Path, command: str) -> None:
    with socket.socket() as nobody:  # a port that is taken, but where nobody listens
        nobody.bind(("127.0.0.1", 0))
        words = (scenes, "--count", 1) if command == "generate" else (scenes / "images",)
        server = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Asking, "limits", lambda self, again: Limits(retries=0, again=again))  # else it waits half a minute
            done = llava(command, *words, "--teacher", server, "--model", "x", "--out", "made")
    assert done.code == 1
    assert "no question got a reply; the last fault: " in done.err
    assert "onnect" in done.err
