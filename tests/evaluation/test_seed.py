"""SEED-Bench: the letter alone, by type and by kind of data; its files, LLaVA's, and the upload."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from families import answers, by_name
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import seed
from llavakit.eval.benchmark import LETTER, Answered, Question
from llavakit.eval.choices import seed_score

TYPES = {"Scene Understanding": 1, "Instances Counting": 5, "Action Recognition": 10}


def seed_question(given: str, kind: int = 1, answer: str = "A", data: str = "image") -> dict[str, Any]:
    choices = {f"choice_{letter}": f"{letter}{letter}" for letter in "abcd"}
    return {
        "question_id": given,
        "question_type_id": kind,
        "data_type": data,
        "data_id": f"pic_{given}",
        "question": "How many?",
        "answer": answer,
        **choices,
    }


def seed_files(folder: Path, questions: Sequence[Mapping[str, Any]]) -> None:
    (folder / "SEED-Bench.json").write_text(json.dumps({"question_type": TYPES, "questions": list(questions)}))


QUESTIONS = [
    seed_question("101", 1, "A"),
    seed_question("102", 1, "B"),
    seed_question("v1_7", 5, "C"),
    seed_question("9", 10, "D", "video"),
]


def test_seed_by_hand() -> None:
    """LLaVA's scorer on the same: ids as numbers where they can be, the letter alone, missing ones wrong."""
    said: dict[int | str, str] = {101: "A", 102: "B.", "v1_7": "C", 9: "D "}
    types, every = seed_score(QUESTIONS, said)
    assert (types, every) == ({1: 50, 5: 100, 10: 0}, 50)
    assert seed_score(QUESTIONS, said, only="image")[1] == pytest.approx(200 / 3)
    assert seed_score(QUESTIONS, said, only="video") == ({10: 0}, 0)
    assert seed_score(QUESTIONS, {"101": "A", "102": "B"})[1] == 0  # text is not the number it spells
    assert seed_score([], {}) == ({}, 0)


letters = st.sampled_from(["A", "B", "a", "A.", "", " A"])


@given(st.dictionaries(st.sampled_from([101, 102, "v1_7", 9]), letters))
def test_seed_scores_of_answers_are_those_of_the_reference(said: dict[int | str, str]) -> None:
    asked = [
        Question(id=q["question_id"], given=g, prompt="", category=f"{q['data_type']}/{name}", truth=q["answer"])
        for q, g, name in zip(QUESTIONS, (101, 102, "v1_7", 9), ("one", "one", "five", "ten"), strict=True)
    ]
    scores = by_name(seed.scores([Answered(question=q, text=said.get(q.given)) for q in asked]))
    types, every = seed_score(QUESTIONS, said)
    assert scores["all"].value == pytest.approx(every)
    assert [scores[name].value for name in ("one", "five", "ten")] == [pytest.approx(value) for value in types.values()]
    assert scores["image"].value == pytest.approx(seed_score(QUESTIONS, said, only="image")[1])
    assert scores["video"].value == seed_score(QUESTIONS, said, only="video")[1]


def ask_seed(folder: Path) -> list[Question]:
    return seed.questions(folder, seed.SEED.protocols[0])


def test_seed_asks_pictures_and_frames(tmp_path: Path) -> None:
    seed_files(tmp_path, QUESTIONS)
    asked = ask_seed(tmp_path)
    assert asked[0].prompt == f"How many?\nA. aa\nB. bb\nC. cc\nD. dd\n{LETTER}"
    assert [(q.given, q.category, q.truth) for q in asked] == [
        (101, "image/Scene Understanding", "A"),
        (102, "image/Scene Understanding", "B"),
        ("v1_7", "image/Instances Counting", "C"),
        (9, "video/Action Recognition", "D"),
    ]
    sources = [q.image.source for q in asked if q.image is not None]
    assert sources[0] == tmp_path / "SEED-Bench-image" / "pic_101"
    assert sources[3] == tmp_path / "SEED-Bench-video-image" / "10_9.png"
    eight = tmp_path / "v1_video" / "task10" / "ssv2_8_frame" / "9" / "4.png"
    eight.parent.mkdir(parents=True)
    eight.touch()
    last = ask_seed(tmp_path)[3].image
    assert last is not None
    assert last.source == eight


def test_upstreams_seed_file_rules_wording_and_place(tmp_path: Path) -> None:
    told = {"question_id": 101, "image": "elsewhere/a.png", "text": f"How many now?\nA. aa\n{LETTER}", "category": "x"}
    (tmp_path / "llava-seed-bench.jsonl").write_text(json.dumps(told) + "\n")
    alone = ask_seed(tmp_path)
    assert [(q.given, q.truth) for q in alone] == [(101, None)]
    assert seed.scores([Answered(question=q, text="A") for q in alone]) == []
    seed_files(tmp_path, QUESTIONS)
    asked = ask_seed(tmp_path)
    assert asked[0].prompt == alone[0].prompt == told["text"]
    assert asked[0].image == alone[0].image
    assert asked[0].truth == "A"
    assert len(asked) == 4


def test_the_upload_of_seed_keeps_official_ids(tmp_path: Path) -> None:
    seed_files(tmp_path, QUESTIONS)
    path = seed.submit(answers(ask_seed(tmp_path), {"101": "A", "9": "C"}), tmp_path / "out")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"question_id": "101", "prediction": "A"},
        {"question_id": "102", "prediction": ""},
        {"question_id": "v1_7", "prediction": ""},
        {"question_id": "9", "prediction": "C"},
    ]


def test_faults_of_seed_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no SEED-Bench\.json"):
        ask_seed(tmp_path)
    for fault, what in (
        ({"answer": "E"}, "answer is 'E'"),
        ({"question_type_id": 3}, "no name for question type 3"),
        ({"data_type": "sound"}, "data_type is 'sound'"),
        ({"choice_d": None}, "choice_d is not text"),
    ):
        seed_files(tmp_path, [QUESTIONS[0], {**QUESTIONS[1], **fault}])
        with pytest.raises(DataError, match=what) as caught:
            ask_seed(tmp_path)
        assert caught.value.where.endswith("SEED-Bench.json questions[1]")


def test_what_is_published_is_a_metric_that_is_scored() -> None:
    assert {published.metric for one in seed.SEED.protocols for published in one.published} == {"all", "image", "video"}
