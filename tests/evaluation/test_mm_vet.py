"""MM-Vet: the grader's rows and tries, grades as the official file holds them, and the columns that they come to."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judging import LIMITS, Scripted, asked, command

from llavakit.errors import DataError, ResponderError
from llavakit.eval.benchmark import Answered
from llavakit.eval.mm_vet import (
    AGAIN,
    MM_VET,
    PROMPT,
    TRIES,
    Case,
    Job,
    Truth,
    cases,
    columns,
    grades,
    mixes,
    parse_grade,
    questions,
    read_grades,
    run,
    scores,
    submit,
    table,
    values,
    write_grades,
)
from llavakit.responder import Ledger, Query

DATA = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5", "imagesource": "u", "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_1.jpg", "question": "Who?", "answer": "Ann<OR>Anna", "imagesource": "u", "capability": ["rec", "know"]},
    "v1_2": {"imagename": "v1_2.jpg", "question": "Read it.", "answer": "Stop", "imagesource": "u", "capability": ["ocr"]},
}
CAPABILITIES = {name: row["capability"] for name, row in DATA.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mm-vet.json").write_text(json.dumps(DATA))
    return tmp_path


def job(**more: int) -> Job:
    told = [Case(id=name, question=str(row["question"]), candidate=f"answer {name}",
                 truth=Truth(answer=str(row["answer"]), capabilities=frozenset(row["capability"])))
            for name, row in DATA.items()]  # fmt: skip
    return Job(cases=told, **more)


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("0.5", 0.5), ("1.0", 1), ("0", 0), ("1", 1), (".5", 0.5), ("0.5 |", 0.5), ("0.7\n", 0.7), ("1.0 because", 1),
        ("0.5|", None), (" 0.5", None), ("", None), ("1.1", None), ("-0.1", None), ("nan", None), ("inf", None), ("Correct: 1.0", None),
        ("| 0.5", None), ("0,5", None), ("1e-1", 0.1), ("0.5\n0.7", None),
    ],
)  # fmt: skip
def test_a_grade_is_the_first_word(text: str, grade: float | None) -> None:
    assert parse_grade(text) == grade


def test_the_row_to_be_continued_ends_the_prompt() -> None:
    text = asked(job().query(job().cases[0], 0, 0))
    assert text == f"{PROMPT}\nWhat is x? | -1 <AND> -5 | answer v1_0 | "
    assert "Ann <OR> Anna" in asked(job().query(job().cases[1], 0, 0))
    assert asked(job().query(job().cases[0], 0, 1)) == f"{text}\n{AGAIN}"
    assert [job().query(job().cases[0], 0, n).sampling.temperature for n in range(len(TRIES))] == [0, 0, 0.5, 1, 1.5]
    assert job().query(job().cases[0], 0, 0).sampling.max_new_tokens == 3


def test_the_examples_are_a_table_whose_last_column_is_a_grade() -> None:
    rows = [line.split(" | ") for line in PROMPT.splitlines() if " | " in line]
    assert rows[0] == ["Question", "Ground truth", "Prediction", "Correctness"]
    assert rows[1] == ["---"] * 4
    assert {len(row) for row in rows} == {4}
    assert all(parse_grade(row[3]) is not None for row in rows[2:])


def test_what_is_no_grade_is_asked_differently_until_one_comes(tmp_path: Path) -> None:
    def say(query: Query) -> str:
        if "v1_1" not in asked(query):
            return "0.5"
        return "0.9" if query.sampling.temperature == 1 else "Right"

    judge, one = Scripted(say), job(runs=2)
    with Ledger(tmp_path / "l") as ledger:
        run(one, judge, ledger, limits=LIMITS)
        found = grades(one, judge.name, ledger)
        spent = judge.asked.total()
        run(one, judge, ledger, limits=LIMITS)
    assert values(found) == {"v1_0": [0.5, 0.5], "v1_1": [0.9, 0.9], "v1_2": [0.5, 0.5]}
    assert [grade.tries for grade in found["v1_1"]] == [4, 4]
    assert spent == judge.asked.total() == 2 * (1 + 4 + 1)
    assert set(judge.asked.values()) == {1}


def test_an_answer_without_a_grade_is_left_out_and_upstream_counts_nothing(tmp_path: Path) -> None:
    judge = Scripted(lambda query: "Right" if "v1_1" in asked(query) else "1.0")
    with Ledger(tmp_path / "l") as ledger:
        run(job(), judge, ledger, limits=LIMITS)
        found = grades(job(), judge.name, ledger)
        upstream = grades(job(upstream=True), judge.name, ledger)
    assert set(values(found)) == {"v1_0", "v1_2"}
    assert found["v1_1"][0].asked
    assert values(upstream)["v1_1"] == [0]
    assert columns(values(upstream), CAPABILITIES)["total"].mean == pytest.approx(200 / 3)


def test_a_run_that_is_stopped_says_what_is_still_to_be_asked(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        found = grades(job(), "scripted", ledger)
    assert not any(grade.asked for told in found.values() for grade in told)
    assert values(found) == {}


def test_a_question_counts_in_each_of_its_capabilities() -> None:
    given = {"v1_0": [1.0, 0.0], "v1_1": [0.5, 0.5], "v1_2": [0.0, 1.0]}
    found = columns(given, CAPABILITIES)
    assert list(found) == ["ocr", "know", "math", "rec", "total"]  # most frequent first
    assert found["ocr"] == (50, (50, 50), 2)
    assert found["math"] == (50, (100, 0), 1)
    assert found["total"] == (50, (50, 50), 3)
    assert mixes(given, CAPABILITIES)["math_ocr"] == (50, (100, 0), 1)
    assert set(mixes(given, CAPABILITIES)) == {"math_ocr", "know_rec", "ocr", "total"}


@given(st.lists(st.tuples(st.integers(0, 10), st.sets(st.sampled_from(("rec", "ocr", "know", "gen", "spat", "math")), min_size=1)),
                min_size=1, max_size=30))  # fmt: skip
def test_the_total_is_the_mean_of_the_mixes_weighed_by_their_questions(rows: list[tuple[int, set[str]]]) -> None:
    given = {f"v1_{n}": [grade / 10] for n, (grade, _) in enumerate(rows)}
    capabilities = {f"v1_{n}": kinds for n, (_, kinds) in enumerate(rows)}
    found = mixes(given, capabilities)
    total = found.pop("total")
    assert total.mean == pytest.approx(10 * statistics.fmean(grade for grade, _ in rows))
    assert sum(column.questions for column in found.values()) == len(rows)
    assert total.mean == pytest.approx(sum(column.mean * column.questions for column in found.values()) / len(rows))


def test_runs_are_told_with_the_deviation_of_the_official_grader() -> None:
    given = {"v1_0": [1.0, 0.0], "v1_1": [0.5, 0.5], "v1_2": [0.0, 0.1]}
    assert "runs: 50.0, 20.0; sd 15.0" in table(given, CAPABILITIES)
    (headline,) = [score for score in scores(given, CAPABILITIES) if score.headline]
    assert (headline.metric, headline.count) == ("total", 3)
    assert headline.value == pytest.approx(35)
    assert headline.half_width is not None


def test_grade_files_are_the_official_ones(tmp_path: Path) -> None:
    judge = Scripted(lambda query: "0.5" if query.sampling.seed else "1.0")
    with Ledger(tmp_path / "l") as ledger:
        run(job(runs=2), judge, ledger, limits=LIMITS)
        path = write_grades(tmp_path / "g.json", grades(job(runs=2), judge.name, ledger))
    row = json.loads(path.read_text())["v1_0"]
    assert row == {"model": ["scripted-0613"] * 2, "content": ["1.0", "0.5"], "score": [1.0, 0.5]}
    assert read_grades(path) == {name: [1.0, 0.5] for name in DATA}
    path.write_text('{"v1_0": {"score": [1]}, "v1_1": {"score": [1, 0]}}')
    with pytest.raises(DataError, match="graded more often"):
        read_grades(path)


def test_questions_and_upload(folder: Path) -> None:
    found = questions(folder, MM_VET.protocols[0])
    assert [(question.id, question.given) for question in found] == [("v1_0", 0), ("v1_1", 1), ("v1_2", 2)]
    assert found[0].prompt == "What is x?"
    assert found[0].category == "math_ocr"
    assert found[1].image is not None
    assert found[1].image.source == folder / "images" / "v1_1.jpg"
    answered = [Answered(question=question, text="“yes”" if question.given else None) for question in found]
    assert json.loads(submit(answered, folder).read_text()) == {"v1_0": "", "v1_1": "“yes”", "v1_2": "“yes”"}
    assert json.loads((folder / "mm-vet.json").read_text()) == DATA  # not written over


def test_answers_come_by_number_by_name_or_as_an_upload(folder: Path) -> None:
    ids: list[list[object]] = [[0, 1, 2], ["v1_0", "v1_1", "v1_2"]]
    for names in ids:
        rows = [{"question_id": name, "text": f"t{n}"} for n, name in enumerate(names)]
        random.Random(0).shuffle(rows)
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [case.candidate for case in cases(folder, folder / "a.jsonl")] == ["t0", "t1", "t2"]
    (folder / "a.json").write_text(json.dumps({f"v1_{n}": f"t{n}" for n in range(3)}))
    assert [case.candidate for case in cases(folder, folder / "a.json")] == ["t0", "t1", "t2"]
    (folder / "a.json").write_text('{"v1_0": "t", "v1_2": "t"}')
    with pytest.raises(DataError, match="question v1_1 has no answer"):
        cases(folder, folder / "a.json")


@pytest.mark.parametrize("row", [{}, {"imagename": "a", "question": "b", "answer": 3, "capability": []}, [], "x"])
def test_a_broken_file_is_told_with_the_question(tmp_path: Path, row: object) -> None:
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_0": row}))
    with pytest.raises(DataError, match="v1_0"):
        questions(tmp_path, MM_VET.protocols[0])


def test_published_numbers_are_those_of_the_table() -> None:
    told = {(p.name, n.model): n.value for p in MM_VET.protocols for n in p.published}
    assert told["llava-1.5", "1.5-7B"] == 31.1
    assert told["llava-1.6", "1.6-34B"] == 57.4
    assert {p.judge for p in MM_VET.protocols} == {"gpt-4-0613"}


def test_the_command_grades_and_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    judge = Scripted(lambda query: "Right" if "Who?" in asked(query) else "0.5")
    monkeypatch.setattr("llavakit.cli.judge._completer", lambda *given: judge)
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps({"question_id": n, "text": f"t{n}"}) + "\n" for n in range(3)))
    with pytest.raises(ResponderError, match=r"1 of 3 answers have no grade \(the first: v1_1\)"):
        command("mm-vet", path, folder, judge="scripted", runs=2)
    told = capsys.readouterr()
    assert "| total | 2 | 50.0 ± 0.0 |" in told.out
    assert "runs: 50.0, 50.0; sd 0.0" in told.out
    assert set(read_grades(folder / "answers.reviews" / "scripted-grade-2runs.json")) == {"v1_0", "v1_2"}
    page = (folder / "answers.reviews" / "scripted-grade-2runs.html").read_text()
    assert page.count("<article") == 3
    assert page.count('<article class="part">') == page.count("grade: 0.5 / 0.5") == 2
    assert f"grade: none (&#x27;Right&#x27; after {len(TRIES)} tries)" in page, "what has no grade is shown too"
    assert "-1&lt;AND&gt;-5" in page, "nothing is lost or run as HTML"
    spent = judge.asked.total()
    command("mm-vet", path, folder, judge="scripted", runs=2, upstream=True)
    assert "| total | 3 | 33.3" in capsys.readouterr().out
    assert judge.asked.total() == spent
    command("mm-vet", path, folder, judge="scripted", ignore="v1_1")
    with pytest.raises(DataError, match="no such file"):
        command("mm-vet", path, folder, judge="scripted", rules=folder / "no.txt")
