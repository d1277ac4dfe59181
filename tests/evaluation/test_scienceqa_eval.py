"""ScienceQA's scorer: what an answer says, what it counts in, and files in every form that was published."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.data.scienceqa import LETTERS, Problem, turns
from llavakit.errors import DataError
from llavakit.eval import scienceqa_files as files
from llavakit.eval.benchmark import LETTER, Answered, Protocol, Question
from llavakit.eval.scienceqa import (
    COLUMNS,
    FAILED,
    PROTOCOLS,
    SCIENCEQA,
    SCIENCEQA_IMG,
    columns,
    extract,
    gold,
    index,
    sentence,
    submit,
    tally,
    verdict,
)

BY_NAME = {protocol.name: protocol for protocol in PROTOCOLS}


# ---- what an answer says


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", FAILED),
        ("a", FAILED),
        ("", FAILED),
        ("AB", FAILED),
        (" B", FAILED),  # outer blanks are for whoever writes the file to take away
        ("B ", FAILED),
        ("B\n", FAILED),
        ("B.", FAILED),  # two characters: neither the letter nor the letter with '. '
        ("B. ", "B"),
        ("B. yes", "B"),
        ("B.yes", FAILED),
        ("B.\nyes", FAILED),
        ("B) yes", FAILED),
        ("F. yes", FAILED),
        ("b. yes", FAILED),
        ("B. The answer is C.", "B"),  # the beginning counts first
        ("(B) The answer is C.", "C"),
        ("The answer is B.", "B"),
        ("The answer is B", FAILED),  # a character must follow
        ("The answer is B\n", FAILED),  # and not a line end
        ("The answer is B,", "B"),  # but any other
        ("The answer is B\r\n", "B"),
        ("The answer is Bob.", "B"),
        ("The answer is Z.", "Z"),  # found, and beyond all choices
        ("The answer is (B).", FAILED),
        ("the answer is B.", FAILED),
        ("The answer is  B.", FAILED),
        ("The answer is B. The answer is B.", FAILED),  # said twice, even alike
        ("The answer is B. The answer is C.", FAILED),
        ("The answer is B. The answer is c.", "B"),
        ("LECTURE: L.\nSOLUTION: S.\n The answer is D.", "D"),
        ("The answer is A. BECAUSE: the poles differ.", "A"),
        ("Assistant: SOLUTION: S.\n The answer is C.###", "C"),
        ("SOLUTION: S.\n###\nANSWER: B.", FAILED),
        ("Ｂ", FAILED),
        ("FAILED", FAILED),
    ],
)
def test_what_an_answer_says(text: str, letter: str) -> None:
    assert extract(text) == letter


def test_the_sentence_alone() -> None:
    assert [sentence(text) for text in ("B", "B. yes", "The answer is B.")] == [FAILED, FAILED, "B"]


def test_which_choice_a_letter_names() -> None:
    assert [index(letter, 2) for letter in ("A", "B", "C", "Z", FAILED, "", "AB", "a")] == [0, 1, -1, -1, -1, -1, -1, -1]
    assert [index(letter, 5) for letter in LETTERS] == [0, 1, 2, 3, 4]
    dice, again = random.Random(7), random.Random(7)
    drawn = [index(FAILED, 3, dice) for _ in range(40)]
    assert set(drawn) == {0, 1, 2}
    assert drawn == [again.choice(range(3)) for _ in range(40)]
    assert index("B", 2, dice) == 1


pieces = st.lists(st.sampled_from(["a", "b c", " ", "\n", "?", "B. x", "(A)", "é", "The answer"]), max_size=6).map("".join)


@settings(max_examples=200, deadline=None)
@given(
    choices=st.lists(pieces, min_size=1, max_size=5).map(tuple),
    told=st.tuples(pieces, pieces),
    code=st.sampled_from(["QCM-A", "QCM-LEA", "QCM-ALE", "CQM-A", "QCM-AL", "QCM-EA", "bare"]),
    data=st.data(),
)
def test_a_model_that_answers_as_it_was_taught_is_understood(
    choices: tuple[str, ...], told: tuple[str, str], code: str, data: st.DataObject
) -> None:
    answer = data.draw(st.integers(0, len(choices) - 1))
    lecture, solution = (f"So, {text}" for text in told)  # no lecture begins with a letter and a full stop
    problem = Problem(id="1", question="Q?", choices=choices, answer=answer, lecture=lecture, solution=solution)
    said = turns(problem, code)[1].strip()
    assert index(extract(said), len(choices)) == answer


# ---- columns


def problem(**changes: Any) -> Problem:
    fields: dict[str, Any] = {"id": "7", "question": "Q?", "choices": ("x", "y"), "answer": 1, "subject": "natural science"}
    return Problem(**fields | {"grade": "grade6", "split": "test"} | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, ("NAT", "NO", "G1-6")),
        ({"hint": "H."}, ("NAT", "TXT", "G1-6")),
        ({"hint": " "}, ("NAT", "TXT", "G1-6")),  # the reference asks whether there is any character
        ({"image": "image.png"}, ("NAT", "IMG", "G1-6")),
        ({"image": ""}, ("NAT", "NO", "G1-6")),
        ({"hint": "H.", "image": "image.png", "grade": "grade7"}, ("NAT", "TXT", "IMG", "G7-12")),
        ({"subject": "social science", "grade": "grade1"}, ("SOC", "NO", "G1-6")),
        ({"subject": "language science", "grade": "grade12"}, ("LAN", "NO", "G7-12")),
        ({"caption": "a cat"}, ("NAT", "NO", "G1-6")),
    ],
)
def test_the_columns_of_a_question(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    assert columns(problem(**changes)) == named


@pytest.mark.parametrize("changes", [{"subject": ""}, {"subject": "math"}, {"grade": "grade13"}, {"grade": "6"}, {"grade": ""}])
def test_a_question_of_no_subject_or_grade_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        columns(problem(**changes))
    assert (caught.value.code, caught.value.where) == ("bad_problem", "problem 7")


def test_columns_by_hand() -> None:
    """Of ten, eight right: Wilson's interval is 49.0 to 94.3, half of it 22.66."""
    (*_, average) = tally([(gold(problem()), right) for right in [True] * 8 + [False] * 2])
    assert (average.metric, average.value, average.count, average.headline) == ("Avg", 80.0, 10, True)
    assert average.half_width == pytest.approx(22.66, abs=0.01)
    marks = [(gold(problem()), True), (gold(problem(hint="H.", image="i.png", grade="grade9")), False), (gold(problem(hint="H.")), True)]
    told = {one.metric: (round(one.value, 2), one.count) for one in tally(marks)}
    assert told == {"NAT": (66.67, 3), "TXT": (50, 2), "IMG": (0, 1), "NO": (100, 1), "G1-6": (100, 2), "G7-12": (0, 1), "Avg": (66.67, 3)}
    assert list(told) == [name for name in (*COLUMNS, "Avg") if name in told]
    assert tally([]) == []


