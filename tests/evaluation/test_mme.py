"""MME: the parser and the scores worked out by hand from the reference, both forms of its folders, what its own tool is given."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
from families import by_name, lines
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import mme
from llavakit.eval.benchmark import SHORT, Answered, Question
from llavakit.eval.yes_no import COGNITION, PERCEPTION, mme_key, mme_says, mme_score, mme_scores

# MME: whole answer in small letters, else the first four characters hold yes, else no, else neither.
MME = {
    "": "other",
    "Yes": "yes",
    "YES": "yes",
    "no": "no",
    "NO.": "no",
    "Yes, it is": "yes",
    "No, it is not": "no",
    "Not at all": "no",
    "Unknown": "other",
    "know": "no",
    "I know": "other",
    "None": "no",
    "yes no": "yes",
    "noyes": "no",
    "n yes": "other",
    " yes": "yes",
    "  yes": "other",
    "  no": "no",
    "\nno": "no",
    "oh no": "other",
    "y": "other",
    "n": "other",
    "true": "other",
    "eyes": "yes",
    "是": "other",
    "NOİ": "no",
}


@pytest.mark.parametrize(("text", "said"), MME.items())
def test_mme_reads_as_its_reference(text: str, said: str) -> None:
    assert mme_says(text) == said


def test_mme_by_hand() -> None:
    rows = [("a", "Yes", "Yes"), ("a", "No", "no"), ("b", "Yes", "Yes"), ("b", "No", "yes"), ("c", "Yes", "what?"), ("c", "No", None)]
    task = mme_score(rows)
    assert (task.accuracy, task.accuracy_plus) == (3 / 6, 1 / 3)
    assert task.score == pytest.approx(50 + 100 / 3)
    assert (task.questions, task.pictures, task.other, task.missing) == (6, 3, 1, 1)


replies = st.sampled_from(["Yes", "No", "yes.", "other", None])


@given(st.lists(st.tuples(replies, replies), min_size=1, max_size=12), st.randoms())
def test_mme_is_between_nothing_and_200_and_order_is_nothing(pairs: list[tuple[str | None, str | None]], dice: object) -> None:
    rows = [(str(n), truth, text) for n, pair in enumerate(pairs) for truth, text in zip(("yes", "no"), pair, strict=True)]
    task = mme_score(rows)
    assert 0 <= task.score <= 200
    assert task.accuracy_plus <= task.accuracy
    dice.shuffle(rows)  # type: ignore[attr-defined]
    assert mme_score(rows).score == pytest.approx(task.score)
    assert mme_score([(p, t, t) for p, t, _ in rows]).score == 200


@pytest.mark.parametrize(
    ("prompt", "known", "key"),
    [
        (f"Is it red?\n{SHORT}", ["Is it red? Please answer yes or no."], "Is it red? Please answer yes or no."),
        (f"Is it red?\n{SHORT}", ["Is it red?  Please answer yes or no."], "Is it red?  Please answer yes or no."),
        ("Is it red?", [], "Is it red?  Please answer yes or no."),
        ("Is it red? Please answer yes or no.", [], "Is it red? Please answer yes or no."),
        (f"{SHORT} Is it red?", ["Is it red? Please answer yes or no."], "Is it red? Please answer yes or no."),
    ],
)
def test_the_official_question_is_found_behind_the_prompt(prompt: str, known: list[str], key: str) -> None:
    assert mme_key(prompt, known) == key


def mme_files(folder: Path) -> None:
    """One subtask in folders, one flat, one question with two blanks before the instruction."""
    (folder / "posters" / "images").mkdir(parents=True)
    (folder / "posters" / "questions_answers_YN").mkdir()
    (folder / "posters" / "images" / "tt1.jpg").touch()
    (folder / "posters" / "questions_answers_YN" / "tt1.txt").write_text(
        "Is it titled X? Please answer yes or no.\tYes\nIs it titled Y? Please answer yes or no.\tNo\n"
    )
    (folder / "color").mkdir()
    (folder / "color" / "0001.png").touch()
    (folder / "color" / "0001.txt").write_text("Red?  Please answer yes or no.\tno\nBlue? Please answer yes or no.\tYES")
    (folder / "eval_tool").mkdir()


def ask_mme(folder: Path, name: str = "llava-1.5") -> list[Question]:
    return families.ask(mme.MME, folder, name)


def test_mme_reads_both_forms_of_its_folders(tmp_path: Path) -> None:
    mme_files(tmp_path / "MME_Benchmark_release_version")
    asked = ask_mme(tmp_path)
    assert asked == ask_mme(tmp_path / "MME_Benchmark_release_version")
    assert [(q.given, q.prompt, q.truth) for q in asked] == [
        ("color/0001.png", f"Red?\n{SHORT}", "no"),
        ("color/0001.png", f"Blue?\n{SHORT}", "yes"),
        ("posters/images/tt1.jpg", f"Is it titled X?\n{SHORT}", "yes"),
        ("posters/images/tt1.jpg", f"Is it titled Y?\n{SHORT}", "no"),
    ]
    assert len({q.id for q in asked}) == 4
    assert ask_mme(tmp_path, "official")[0].prompt == "Red?\nPlease answer yes or no."


def test_upstreams_mme_asks_the_same_in_its_order(tmp_path: Path) -> None:
    mme_files(tmp_path / "MME_Benchmark_release_version")
    plain = {(q.given, q.prompt): (q.truth, q.row) for q in ask_mme(tmp_path)}
    rows: list[dict[str, object]] = [
        {"question_id": given, "image": given, "text": prompt, "category": str(given).split("/")[0]}
        for given, prompt in reversed(list(plain))
    ]
    lines(tmp_path / "llava_mme.jsonl", *rows)
    asked = ask_mme(tmp_path)
    assert [(q.given, q.prompt) for q in asked] == list(reversed(list(plain)))
    assert {(q.given, q.prompt): (q.truth, q.row) for q in asked} == plain
    rows[0]["text"] = "Is it another?"
    lines(tmp_path / "llava_mme.jsonl", *rows)
    with pytest.raises(DataError, match=r"llava_mme.jsonl:1: 'Is it another\?  Please"):
        ask_mme(tmp_path)


def test_what_is_wrong_with_mme_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no subtask of MME"):
        ask_mme(tmp_path)
    mme_files(tmp_path)
    text = tmp_path / "color" / "0001.txt"
    text.write_text("Red? Please answer yes or no.\tYes\n")
    with pytest.raises(DataError, match=r"color/0001.png has 1 "):
        ask_mme(tmp_path)
    text.write_text("Red? Please answer yes or no.\tYes\nBlue?\tperhaps\n")
    with pytest.raises(DataError, match=r"0001.txt:2: "):
        ask_mme(tmp_path)
    (tmp_path / "color" / "0001.png").unlink()
    text.write_text("Red?\tYes\nBlue?\tNo\n")
    with pytest.raises(DataError, match=r"no 0001\.png"):
        ask_mme(tmp_path)


def test_mme_adds_ten_and_four_subtasks_and_says_when_some_are_missing() -> None:
    def two(subtask: str, *texts: str) -> list[Answered]:
        return [
            Answered(question=Question(id=f"{subtask}{t}", given=f"{subtask}/1.png", prompt="", category=subtask, truth=t), text=text)
            for t, text in zip(("yes", "no"), texts, strict=True)
        ]

    every = [row for name in (*PERCEPTION, *COGNITION) for row in two(name, "Yes", "No" if name != "OCR" else "Yes")]
    scores = by_name(mme_scores(every))
    assert (scores["perception"].value, scores["cognition"].value) == (9 * 200 + 50, 800)
    assert (scores["OCR"].value, scores["OCR acc"].value, scores["OCR acc+"].value) == (50, 50, 0)
    assert [name for name, score in scores.items() if score.headline] == ["perception"]
    some = by_name(mme_scores([row for row in every if row.question.category in ("OCR", "count")]))
    assert some["perception (2 of 10 subtasks)"].value == 250
    assert "cognition" not in some


def test_mmes_own_tool_gets_its_columns(tmp_path: Path) -> None:
    mme_files(tmp_path)
    answered = [Answered(question=q, text="Yes,\tit\nis") for q in ask_mme(tmp_path)]
    assert mme.MME.submit is not None
    out = mme.MME.submit(answered, tmp_path / "out")
    written = (out / "color.txt").read_text().splitlines()
    assert [line.split("\t") for line in written] == [
        ["0001.txt", "Red?  Please answer yes or no.", "No", "Yes, it is"],
        ["0001.txt", "Blue? Please answer yes or no.", "Yes", "Yes, it is"],
    ]


def test_what_is_published_is_a_metric_that_is_scored() -> None:
    assert {p.metric for one in mme.MME.protocols for p in one.published} == {"perception", "cognition"}
    for text, points in (("Yes", 1), ("no", 0), ("maybe", 0), (None, 0)):
        one = mme.MME.verdict(Answered(question=Question(id="1", given="a/1.png", prompt="", truth="yes"), text=text))  # type: ignore[misc]
        assert one.points == points
