"""MMMU's parser case by case, its files and disciplines; AI2D's match and files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import families
import pytest
from families import by_name, lines, parquet, replied
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import ai2d, mmmu
from llavakit.eval.benchmark import LETTER, SHORT, Answered, Question
from llavakit.eval.mmmu import choice, free, free_right, normal

FRUIT = {"A": "apple", "B": "banana pie", "C": "cherry", "D": ""}
LAND = {"A": "France", "B": "Spain", "C": "Italy"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("'B'", "B"),
        ("b", None),
        ("(A) or (C)", "C"),  # the last one said
        ("(C) or (A)", "A"),
        ("A B", "B"),
        ("A (B) C", "B"),  # brackets come first
        ("A, B", "B"),  # "A," is not the letter between blanks
        ("A)", None),
        ("The answer is: A", "A"),
        ("A.B", None),
        (",.!?;:'A'", "A"),
        (".,!?;:'A'", None),  # marks are taken off in one order, each kind once
        ("'A;'", None),
        ("", None),
        ("France", None),  # five words or fewer: no text is looked for
        ("I am sure that it is Spain", "B"),
        ("not France, it has to be ITALY of course", "C"),
        ("one two three four five", None),
    ],
)
def test_letters_are_read_as_the_official_parser_does(text: str, letter: str | None) -> None:
    assert choice(text, LAND) == letter


def test_an_option_without_text_stands_in_every_long_answer() -> None:
    assert choice("it is a very red cherry", FRUIT) == "D"  # found at the very end, which is last
    assert choice("cherry", FRUIT) is None


def test_what_cannot_be_read_is_wrong_or_drawn_as_the_official_parser_draws() -> None:
    assert choice("?", LAND) is None
    drawn = [choice("?", LAND, guess=dice) for dice in [random.Random(42)] for _ in range(5)]
    dice = random.Random(42)
    assert drawn == [dice.choice(["A", "B", "C"]) for _ in range(5)]
    assert choice("B", LAND, guess=dice) == "B"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        (" 3.14159 ", (3.14,)),
        ("1,234", (1234.0,)),
        ("-5", (-5.0,)),
        ("1e3", (1000.0,)),
        ("Two Words", ("two words",)),
        ("X", (" x", "x ")),
        ("", ("",)),
        ("5%", ("5%",)),
        (".5", (0.5,)),
        ("1/2", ("1/2",)),
    ],
)
def test_texts_and_numbers_take_one_form(text: str, form: tuple[Any, ...]) -> None:
    assert normal(text) == form


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5", {5.0}),
        ("", {""}),
        ("The answer is 1,234.5 dollars.", {"1,234.5 dollars", 1234.0, 234.5}),
        ("so x = 3", {3.0}),  # behind "=", which counts in the last line
        ("x = 3\nthus y = 4", {4.0}),
        ("the result is: blue", {"is: blue"}),
        ("it is .", {"it is"}),  # nothing stands behind "is ", so all is taken
        ("It is X", {" x", "x "}),
        ("no key here", {"no key here"}),
        ("1.2e-3 or 7", {"1.2e-3 or 7", 0.0, 1.0, -3.0, 7.0}),
        ("is a\nis b", {" a", "a ", " b", "b "}),
    ],
)
def test_free_answers_are_searched_as_officially(text: str, said: set[float | str]) -> None:
    assert free(text) == said


@pytest.mark.parametrize(
    ("text", "truths", "right"),
    [
        ("The answer is 24/7.", ["24/7", "3.429"], True),
        ("about 3.4289 units", ["24/7", "3.429"], True),
        ("The answer is 3.5", ["24/7", "3.429"], False),
        ("12", ["12.0"], True),
        ("It is not Paris", ["paris"], True),  # it stands in the text, whatever is said of it
        ("a", ["A"], True),
        ("banana", ["a"], False),  # a single letter needs a blank
        ("vitamin a", ["a"], True),
        ("", [""], True),
        ("", ["x"], False),
        ("nan", ["nan"], False),
    ],
)
def test_free_answers_are_right_as_officially(text: str, truths: list[str], right: bool) -> None:
    assert free_right(free(text), truths) == right


@given(st.text(max_size=60))
def test_any_reply_is_read(text: str) -> None:
    assert choice(text, LAND) in {None, *LAND}
    assert free(text)
    assert choice(text, LAND) in (None, choice(text, LAND, guess=random.Random(0)))


@given(st.sampled_from("ABC"), st.sampled_from(["{}", "({})", "{}.", "The answer is ({}).", "Answer: {}", "{} "]))
def test_a_letter_said_plainly_is_read(letter: str, form: str) -> None:
    assert choice(form.format(letter), LAND) == letter


# --- files --------------------------------------------------------------------------------------------------------------------------

CHOOSE: dict[str, Any] = {
    "id": "validation_Art_Theory_3",
    "question": "Who made <image 1>?",
    "options": "['Monet', \"Manet's son\"]",
    "answer": "B",
    "question_type": "multiple-choice",
    "image_1": "a.png",
}
FREE = CHOOSE | {"id": "validation_Math_14", "options": "[]", "answer": "['24/7', '3.429']", "question_type": "open"}


def ask(folder: Path, rows: list[dict[str, Any]], name: str = "llava-1.6") -> list[Question]:
    lines(folder / "validation.jsonl", *rows)
    return families.ask(mmmu.MMMU, folder, name)


def test_mmmu_asks_as_its_own_script_and_as_lmms_eval(tmp_path: Path) -> None:
    chosen, answered = ask(tmp_path, [CHOOSE, FREE], "llava-1.5")
    assert chosen.prompt == f"Who made <image 1>?\n(A) Monet\n(B) Manet's son\n\n{LETTER}"
    assert answered.prompt == f"Who made <image 1>?\n{SHORT}"
    assert (chosen.category, answered.category) == ("Art_Theory", "Math")
    assert (chosen.truth, answered.truth) == ("B", ("24/7", "3.429"))
    assert chosen.image is not None
    assert chosen.image.source == tmp_path / "a.png"
    chosen, answered = ask(tmp_path, [CHOOSE | {"options": ["Monet", "Manet"]}, FREE | {"answer": "[0, ∞"}])
    assert chosen.prompt == f"Who made <image 1>?\nA. Monet\nB. Manet\n\n{LETTER}"
    assert answered.prompt == f"Who made <image 1>?\n\n{SHORT}"
    assert answered.truth == ("[0, ∞",)


def test_mmmu_adds_up_by_subject_and_discipline(tmp_path: Path) -> None:
    rows = [CHOOSE, CHOOSE | {"id": "validation_Art_1"}, FREE, FREE | {"id": "validation_Physics_1"}]
    asked = ask(tmp_path, rows)
    answered = replied(asked, "B", "who knows", "it is 24/7", None)
    scores = by_name(mmmu.scores(answered))
    assert (scores["accuracy"].value, scores["accuracy"].headline, scores["accuracy"].count) == (50, True, 4)
    assert (scores["Art and Design"].value, scores["Science"].value) == (50, 50)
    assert (scores["Art_Theory"].value, scores["Art"].value, scores["Physics"].value) == (100, 0, 0)
    assert "Business" not in scores
    lucky = [by_name(mmmu.scores(answered, guess=random.Random(seed)))["accuracy"].value for seed in range(20)]
    assert set(lucky) == {50, 75}
    for one in answered:
        assert mmmu.verdict(one).points == mmmu.scores([one])[0].value / 100
    path = mmmu.submit(answered, tmp_path / "out")
    assert list(json.loads(path.read_text()).values()) == ["B", "", "it is 24/7", ""]


def test_thirty_subjects_stand_in_six_disciplines() -> None:
    subjects = [subject for of in mmmu.DISCIPLINES.values() for subject in of]
    assert (len(mmmu.DISCIPLINES), len(subjects), len(set(subjects))) == (6, 30, 30)


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ({"answer": "C"}, "the answer is 'C' of 2 options"),
        ({"answer": ""}, "the answer is '' of 2 options"),
        ({"image_1": None}, "no picture in image_1"),
        ({"question": None}, "question is not text"),
    ],
)
def test_faults_of_mmmu_are_told(tmp_path: Path, fault: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        ask(tmp_path, [FREE, CHOOSE | fault])
    assert caught.value.where.endswith("validation.jsonl:2")


def test_mmmu_reads_the_files_of_the_hub(tmp_path: Path) -> None:
    row = CHOOSE | {"image_1": {"bytes": b"\x89PNG", "path": None}}
    parquet(tmp_path / "Art" / "validation-00000-of-00001.parquet", row)
    (one,) = families.ask(mmmu.MMMU, tmp_path, "llava-1.5")
    assert one.image is not None
    assert (one.truth, Path(str(one.image.source)).read_bytes()) == ("B", b"\x89PNG")


# --- AI2D ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "same"),
    [("B", True), ("b", True), ("B.", True), ("(B)", True), (" B\n", True), ("B. fox", False), ("", False), ("BB", False), ("Ｂ", False)],
)
def test_ai2d_matches_without_case_and_punctuation(text: str, same: bool) -> None:
    assert ai2d.same(text, "B") == same


def ai2d_files(folder: Path) -> None:
    (folder / "questions").mkdir()
    for picture, labelled in (("7.png", False), ("8.png", True), ("9.png", False)):
        asking = {"What eats?": {"answerTexts": ["hen", "fox"], "correctAnswer": 1, "abcLabel": labelled, "questionId": f"{picture}-0"}}
        (folder / "questions" / f"{picture}.json").write_text(json.dumps({"imageName": picture, "questions": asking}))
    (folder / "ai2d_test_ids.csv").write_text("7\n8\n")
    (folder / "abc_images").mkdir()
    (folder / "abc_images" / "8.png").touch()


def test_ai2d_asks_its_test_split(tmp_path: Path) -> None:
    ai2d_files(tmp_path)
    asked = families.ask(ai2d.AI2D, tmp_path)
    assert [q.id for q in asked] == ["7.png-0", "8.png-0"]
    assert asked[0].prompt == f"What eats?\nA. hen\nB. fox\n{LETTER}"
    sources = [q.image.source for q in asked if q.image is not None]
    assert sources == [tmp_path / "images" / "7.png", tmp_path / "abc_images" / "8.png"]
    (score,) = ai2d.scores([Answered(question=asked[0], text="b."), Answered(question=asked[1], text=None)])
    assert (score.value, score.count, score.headline) == (50, 2, True)
    (tmp_path / "ai2d_test_ids.csv").unlink()
    with pytest.raises(DataError, match=r"no ai2d_test_ids\.csv"):
        families.ask(ai2d.AI2D, tmp_path)


def test_ai2d_reads_the_files_of_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no questions/"):
        families.ask(ai2d.AI2D, tmp_path, "llava-1.5")
    row = {"question": "What eats?", "options": ["hen", "fox"], "answer": "1", "image": {"bytes": b"\x89PNG", "path": None}}
    parquet(tmp_path / "test-0.parquet", row, row | {"answer": "2"})
    with pytest.raises(DataError, match="the answer is 2 of 2 options"):
        families.ask(ai2d.AI2D, tmp_path, "llava-1.5")
    parquet(tmp_path / "test-0.parquet", row)
    (one,) = families.ask(ai2d.AI2D, tmp_path, "llava-1.5")
    assert (one.truth, one.id) == ("B", "0")