# ---- the benchmark


def entry(**changes: Any) -> dict[str, Any]:
    whole = {"question": "Q?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": None, "lecture": "L.", "solution": "S."}
    return whole | {"split": "test", "subject": "natural science", "grade": "grade3"} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    problems = {
        "2": entry(answer=1),
        "5": entry(hint="H.", image="image.png", subject="social science", choices=["x", "y", "z"], answer=2),
        "9": entry(split="train"),
        "11": entry(image="image.png", grade="grade8"),
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems), encoding="utf-8")
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["9"], "test": ["11", "2", "5"]}), encoding="utf-8")
    return tmp_path


def asked(folder: Path, name: str) -> dict[str, Question]:
    return {question.id: question for question in SCIENCEQA.questions(folder, BY_NAME[name])}


def test_what_is_asked(folder: Path) -> None:
    bare = asked(folder, "llava-1.5")
    assert list(bare) == ["11", "2", "5"]
    assert bare["5"].prompt == f"Context: H.\nQ?\nA. x\nB. y\nC. z\n{LETTER}"
    assert bare["2"].prompt == f"Q?\nA. x\nB. y\n{LETTER}"
    assert asked(folder, "converted")["5"].prompt == f"Context: H.\nQuestion: Q?\nOptions: (A) x (B) y (C) z\n{LETTER}"
    for name in ("v1", "v0", "v0-greedy", "answer-first"):
        assert asked(folder, name)["2"].prompt == "Q?\nContext: N/A\nOptions: (A) x (B) y"
    assert bare["2"].image is None
    image = bare["5"].image
    assert image is not None
    assert image.source == folder / "images" / "test" / "5" / "image.png"
    assert bare["5"].conversation().images == (image,)
    (folder / "test").mkdir()
    image = asked(folder, "v1")["5"].image
    assert image is not None
    assert image.source == folder / "test" / "5" / "image.png"
    assert [question.id for question in SCIENCEQA_IMG.questions(folder, BY_NAME["llava-1.5"])] == ["11", "5"]


