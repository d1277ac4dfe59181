"""Multiple choice: matching, rounds and CircularEval; the tables of MMBench, and what is handed in."""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest
from families import answers, by_name
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError, MissingExtraError
from llavakit.eval import mmbench
from llavakit.eval.benchmark import LETTER, Answered, Benchmark, Question
from llavakit.eval.choices import LETTERS, absent, circular, infer, infer_llava, lettered, rotated, until_absent

ANIMALS = {"A": "a cat", "B": "a dog", "C": "an owl", "D": "a dog and an owl"}

# Answers and what MMBench's matching makes of them without a judge: letters among words, else one option's text inside the answer.
INFER: dict[str, str | None] = {
    "A": "A",
    "A.": "A",
    "(B)": "B",
    "[C]": "C",
    "B: a dog": "B",
    "The answer is B.": "B",
    "**D**": "D",
    "{A}": "A",
    "b": None,
    "": None,
    " ": None,
    "A or B": None,
    "A A": "A",
    "A cat": "A",
    "AB": None,
    "E": None,
    "Z": "Z",
    "Z, not A": "A",
    "I see A CAT here": "A",
    "it is an owl": "C",
    "It Is A Cat, surely": "A",
    "it is a dog and an owl": None,  # three options stand in it
    "there is nothing": None,
    "B-": None,
    "Ｂ": None,
    "B。": None,
    "B\nbecause": "B",
}
# LLaVA's: the letter alone, "the answer is X.", else the answer inside one option's text.
INFER_LLAVA: dict[str, str | None] = {
    "A": "A",
    "a": "A",
    " b. ": None,  # full stops are taken off before blanks, so this stays "B."
    "..B..": "B",
    "B .": "B",
    "The answer is C.": "C",
    "I think THE ANSWER IS d.": "D",
    "The answer is A. The answer is B.": "A",
    "The answer is C": None,
    "cat": "A",
    "owl": None,
    "": None,
    "(B)": None,
    "E": None,
    "a dog and": "D",
}


@pytest.mark.parametrize(("text", "letter"), INFER.items())
def test_answers_are_matched_as_mmbench_does(text: str, letter: str | None) -> None:
    assert infer(text, ANIMALS) == letter


@pytest.mark.parametrize(("text", "letter"), INFER_LLAVA.items())
def test_answers_are_matched_as_llavas_script_does(text: str, letter: str | None) -> None:
    assert infer_llava(text, ANIMALS) == letter


def test_only_letters_of_options_are_letters() -> None:
    two = {"A": "yes", "B": "no"}
    assert infer("C", two) is None
    assert infer("A C", two) == "A"
    assert infer_llava("C", two) is None
    assert infer_llava("", {"A": "x"}) == "A"  # the empty answer stands in the only option


@pytest.mark.parametrize("cell", [None, float("nan"), "nan", "NaN", "none", "None", "NONE"])
def test_options_end_at_the_first_that_is_absent(cell: Any) -> None:
    assert absent(cell)
    assert until_absent(["x", cell, "y"]) == ("x",)


@pytest.mark.parametrize("cell", ["", " ", "0", "nano", 0.0, "none of them"])
def test_what_is_there_is_not_absent(cell: Any) -> None:
    assert not absent(cell)


options = st.lists(st.text(max_size=3), min_size=1, max_size=5)


@given(options, st.integers(0, 20))
def test_rotation_is_a_cycle(shown: list[str], turns: int) -> None:
    assert rotated(shown, len(shown)) == tuple(shown)
    assert rotated(rotated(shown, turns), 1) == rotated(shown, turns + 1)
    assert rotated(shown, turns)[0] == shown[turns % len(shown)]
    assert sorted(rotated(shown, turns)) == sorted(shown)


def test_rotation_of_nothing() -> None:
    assert rotated([], 3) == ()
    assert lettered("Q", []) == "Q"


def test_a_question_counts_only_if_right_under_every_shift() -> None:
    hits = [(1, True), (1_000_001, True), (2_000_001, True), (2, True), (1_000_002, False), (3, False), (1_000_003, True), (4, True)]
    assert circular(hits) == {1: True, 2: False, 3: False, 4: True}


def test_rounds_of_the_same_index_count_together_and_orphans_do_not_count() -> None:
    assert circular([(7, True), (7, True), (8, True), (8, False)]) == {7: True, 8: False}
    assert circular([(1_000_009, True), (5, True)]) == {5: True}
    assert circular([]) == {}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans())))
def test_circular_never_beats_any_single_round(rows: list[tuple[int, int, bool]]) -> None:
    hits = [(question + 1_000_000 * turn, right) for question, turn, right in rows]
    for question, right in circular(hits).items():
        own = [hit for index, hit in hits if index % 1_000_000 == question]
        assert right == all(own)
    assert circular(reversed(hits)) == circular(hits)


# --- MMBench ------------------------------------------------------------------------------------------------------------------------

COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment", "split"]
PICTURE = base64.b64encode(b"\x89PNG" + b"x" * 60).decode()


def row(index: int | str, question: str = "Which?", answer: str = "B", **cells: str) -> list[str]:
    values = {"A": "cat", "B": "dog", "C": "owl", "image": PICTURE, "category": "animals", "l2-category": "seeing", "split": "dev"}
    values |= {"index": str(index), "question": question, "answer": answer} | {k.replace("_", "-"): v for k, v in cells.items()}
    return [values.get(column, "") for column in COLUMNS]


def table(path: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([columns, *rows])
    return path


def ask(folder: Path, name: str = "llava-1.5", benchmark: Benchmark = mmbench.MMBENCH) -> list[Question]:
    return families.ask(benchmark, folder, name)


def test_mmbench_asks_hint_question_options_and_suffix(tmp_path: Path) -> None:
    table(
        tmp_path / "mmbench_dev_20230712.tsv", [row(241, hint="Line 1\n\nLine\t2"), row(7, "What?", C="None", D="lost"), row(8, hint="nan")]
    )
    first, second, third = ask(tmp_path)
    assert first.prompt == f"Line 1\n\nLine\t2\nWhich?\nA. cat\nB. dog\nC. owl\n{LETTER}"
    assert second.prompt == f"What?\nA. cat\nB. dog\n{LETTER}"  # options end at the first absent one
    assert third.prompt == f"Which?\nA. cat\nB. dog\nC. owl\n{LETTER}"
    assert (first.id, first.given, first.truth, first.category) == ("241", 241, "B", "seeing/animals")
    assert dict(first.extra) == {"round_id": 0, "options": ("cat", "dog", "owl"), "option_char": ("A", "B", "C")}
    assert first.image is not None
    assert first.image.source == base64.b64decode(PICTURE)
    assert first.image is second.image  # the bytes are kept once


def test_the_chinese_table_is_asked_in_chinese(tmp_path: Path) -> None:
    table(tmp_path / "mmbench_dev_cn_20231003.tsv", [row(1, "哪个？", A="猫", B="狗", C="")])
    assert ask(tmp_path, benchmark=mmbench.MMBENCH_CN)[0].prompt == "哪个？\nA. 猫\nB. 狗\n请直接回答选项字母。"


def test_all_rounds_move_the_options_and_the_truth_moves_along(tmp_path: Path) -> None:
    path = table(tmp_path / "any.tsv", [row(5), row(1_000_005, A="dog", B="owl", C="cat", answer="A")])
    asked = ask(path, mmbench.ALL_ROUNDS)
    assert [q.id for q in asked] == ["5-0", "5-1", "5-2"]  # the moved row is the same question
    assert [dict(q.extra)["options"] for q in asked] == [("cat", "dog", "owl"), ("dog", "owl", "cat"), ("owl", "cat", "dog")]
    assert [dict(q.extra)["option_char"] for q in asked] == [("A", "B", "C"), ("B", "C", "A"), ("C", "A", "B")]
    assert [q.truth for q in asked] == ["B", "A", "C"]
    for question in asked:
        shown = dict(question.extra)["options"]
        assert shown[LETTERS.index(question.truth)] == "dog"
        assert f"{question.truth}. dog" in question.prompt


def test_rounds_made_here_score_as_rows_made_there(tmp_path: Path) -> None:
    rows = [row(5), row(1_000_005, A="dog", B="owl", C="cat", answer="A"), row(2_000_005, A="owl", B="cat", C="dog", answer="C")]
    there = ask(table(tmp_path / "any.tsv", rows))
    here = ask(tmp_path, mmbench.ALL_ROUNDS)
    assert [q.prompt for q in there] == [q.prompt for q in here]
    assert mmbench.scores([Answered(question=q, text="(C)") for q in there]) == mmbench.scores(
        [Answered(question=q, text="(C)") for q in here]
    )


def test_mmbench_counts_as_its_server(tmp_path: Path) -> None:
    moved = {"A": "dog", "B": "owl", "C": "cat", "answer": "A"}
    rows = [row(1), row(1_000_001, **moved), row(2), row(1_000_002, **moved), row(3, category="plants"), row(4, category="plants")]
    asked = ask(table(tmp_path / "any.tsv", rows))
    said = {"1": "B", "1000001": "A.", "2": "B", "1000002": "B", "3": "it is the dog", "4": "cat or dog"}
    scores = by_name(mmbench.scores(answers(asked, said)))
    assert scores["circular"].value == 50  # 1 and 3; 2 fails when moved, 4 names two options
    assert (scores["circular"].count, scores["circular"].headline) == (4, True)
    assert scores["single"].value == 75
    assert (scores["animals"].value, scores["plants"].value, scores["seeing"].value) == (50, 50, 50)
    del said["1000001"]
    assert by_name(mmbench.scores(answers(asked, said)))["circular"].value == 25  # what is not answered is wrong
    llava = by_name(mmbench.scores(answers(asked, {"3": "do"}), how=infer_llava))
    assert llava["circular"].value == 25


def test_without_answers_in_the_table_there_is_no_score(tmp_path: Path) -> None:
    asked = ask(table(tmp_path / "any.tsv", [row(1, answer="")]))
    assert mmbench.scores(answers(asked, {"1": "A"})) == []
    assert mmbench.verdict(answers(asked, {"1": "A"})[0]).points == 0


def test_a_short_cell_names_the_row_with_the_picture(tmp_path: Path) -> None:
    asked = ask(table(tmp_path / "any.tsv", [row(1), row(1_000_001, image="1")]))
    assert asked[0].image is asked[1].image


def sheet_of(answered: Sequence[Answered], folder: Path) -> Any:
    """The upload, read back."""
    openpyxl = pytest.importorskip("openpyxl", reason="the optional openpyxl package is not installed (pip install 'llavakit[eval]')")
    return openpyxl.load_workbook(mmbench.submit(answered, folder)).active


def test_without_openpyxl_the_upload_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(MissingExtraError, match=r"llavakit\[eval\]"):
        mmbench.submit(answers(ask(table(tmp_path / "any.tsv", [row(1)])), {}), tmp_path)


def test_the_upload_has_exactly_the_columns_of_the_server(tmp_path: Path) -> None:
    odd = {"1": "=1+1", "2": "#N/A", "3": "12", "4": "a\x00b\ufffe" + "x" * 40_000, "5": "狗\n\"'"}
    rows = [row(n, A="=cat", B="7", D="None" if n == 1 else "bee") for n in range(1, 7)]
    asked = ask(table(tmp_path / "any.tsv", rows))
    sheet = sheet_of(answers(asked, odd), tmp_path / "out")
    written = list(sheet.iter_rows(values_only=True))
    assert written[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert written[1] == (1, "Which?", "=cat", "7", "owl", None, "=1+1", "B", "dev")
    assert [line[6] for line in written[2:4]] == ["#N/A", "12"]
    assert len(str(written[4][6])) == 32_767
    assert str(written[4][6]).startswith("abx")
    assert written[5][6] == "狗\n\"'"
    assert written[6][6] is None
    assert {sheet.cell(2, column).data_type for column in (2, 3, 4, 7)} == {"s"}
    assert sheet.cell(2, 1).data_type == "n"


def test_of_several_rounds_the_first_is_handed_in(tmp_path: Path) -> None:
    asked = ask(table(tmp_path / "any.tsv", [row(5)]), mmbench.ALL_ROUNDS)
    sheet = sheet_of(answers(asked, {"5-0": "B", "5-1": "A", "5-2": "C"}), tmp_path)
    assert [line[6] for line in sheet.iter_rows(values_only=True)] == ["prediction", "B"]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        (row("x"), "no whole number"),
        (row(2, image="%%%" + "x" * 80), "no base64"),
        (row(2, answer="D"), "the answer is 'D', the options are A, B, C"),
        (row(2, A=""), "no option A"),
        (row(2, question=""), "no question"),
        (row(2)[:5], "5 cells under 14 columns"),
    ],
)
def test_a_broken_row_of_mmbench_is_told_with_its_line(tmp_path: Path, broken: list[str], what: str) -> None:
    path = table(tmp_path / "any.tsv", [row(1, hint="two\nlines"), broken])
    with pytest.raises(DataError, match=what) as caught:
        ask(path)
    assert caught.value.where == f"{path}:4"


