"""``llava data mixture`` and ``llava data scienceqa``: what is missing, what is not as published, and questions that train at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavakit.data.manifest import SHIPPED, shipped
from llavakit.data.sources import read_llava

Llava = Callable[..., Any]
MANIFEST = """
name: mine
sources:
  - name: talks
    title: somebody/talks
    file: talks.json
    images: pictures
    pictures: the pictures of talks
    count: 5
    parts:
      - {name: coco, count: 2, roots: [coco], pictures: some of COCO}
      - {name: words, count: 3}
"""


def record(number: int, **fields: Any) -> dict[str, Any]:
    marker = "<image>\n" if fields else ""
    return {"id": f"{number}", "conversations": [{"from": "human", "value": f"{marker}What?"}, {"from": "gpt", "value": "This."}]} | fields


@pytest.fixture
def talks(folder: Path) -> list[dict[str, Any]]:
    """A mixture of one file, whole."""
    (folder / "mine.yaml").write_text(MANIFEST, encoding="utf-8")
    (folder / "pictures/coco").mkdir(parents=True)
    (folder / "photo.png").rename(folder / "pictures/coco/0.png")
    records = [record(number, **({"image": "coco/0.png"} if number < 2 else {})) for number in range(5)]
    (folder / "talks.json").write_text(json.dumps(records), encoding="utf-8")
    return records


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_mixture_says_what_to_download(llava: Llava, name: str) -> None:
    done = llava("data", "mixture", name)
    assert (done.code, done.err) == (0, "")
    for spec in shipped(name).sources:
        assert all(words in done.out for words in (spec.title, str(spec.file), f"{spec.count:,}", spec.licence))
        assert all(part.name in done.out for part in spec.parts)
    assert json.loads(llava("data", "mixture", name, "--json").out)["name"] == name
    lost = llava("data", "mixture", name, "--images", ".")
    assert lost.code == 1
    assert f"missing {shipped(name).sources[0].file}" in lost.out


def test_a_whole_mixture_is_as_its_manifest_says(llava: Llava, talks: list[dict[str, Any]]) -> None:
    done = llava("data", "mixture", "mine.yaml", "--images", ".")
    assert (done.code, done.err) == (0, "")
    assert "talks: coco: 2 (as expected)" in done.out
    assert "talks: words: 3 (as expected)" in done.out
    told = json.loads(llava("data", "mixture", "mine.yaml", "--images", ".", "--json", "--share", "0.4").out)
    assert told["missing"] == []
    assert (told["sources"][0]["records"], told["sources"][0]["taken"]) == (5, 2)


def test_what_a_mixture_lacks(llava: Llava, folder: Path, talks: list[dict[str, Any]]) -> None:
    (folder / "talks.json").write_text(json.dumps(talks[:-1]), encoding="utf-8")
    (folder / "pictures/coco/0.png").unlink()
    done = llava("data", "mixture", "mine.yaml", "--images", ".")
    assert done.code == 1
    assert "left out image_missing: 2 of 4" in done.out
    assert "talks: coco: 0 (expected 2)" in done.out
    assert "talks: words: 2 (expected 3)" in done.out
    (folder / "pictures/coco").rmdir()
    assert "missing pictures/coco/ (talks: some of COCO)" in llava("data", "mixture", "mine.yaml", "--images", ".").out
    llava("data", "mixture", "mine.yml").failed(2, "no mixture 'mine.yml'", "llava-1.5-665k")


def entry(**fields: Any) -> dict[str, Any]:
    whole = {"question": "Q?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": None, "lecture": "L.", "solution": "S."}
    return whole | {"split": "train"} | fields


def test_scienceqa(llava: Llava, folder: Path) -> None:
    (folder / "problems.json").write_text(json.dumps({"1": entry(image="image.png"), "2": entry(answer=1)}), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps({"train": ["2", "1"]}), encoding="utf-8")
    (folder / "train/1").mkdir(parents=True)
    (folder / "photo.png").rename(folder / "train/1/image.png")
    assert llava("data", "scienceqa", ".", "train.json").out == "train.json: 2 samples, 1 with a picture\n"
    source = read_llava(folder / "train.json")  # the pictures are there
    assert [sample.id for sample in source] == ["2", "1"]
    assert source[0].conversation.turns[1].text == "L. S. The answer is B."
    assert llava("data", "scienceqa", ".", "bare.jsonl", "--code", "bare", "--original-names").code == 0
    lines = [json.loads(line) for line in (folder / "bare.jsonl").read_text().splitlines()]
    assert lines[1]["image"] == "1/image.png"
    assert [line["conversations"][1]["value"] for line in lines] == ["B", "A"]
    llava("data", "scienceqa", ".", "x.json", "--split", "test").failed(1, "no split 'test'", "train")
    llava("data", "scienceqa", ".", "x.parquet").failed(2, "x.parquet")
    assert not (folder / "x.json").exists()
