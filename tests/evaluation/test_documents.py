"""ChartQA's relaxed accuracy and DocVQA's ANLS on cases worked out by hand; official files and parquet, made up and small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import ask, parquet, replied
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval.benchmark import SHORT, Answered, Benchmark
from llavakit.eval.documents import CHARTQA, DOCVQA, DOCVQA_TEST, anls, relaxed

PNG = b"\x89PNG\r\n\x1a\n made up"
words = st.text("abc ", max_size=8)


@pytest.mark.parametrize(
    ("prediction", "target", "right"),
    [
        ("14", "14", True),
        ("10.5", "10", True),  # 5 % exactly
        ("10.51", "10", False),
        ("9.5", "10", True),
        ("-9.6", "-10", True),
        ("9.6", "-10", False),
        ("50%", "0.5", True),
        ("50%", "50", False),
        ("5%%", "5%", True),
        ("%", "%", True),  # no number: a word
        ("0", "0", True),
        ("0.0", "0", False),  # a true 0 is compared as a word
        ("0.001", "0", False),
        ("Yes", "yes", True),
        (" yes", "yes", False),  # words are not trimmed
        (" 10 ", "10", True),  # numbers are, by float
        ("1,000", "1000", False),
        ("$5", "5", False),
        ("5.", "5", True),
        ("1e1", "10", True),
        ("1_0", "10", True),
        ("nan", "nan", False),
        ("inf", "inf", False),
        ("", "", True),
        ("", "5", False),
        ("five", "5", False),
        ("Café", "CAFÉ", True),
    ],
)
def test_relaxed(prediction: str, target: str, right: bool) -> None:
    assert relaxed(prediction, target) is right


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("hello", ["hello"], 1),
        ("HELLO", ["hello"], 1),
        ("helo", ["hello"], 0.8),
        ("ac", ["ab"], 0.5),  # one half is enough
        ("axx", ["abc"], 0),  # a third is not
        ("x", ["abc", "y", "x"], 1),  # the best answer counts
        ("a  b\n", ["a b"], 1),  # blanks are no edits
        ("  ab  ", ["ac"], 1 - 1 / 6),  # but they are length
        ("", ["abc"], 0),
        ("", [""], 1),
        ("ß", ["s"], 0.5),  # lengths are of capitals: SS
        ("0.28", ["0.28", "28"], 1),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float) -> None:
    assert anls(prediction, answers) == pytest.approx(score)


@given(words, st.lists(words, min_size=1, max_size=4))
def test_anls_is_zero_or_at_least_a_half(prediction: str, answers: list[str]) -> None:
    score = anls(prediction, answers)
    assert score == 0 or 0.5 <= score <= 1
    assert anls(prediction, answers[::-1]) == score
    assert anls(prediction, [*answers, prediction]) == 1


def scored(benchmark: Benchmark, folder: Path, *replies: str | None) -> dict[str, float]:
    assert benchmark.score is not None
    found = benchmark.score(replied(ask(benchmark, folder), *replies))
    return {one.metric: one.value for one in found}


def chartqa(folder: Path) -> None:
    (folder / "test_human.json").write_text(json.dumps([{"imgname": "1.png", "query": "How many?", "label": "14"}]))
    rows = [{"imgname": "2.png", "query": "Which?", "label": "Apples"}, {"imgname": "2.png", "query": "What share?", "label": "0.5"}]
    (folder / "test_augmented.json").write_text(json.dumps(rows))


def test_chartqa_from_the_official_files(tmp_path: Path) -> None:
    chartqa(tmp_path)
    asked = ask(CHARTQA, tmp_path)
    assert [(one.id, one.category) for one in asked] == [("human-0", "human"), ("augmented-0", "augmented"), ("augmented-1", "augmented")]
    assert asked[0].prompt == "How many?\nAnswer the question with a single word."
    assert asked[0].image is not None
    assert asked[0].image.source == tmp_path / "png" / "1.png"
    found = scored(CHARTQA, tmp_path, "14.5", "pears", "50%")
    assert found == pytest.approx({"accuracy": 200 / 3, "accuracy/human": 100, "accuracy/augmented": 50})
    assert scored(CHARTQA, tmp_path, None, None, None)["accuracy"] == 0


@pytest.mark.parametrize("form", ["lmms-lab", "HuggingFaceM4"])
def test_chartqa_from_parquet(form: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]]
    if form == "lmms-lab":
        rows = [
            {"question": "How many?", "answer": "14", "type": "human_test"},
            {"question": "Which?", "answer": "Apples", "type": "augmented_test"},
        ]
    else:
        rows = [
            {"query": "How many?", "label": ["14"], "human_or_machine": 0},
            {"query": "Which?", "label": ["Apples"], "human_or_machine": 1},
        ]
    image = {"bytes": PNG, "path": None}
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", *(row | {"image": image} for row in rows))
    asked = ask(CHARTQA, tmp_path)
    assert [(one.id, one.truth, one.category) for one in asked] == [("human-0", "14", "human"), ("augmented-0", "Apples", "augmented")]
    places = {one.image.source for one in asked if one.image is not None}
    assert len(places) == 1  # one picture, unpacked once
    place = places.pop()
    assert isinstance(place, Path)
    assert (place.parent, place.suffix, place.read_bytes()) == (tmp_path / "data" / "unpacked", ".png", PNG)


def test_docvqa(tmp_path: Path) -> None:
    rows = [
        {
            "questionId": 337,
            "question": "What is the date?",
            "image": "documents/a_1.png",
            "answers": ["1/8/93", "Jan 8"],
            "question_types": ["form"],
        },
        {"questionId": 338, "question": "Who?", "image": "documents/a_2.png", "answers": ["Ann"], "question_types": ["form", "layout"]},
    ]
    (tmp_path / "val_v1.0_withQT.json").write_text(json.dumps({"dataset_name": "docvqa", "data": rows}))
    asked = ask(DOCVQA, tmp_path)
    assert [(one.id, one.given, one.category) for one in asked] == [("337", 337, "form"), ("338", 338, "form, layout")]
    assert asked[0].prompt == f"What is the date?\n{SHORT}"
    assert asked[0].image is not None
    assert asked[0].image.source == tmp_path / "documents" / "a_1.png"
    assert scored(DOCVQA, tmp_path, "1/8/94", None) == pytest.approx({"anls": 100 * (5 / 6) / 2})
    assert DOCVQA.verdict is not None
    made = DOCVQA.verdict(Answered(question=asked[0], text=" JAN  8"))
    assert (made.parsed, made.points, made.expected) == ("jan 8", 1, "1/8/93 / Jan 8")


def test_docvqa_from_parquet_and_its_upload(tmp_path: Path) -> None:
    row = {"questionId": "57344", "question": "Who?", "question_types": ["form"], "image": {"bytes": PNG, "path": "a.png"}}
    parquet(tmp_path / "validation-00000-of-00001.parquet", row | {"answers": ["Ann"]})
    assert ask(DOCVQA, tmp_path)[0].truth == ("Ann",)
    parquet(tmp_path / "test-00000-of-00001.parquet", row)
    asked = ask(DOCVQA_TEST, tmp_path)
    assert asked[0].truth is None
    assert DOCVQA_TEST.submit is not None
    made = DOCVQA_TEST.submit([Answered(question=asked[0], text=" Ann. ")], tmp_path)
    assert json.loads(made.read_text()) == [{"questionId": 57344, "answer": " Ann. "}]


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no test_human\.json and test_augmented\.json and no test-"):
        ask(CHARTQA, tmp_path)
    (tmp_path / "test_human.json").write_text("[]")
    with pytest.raises(DataError, match=r"no test_augmented\.json"):
        ask(CHARTQA, tmp_path)
    (tmp_path / "val_v1.0.json").write_text('{"data": [{"questionId": "x", "question": "?"}]}')
    with pytest.raises(DataError, match="questionId 'x' is not a number"):
        ask(DOCVQA, tmp_path)


def test_published() -> None:
    assert [one.value for one in CHARTQA.protocols[0].published] == [54.8, 62.2, 38.8, 68.7]
    assert [one.value for one in DOCVQA.protocols[0].published] == [74.4, 77.5, 72.2, 84.0]
    assert {one.metric for one in DOCVQA.protocols[0].published} == {"anls"}
    assert not DOCVQA_TEST.protocols[0].published