def test_other_faults_of_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mmbench_dev_20230712"):
        ask(tmp_path)
    with pytest.raises(DataError, match="two questions have the id 1"):
        ask(table(tmp_path / "a.tsv", [row(1), row(1)]))
    with pytest.raises(DataError, match="no column image"):
        ask(table(tmp_path / "a.tsv", [["1", "q", "x"]], ["index", "question", "A"]))
    (tmp_path / "a.tsv").write_bytes(b"index\tquestion\n\xff\xfe")
    with pytest.raises(DataError, match="no table"):
        ask(tmp_path)
    (tmp_path / "b.tsv").touch()
    with pytest.raises(DataError, match="one table of another name"):
        ask(tmp_path)


def test_reading_tables_leaves_the_limit_of_csv_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    big = base64.b64encode(b"y" * 200_000).decode()
    image = ask(table(tmp_path / "a.tsv", [row(1, image=big)]))[0].image
    assert image is not None
    assert isinstance(image.source, bytes)
    assert len(image.source) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("benchmark", [mmbench.MMBENCH, mmbench.MMBENCH_CN], ids=lambda one: one.name)
def test_what_is_published_is_a_metric_that_is_scored(benchmark: Benchmark) -> None:
    assert {published.metric for one in benchmark.protocols for published in one.published} == {"circular"}
    assert [one.name for one in benchmark.protocols] == ["llava-1.5", "llava-1.6", mmbench.ALL_ROUNDS]