def test_protocols_say_how_they_draw_and_in_how_many_passes() -> None:
    assert BY_NAME["v0"].sampling.temperature == 0.7
    assert {name for name, one in BY_NAME.items() if one.passes == 2} == {"v0", "v0-greedy"}
    assert all(one.sampling.temperature == 0 for name, one in BY_NAME.items() if name != "v0")
    assert all(one.sampling.max_new_tokens == 1024 for one in PROTOCOLS)
    assert len(BY_NAME) == len(PROTOCOLS)
    metrics = {number.metric for one in PROTOCOLS for number in one.published}
    assert metrics == {*COLUMNS, "Avg"}


def test_the_words_of_the_converted_file_are_taken(folder: Path) -> None:
    records = [
        {"id": "2", "conversations": [{"from": "human", "value": "Which?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]},
        {"id": "5", "image": "5/image.png", "conversations": [{"from": "human", "value": "<image>\nWhere?\n"}]},
        {"id": 11, "image": "11/image.png", "conversations": [{"from": "human", "value": " Why?\n<image>"}]},
    ]
    path = folder / "llava_test_CQM-A.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    found = asked(folder, "llava-1.5")
    assert [found[name].prompt for name in ("2", "5", "11")] == [
        f"Which?\nA. x\nB. y\n{LETTER}", f"Where?\n{LETTER}", f"Why?\n{LETTER}",
    ]  # fmt: skip
    assert asked(folder, "converted")["2"].prompt.startswith("Context: N/A\nQuestion: Q?")
    assert asked(folder, "v1")["2"].prompt.startswith("Q?\n")
    path.write_text(json.dumps(records[:2]), encoding="utf-8")
    with pytest.raises(DataError, match="problem 11") as caught:
        asked(folder, "llava-1.5")
    assert caught.value.code == "unknown_problem"
    path.write_text(json.dumps([*records, {"id": "6", "conversations": []}]), encoding="utf-8")
    with pytest.raises(DataError, match="record 4 asks nothing"):
        asked(folder, "llava-1.5")


def answers(folder: Path, **texts: str | None) -> list[Answered]:
    return [Answered(question=one, text=texts.get(f"q{one.id}")) for one in asked(folder, "llava-1.5").values()]


def test_scores_and_verdicts(folder: Path) -> None:
    told = answers(folder, q2="B", q5="The answer is A.")
    assert {one.metric: (round(one.value, 2), one.count) for one in SCIENCEQA.score(told)} == {  # type: ignore[misc]
        "NAT": (50, 2), "SOC": (0, 1), "TXT": (0, 1), "IMG": (0, 2), "NO": (100, 1), "G1-6": (50, 2), "G7-12": (0, 1), "Avg": (33.33, 3),
    }  # fmt: skip
    assert [one.metric for one in SCIENCEQA.score(told) if one.headline] == ["Avg"]  # type: ignore[misc]
    assert [(v.parsed, v.points, v.expected) for v in map(verdict, told)] == [("FAILED", 0, "A"), ("B", 1, "B"), ("A", 0, "C")]
    assert SCIENCEQA_IMG.score is not None
    (pictured,) = SCIENCEQA_IMG.score(answers(folder, q2="B", q5="C. z", q11="E"))
    assert (pictured.metric, pictured.value, pictured.count, pictured.headline) == ("IMG", 50, 2, True)
    assert SCIENCEQA_IMG.score([]) == []


# ---- files


def test_the_result_file_of_the_original_script(folder: Path) -> None:
    path = submit(answers(folder, q2="B", q5="E. none"), folder / "out")
    assert json.loads(path.read_text()) == {
        "acc": 1 / 3 * 100,
        "correct": 1,
        "count": 3,
        "results": {"11": -1, "2": 1, "5": -1},
        "outputs": {"11": "FAILED", "2": "B", "5": "E. none"},
    }
    read = files.read_predictions(path)
    assert (read.texts, read.parsed) == ({"11": "FAILED", "2": "B", "5": "E. none"}, {"11": -1, "2": 1, "5": -1})
    assert (read.correct, read.count) == (1, 3)


FORMS: dict[str, Any] = {
    "answers.jsonl": [{"question_id": "1", "text": "A"}, {"question_id": 2, "prompt": "Q", "text": "The answer is B.", "metadata": {}}],
    "result.json": {"acc": 50.0, "correct": 1, "count": 2, "results": {"1": 0, "2": 1}, "outputs": {"1": "A", "2": "The answer is B."}},
    "published.json": {
        "problems": {"1": {}},
        "predictions": {"1": {"output": "A", "parsed": 0}, "2": {"output": "The answer is B.", "parsed": 1}},
    },
    "alone.json": {"1": {"output": "A"}, "2": {"output": "The answer is B."}},
    "plain.json": {"1": "A", "2": "The answer is B."},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("how", ["", "\ufeff", "indented"])
def test_answers_in_every_form(tmp_path: Path, name: str, how: str) -> None:
    path, form = tmp_path / name, FORMS[name]
    whole = "\n".join(map(json.dumps, form)) + "\n" if name.endswith("jsonl") else json.dumps(form, indent=2 if how else None)
    path.write_text(("\ufeff" if how == "\ufeff" else "") + whole, encoding="utf-8")
    read = files.read_predictions(path)
    assert read.texts == {"1": "A", "2": "The answer is B."}
    assert read.parsed == ({"1": 0, "2": 1} if name in ("result.json", "published.json") else {})


def test_one_line_is_one_answer_and_the_last_of_two_counts(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"question_id": "1", "text": "A"}')
    assert files.read_predictions(path).texts == {"1": "A"}
    path.write_text('{"question_id": "1", "text": "A"}\n\n{"question_id": 1, "text": "B"}\n')
    assert files.read_predictions(path).texts == {"1": "B"}


@pytest.mark.parametrize(
    ("text", "code", "where"),
    [
        ('{"question_id": "1", "text": "A"}\n{"question_id": "2", "te', "bad_json", ":2"),
        ("not json", "bad_json", ""),
        ('{"question_id": "1", "text": "A"}\n{"text": "A"}', "bad_answer", ":2"),
        ('{"question_id": true, "text": "A"}', "bad_answer", ":1"),
        ('{"outputs": {"1": 3}}', "bad_answer", " problem 1"),
        ('{"outputs": 3}', "bad_answer", ""),
        ("3", "bad_answer", ""),
    ],
)
def test_what_is_no_file_of_answers_is_named(tmp_path: Path, text: str, code: str, where: str) -> None:
    path = tmp_path / "answers"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        files.read_predictions(path)
    assert (caught.value.code, caught.value.where) == (code, f"{path}{where}")


def test_what_is_no_folder_of_scienceqa_is_named(folder: Path) -> None:
    def fails(code: str, where: str) -> None:
        with pytest.raises(DataError) as caught:
            asked(folder, "llava-1.5")
        assert (caught.value.code, caught.value.where) == (code, where)

    problems = folder / "problems.json"
    whole = json.loads(problems.read_text())
    for changed, code, where in (
        ({"11": entry(grade="old")}, "bad_problem", "problem 11"),
        ({"11": entry(choices=[])}, "bad_problem", f"{problems} problem 11"),
        ({"11": None}, "bad_problem", f"{problems} problem 11"),
    ):
        problems.write_text(json.dumps(whole | changed))
        fails(code, where)
    del whole["5"]
    problems.write_text(json.dumps(whole))
    fails("unknown_problem", str(problems))
    (folder / "pid_splits.json").write_text("{}")
    fails("unknown_split", str(folder / "pid_splits.json"))
    (folder / "pid_splits.json").write_text("[]")
    fails("bad_file", str(folder / "pid_splits.json"))
    (folder / "pid_splits.json").unlink()
    fails("bad_file", str(folder / "pid_splits.json"))


def test_a_protocol_of_ones_own_needs_a_known_name(folder: Path) -> None:
    assert SCIENCEQA.questions(folder, replace(BY_NAME["llava-1.5"], suffix=""))[1].prompt == "Q?\nA. x\nB. y"
    with pytest.raises(KeyError):
        SCIENCEQA.questions(folder, Protocol(name="mine"))
