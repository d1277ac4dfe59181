"""GQA: exact match of what is uploaded, and the metrics beside it, each worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from families import ask, replied
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval.benchmark import SHORT, Answered, Question
from llavakit.eval.gqa import GQA, distribution, prediction

answers = st.sampled_from(["red", "blue", "yes"])


@pytest.mark.parametrize(
    ("reply", "uploaded"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("Yes...", "yes"), ("yes. ", "yes. "), (" yes", " yes"), ("", ""), ("...", ""), ("T.V.", "t.v"),
        ("yes.\n", "yes.\n"), ("ICE-cream!", "ice-cream!"), ("ÄRMEL.", "ärmel"),
    ],
)  # fmt: skip
def test_what_is_uploaded(reply: str, uploaded: str) -> None:
    assert prediction(reply) == uploaded


def question(answer: str, text: str = "Is it red?", **more: Any) -> dict[str, Any]:
    return {"question": text, "answer": answer, "imageId": "n1", "isBalanced": True, "entailed": [], **more}


def kind(structural: str, semantic: str = "attr", group: str | None = None, detailed: str = "x") -> dict[str, Any]:
    return {"types": {"structural": structural, "semantic": semantic, "detailed": detailed}, "groups": {"global": group, "local": "y"}}


FILE = {
    "1": question("red", "What color is it?", **kind("query", "attr", "color"), entailed=["1", "2"]),
    "2": question("yes", **kind("verify", "attr"), entailed=["1", "2", "3"]),
    "3": question("no", **kind("verify", "rel")),
    "4": question("red", "What color?", **kind("query", "attr", "color")),
    "5": question("blue", "What color is that?", **kind("query", "obj", "color")),
}


def asked(folder: Path, file: dict[str, Any] = FILE, protocol: str = "llava-1.5") -> list[Question]:
    tier = "all" if protocol == "all-questions" else "balanced"
    (folder / f"testdev_{tier}_questions.json").write_text(json.dumps(file), encoding="utf-8")
    return ask(GQA, folder, protocol)


def scored(questions: list[Question], *replies: str | None) -> dict[str, float]:
    assert GQA.score is not None
    return {one.metric: one.value for one in GQA.score(replied(questions, *replies))}


def test_questions_are_asked_as_upstream_does(tmp_path: Path) -> None:
    first = asked(tmp_path)[0]
    assert (first.id, first.given, first.prompt, first.category) == ("1", "1", f"What color is it?\n{SHORT}", "query")
    assert first.image is not None
    assert first.image.source == tmp_path / "images" / "n1.jpg"


def test_all_metrics_of_a_small_file(tmp_path: Path) -> None:
    found = scored(asked(tmp_path), "Red.", "yes", "yes", None, "red")
    assert found["accuracy"] == pytest.approx(40)  # 1 and 2
    assert found["binary"] == pytest.approx(50)  # 2, not 3
    assert found["open"] == pytest.approx(100 / 3)  # 1, not 4, 5
    assert found["consistency"] == pytest.approx(75)  # 1 implies 2 (right); 2 implies 1 (right) and 3 (wrong)
    # one group: red twice, blue once; predicted red twice (1 and 5), nothing else counts
    assert found["distribution"] == pytest.approx(((2 - 2) ** 2 / 2 + (0 - 1) ** 2 / 1) / 100)
    assert found["structural/query"] == pytest.approx(100 / 3)
    assert found["semantic/attr"] == pytest.approx(200 / 3)
    assert (found["words/02"], found["words/03"], found["words/04"]) == (0, 50, 50)
    assert "validity" not in found
    assert "steps/01" not in found


def test_groups_weigh_by_their_size() -> None:
    gold = {"a": {"red": 3, "blue": 1}, "b": {"yes": 2}}
    predicted = {"a": {"red": 1, "blue": 1, "green": 2}, "b": {"yes": 2}}
    assert distribution(gold, predicted) == pytest.approx((4 * (4 / 3) + 2 * 0) / 6 / 100)


@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(answers, st.integers(1, 9), min_size=1), min_size=1))
def test_the_true_distribution_is_best(gold: dict[str, dict[str, int]]) -> None:
    assert distribution(gold, gold) == 0
    assert distribution(gold, {}) > 0


def test_unbalanced_questions_count_for_consistency_only(tmp_path: Path) -> None:
    file = {"1": FILE["1"] | {"entailed": ["9"]}, "9": question("no", **kind("verify"), isBalanced=False)}
    found = scored(asked(tmp_path, file, "all-questions"), "red", "yes")
    assert found["accuracy"] == 100
    assert found["consistency"] == 0
    assert "binary" not in found


def test_consistency_is_left_out_where_an_entailed_question_was_not_asked(tmp_path: Path) -> None:
    file = {"1": FILE["1"] | {"entailed": ["1", "77"]}}
    assert "consistency" not in scored(asked(tmp_path, file), "red")
    assert "consistency" not in scored(asked(tmp_path), "green", "no", "no", None, None)  # nothing right implies anything


def test_a_choices_file_adds_validity_and_plausibility(tmp_path: Path) -> None:
    file = {"1": FILE["1"], "2": FILE["2"] | kind("query", detailed="twoCommon")}
    choices = {"1": {"valid": ["red", "blue"], "plausible": ["red"]}, "2": {"valid": ["yes"], "plausible": ["yes"]}}
    (tmp_path / "testdev_balanced_choices.json").write_text(json.dumps(choices))
    found = scored(asked(tmp_path, file), "blue", "color")  # of what is common, only the three kinds are valid
    assert (found["validity"], found["plausibility"]) == (100, 50)
    assert scored(asked(tmp_path, file), "blue", "yes")["validity"] == 50


def test_steps_of_reasoning(tmp_path: Path) -> None:
    program = [("select", "car (1)"), ("relate", "on,street,o (2)"), ("exist", "?")]
    file = {"1": FILE["1"] | {"semantic": [{"operation": name, "argument": argument} for name, argument in program]}}
    assert scored(asked(tmp_path, file), "red")["steps/02"] == 100


def test_upload(tmp_path: Path) -> None:
    questions = asked(tmp_path)[:2]
    assert GQA.submit is not None
    made = GQA.submit([Answered(question=questions[0], text="Red."), Answered(question=questions[1], text=" Yes. ")], tmp_path / "up")
    assert made.name == "testdev_balanced_predictions.json"
    assert json.loads(made.read_text()) == [{"questionId": "1", "prediction": "red"}, {"questionId": "2", "prediction": " yes. "}]
    with pytest.raises(DataError, match="have no answer"):
        GQA.submit([Answered(question=questions[0], text=None)], tmp_path)


def test_upstreams_file_alone_is_asked_but_not_scored(tmp_path: Path) -> None:
    line = {"question_id": "201307251", "image": "n161313.jpg", "text": f"Is it overcast?\n{SHORT}", "category": "default"}
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_text(json.dumps(line) + "\n")
    questions = GQA.questions(tmp_path, GQA.protocols[0])
    assert [(one.given, one.prompt) for one in questions] == [("201307251", f"Is it overcast?\n{SHORT}")]
    with pytest.raises(DataError, match=r"put testdev_balanced_questions\.json beside it"):
        scored(questions, "yes")


def test_official_files_are_found_where_upstream_wants_them(tmp_path: Path) -> None:
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "testdev_balanced_questions.json").write_text(json.dumps(FILE))
    first = GQA.questions(tmp_path, GQA.protocols[0])[0]
    assert first.image is not None
    assert first.image.source == tmp_path / "data" / "images" / "n1.jpg"


def test_verdict(tmp_path: Path) -> None:
    assert GQA.verdict is not None
    made = GQA.verdict(Answered(question=asked(tmp_path)[0], text="Blue."))
    assert (made.parsed, made.points, made.expected) == ("blue", 0, "red")


@pytest.mark.parametrize(
    ("content", "says"), [("[]", "not an object of questions"), ('{"7": 1}', "json 7: not an object"), ('{"7": {}}', "json 7: no answer")]
)
def test_bad_files_are_named(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "testdev_balanced_questions.json").write_text(content)
    with pytest.raises(DataError, match=says):
        GQA.questions(tmp_path, GQA.protocols[0])


def test_published() -> None:
    old, new = GQA.protocols[:2]
    assert {one.model: one.value for one in old.published}["1.5-7B"] == 62.0
    assert [one.value for one in new.published] == [64.2, 65.4, 64.8, 67.1]
