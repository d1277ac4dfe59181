"""MathVista: what rules read from a reply, the form of the truth, the prompts, and a judge that takes answers out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
from families import by_name, parquet, replied
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import mathvista
from llavakit.eval.benchmark import Answered, Question
from llavakit.eval.mathvista import Problem, extract, judged, most_similar, normal, quick, scores
from llavakit.responder import InTurn, Ledger, ScriptedResponder


def problem(kind: str, *, precision: int | None = None, choices: tuple[str, ...] = (), answer: str = "") -> Problem:
    question_type = "multi_choice" if choices else "free_form"
    return Problem(question_type=question_type, answer_type=kind, answer=answer, choices=choices, precision=precision)


PICK = problem("text", choices=("half", "quarter", "o'clock"))
WHOLE, TENTH, CENT, LIST = problem("integer"), problem("float", precision=1), problem("float", precision=2), problem("list")


@pytest.mark.parametrize(
    ("text", "of", "read"),
    [
        ("", WHOLE, ""),
        ("", PICK, ""),
        ("quarter", PICK, "quarter"),
        ("Quarter", PICK, None),
        ("B", PICK, None),
        ("14", WHOLE, "14"),
        (" 14\n", WHOLE, "14"),
        ("-0014", WHOLE, "-14"),
        ("14.0", WHOLE, None),
        ("1_000", WHOLE, "1000"),
        ("1,000", WHOLE, None),
        ("14", TENTH, "14.0"),
        ("1e3", TENTH, "1000.0"),
        ("nan", TENTH, "nan"),
        ("The number is 14.", WHOLE, None),
        ('The answer is "14".', WHOLE, "14"),
        ('Well. The answer is "half". Or "quarter".', PICK, 'half". Or "quarter'),
        ('The answer is "14"', WHOLE, None),
        ('the answer is "14".', WHOLE, None),
        ("[1, 2]", LIST, None),
    ],
)
def test_rules_read_what_those_of_the_reference_read(text: str, of: Problem, read: str | None) -> None:
    assert quick(text, of) == read


@pytest.mark.parametrize(
    ("extraction", "of", "form"),
    [
        ("A", PICK, "half"),
        ("C", PICK, "o'clock"),
        (" B ", PICK, "quarter"),
        ("(b) quarter", PICK, "quarter"),
        ("It is (A), not (B)", PICK, "half"),
        ("D", PICK, "half"),  # no such option: the choice with the fewest edits
        ("b", PICK, "half"),
        ("quarters", PICK, "quarter"),
        ("o clock", PICK, "o'clock"),
        ("f(x) is half", PICK, "half"),  # (x) is taken for a letter, X is nearest to the shortest
        ("", PICK, None),
        ("14", WHOLE, "14"),
        ("14.9", WHOLE, "14"),
        ("-0.5", WHOLE, "0"),
        ("1e2", WHOLE, "100"),
        ("fourteen", WHOLE, None),
        ("", WHOLE, None),
        ("nan", WHOLE, None),
        ("inf", WHOLE, None),
        ("1.25", TENTH, "1.2"),  # rounded to even, as Python does
        ("1.35", TENTH, "1.4"),
        ("1", TENTH, "1.0"),
        ("1.005", CENT, "1.0"),
        ("1.5%", CENT, None),
        ("1.5", problem("float"), None),
        ("[1, 2]", LIST, "[1, 2]"),
        ("", LIST, ""),
    ],
)
def test_answers_take_the_form_of_the_truth(extraction: str, of: Problem, form: str | None) -> None:
    assert normal(extraction, of) == form


def test_the_reference_gives_the_empty_answer_the_shortest_choice() -> None:
    assert normal("", PICK, empty_is_wrong=False) == "half"
    assert normal("", PICK) is None


def test_of_equally_similar_choices_the_first_is_taken() -> None:
    assert most_similar("cat", ["bat", "hat", "cat"]) == "cat"
    assert most_similar("cut", ["bat", "cat", "cot"]) == "cat"


# --- the files ----------------------------------------------------------------------------------------------------------------------

RECORD: dict[str, Any] = {
    "question": "How much?",
    "image": "images/1.jpg",
    "choices": None,
    "unit": "g",
    "precision": None,
    "answer": "12",
    "question_type": "free_form",
    "answer_type": "integer",
    "metadata": {"split": "testmini", "task": "word problem", "grade": "college", "skills": ["arithmetic", "logic"]},
}
CHOOSE = RECORD | {"choices": ["red", "blue"], "unit": None, "answer": "blue", "question_type": "multi_choice", "answer_type": "text"}


def ask(folder: Path, records: dict[str, Any] | None = None, name: str = "llava-1.6") -> list[Question]:
    if records is not None:
        (folder / "testmini.json").write_text(json.dumps(records))
    return families.ask(mathvista.MATHVISTA, folder, name)


def test_questions_are_asked_as_mathvista_hands_them_out(tmp_path: Path) -> None:
    whole, choose, tenth = ask(tmp_path, {"1": RECORD, "2": CHOOSE, "3": RECORD | {"answer_type": "float", "precision": 1.0, "unit": ""}})
    assert whole.prompt == (
        "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\n"
        "Question: How much? (Unit: g)"
    )
    assert choose.prompt == (
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: How much?\nChoices:\n(A) red\n(B) blue"
    )
    assert tenth.prompt.startswith("Hint: Please answer the question requiring a floating-point number with one decimal place and")
    assert tenth.prompt.endswith("\nQuestion: How much?")
    assert whole.image is not None
    assert whole.image.source == tmp_path / "images" / "1.jpg"
    assert whole.truth.groups == (("task", "word problem"), ("grade", "college"), ("skills", "arithmetic"), ("skills", "logic"))
    assert (tenth.truth.precision, whole.category) == (1, "word problem")


def test_prompts_of_the_official_file_are_taken_word_by_word(tmp_path: Path) -> None:
    (tmp_path / "query.json").write_text(json.dumps({"1": "So they ask."}))
    assert [q.prompt for q in ask(tmp_path, {"1": RECORD})] == ["So they ask."]
    assert ask(tmp_path, name=mathvista.SHORT_PROMPT)[0].prompt == "How much? (Unit: g)\nAnswer the question using a single integer number."
    choose = ask(tmp_path, {"1": CHOOSE}, mathvista.SHORT_PROMPT)[0]
    assert choose.prompt == "How much?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"answer": 12}, "answer is not text"),
        ({"question_type": "open"}, "question_type is 'open'"),
        ({"choices": ["a"]}, "1 choices for a question of type free_form"),
        ({"answer_type": "float", "precision": 3}, "no instruction for an answer of type float with precision 3"),
        ({"precision": "1"}, "precision is '1'"),
        ({"image": None}, "image is not text"),
    ],
)
def test_faults_are_told_with_the_problem(tmp_path: Path, fault: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        ask(tmp_path, {"1": RECORD, "2": RECORD | fault})
    assert caught.value.where.endswith("testmini.json problem 2")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no testmini\.json"):
        ask(tmp_path)


def test_the_parquet_files_of_the_hub_are_the_same_questions(tmp_path: Path) -> None:
    row = RECORD | {"pid": "1", "decoded_image": {"bytes": b"\x89PNG", "path": None}, "query": "So they ask."}
    parquet(tmp_path / "data" / "testmini-00000-of-00001.parquet", row)
    (one,) = ask(tmp_path)
    assert (one.prompt, one.truth.answer) == ("So they ask.", "12")
    assert one.image is not None
    assert Path(str(one.image.source)).read_bytes() == b"\x89PNG"


# --- scores and the judge -----------------------------------------------------------------------------------------------------------


def test_scores_by_hand_and_what_a_judge_adds(tmp_path: Path) -> None:
    asked = ask(tmp_path, {"1": RECORD, "2": CHOOSE, "3": RECORD, "4": CHOOSE, "5": RECORD})
    answered = replied(asked, " 12 ", "(B) blue", "It is 12.", "I would say blue", None)
    rules = by_name(scores(answered))
    assert rules["accuracy"].value == pytest.approx(60)  # 1, 2, 4; 3 holds no bare number, 5 is missing
    assert rules["read"].value == pytest.approx(40)  # 1 and 5: nothing needs no judge
    assert rules["question_type: multi_choice"].value == 100
    assert rules["skills: logic"].value == pytest.approx(60)
    assert [name for name, score in rules.items() if score.headline] == ["accuracy"]

    script = ScriptedResponder(["B", "12", "no answer"])
    judge = InTurn(script, "script")
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert judged(answered, judge.name, ledger) == {}
        extract(answered, judge, ledger)
        found = judged(answered, judge.name, ledger)
    assert found == {"2": "B", "3": "12", "4": ""}
    last = script.asked[1].messages[-1].text
    assert last.endswith("Question: How much? (Unit: g)\n\nModel response: It is 12.\n\nExtracted answer: ")
    with_judge = by_name(scores(answered, found))
    assert with_judge["accuracy"].value == pytest.approx(60)  # 3 is won, 4 is lost: its judge saw no answer
    assert with_judge["read"].value == 100


def test_a_verdict_is_the_score_of_one_question(tmp_path: Path) -> None:
    for question in ask(tmp_path, {"1": RECORD, "2": CHOOSE}):
        for text in ("12", "B", "", None, "red or (b)"):
            one = Answered(question=question, text=text)
            assert mathvista.verdict(one).points == scores([one])[0].value / 100


@given(st.text(max_size=20))
def test_any_reply_is_read_without_a_fault(text: str) -> None:
    for of in (PICK, WHOLE, TENTH, LIST):
        form = normal(quick(text, of) or text, of)
        assert form is None or isinstance(form, str)
        if of is PICK and form is not None:
            assert form in PICK.choices
