"""Answer files: ours are the same bytes every time, LLaVA's own find their questions, and what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import answers
from llavakit.eval.answers import match, read, written
from llavakit.eval.benchmark import Question


def asked(name: str, given: str | int, prompt: str, **fields: Any) -> Question:
    return Question(id=name, given=given, prompt=prompt, **fields)


def upstream(folder: Path, *rows: tuple[str | int, str, str]) -> Path:
    """As LLaVA's runners write: no id of ours."""
    fields = {"answer_id": "x", "model_id": "llava-v1.5-7b", "metadata": {}}
    lines = [json.dumps({"question_id": q, "prompt": p, "text": t} | fields) for q, p, t in rows]
    (folder / "theirs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "theirs.jsonl"


def texts(questions: list[Question], path: Path) -> list[str | None]:
    return [one.text for one in match(questions, read(path)).answered]


# --- ours -----------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet=st.characters(codec="utf-8")), min_size=1, max_size=5))
def test_any_text_comes_back(said: list[str]) -> None:
    questions = [asked(f"q{n}", 7, "What?") for n in range(len(said))]
    text = "".join(written(q, t, "m") + "\n" for q, t in zip(questions, said, strict=True))
    assert text.count("\n") == len(said)  # one line each, whatever stands in them
    found = match(questions, answers.lines(text, Path("x")))
    assert [one.text for one in found.answered] == said
    assert not list(found.remarks())


def test_a_line_has_the_fields_of_llavas_files_and_those_the_official_file_wants() -> None:
    question = asked("17-b", 17, "Which?\nA. x", extra=(("round_id", 0), ("options", ["x"]), ("option_char", ["A"])))
    line = json.loads(written(question, "A", "tiny"))
    assert list(line)[:6] == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (line["question_id"], line["prompt"], line["text"], line["model_id"]) == (17, "Which?\nA. x", "A", "tiny")
    assert (line["round_id"], line["options"], line["option_char"]) == (0, ["x"], ["A"])
    assert line["metadata"] == {"id": "17-b"}


def test_a_line_is_a_function_of_question_text_and_model() -> None:
    question = asked("1", 1, "What?")
    assert written(question, "a", "m") == written(question, "a", "m")
    ids = {json.loads(written(asked(name, 1, "What?"), text, model))["answer_id"] for name in "12" for text in "ab" for model in "mn"}
    assert len(ids) == 8


# --- theirs ---------------------------------------------------------------------------------------------------------------------------


def test_ids_that_repeat_are_told_apart_by_their_prompts(tmp_path: Path) -> None:
    """TextVQA: question_id is the picture's."""
    questions = [asked("a", "img", "Who?\nShort."), asked("b", "img", "Where?\nShort."), asked("c", "other", "Who?\nShort.")]
    path = upstream(tmp_path, ("other", "Who?\nShort.", "3"), ("img", "Where?\nShort.", "2"), ("img", "Who?\nShort.", "1"))
    assert texts(questions, path) == ["1", "2", "3"]


def test_ids_and_prompts_that_repeat_are_taken_in_order(tmp_path: Path) -> None:
    """POPE: the same question in three files, answered file by file."""
    questions = [asked(name, 1, "Is there a cat?") for name in ("random-1", "popular-1", "adversarial-1")]
    path = upstream(tmp_path, *((1, "Is there a cat?", text) for text in ("yes", "no", "maybe")))
    assert texts(questions, path) == ["yes", "no", "maybe"]


def test_numbers_and_their_spelling_are_one_id(tmp_path: Path) -> None:
    assert texts([asked("a", "5", "?")], upstream(tmp_path, (5, "?", "x"))) == ["x"]


@pytest.mark.parametrize(
    ("said", "prompt"),
    [
        ("<image>\nWhich?\nA. x\nPick one.", "Which?\nA. x\nPick one."),  # ScienceQA's runner writes the picture's place
        ("Which?\nA. x", "Which?\nA. x\nPick one."),  # MMBench's leaves the suffix out
        ("Which? ", "Which?"),
    ],
)
def test_what_runners_do_to_prompts_is_no_other_question(tmp_path: Path, said: str, prompt: str) -> None:
    found = match([asked("a", 1, prompt)], read(upstream(tmp_path, (1, said, "A"))))
    assert [one.text for one in found.answered] == ["A"]
    assert not found.reworded


def test_a_better_fit_comes_first_wherever_it_stands(tmp_path: Path) -> None:
    """The first line would fit any question of its id; the one that only fits the first question must not lose it."""
    questions = [asked("a", 1, "Who is it?"), asked("b", 1, "Who is it now?")]
    path = upstream(tmp_path, (1, "Something else", "2"), (1, "Who is it?", "1"))
    found = match(questions, read(path))
    assert [one.text for one in found.answered] == ["1", "2"]
    assert [line.number for line in found.reworded] == [1]
    assert "line 1 (1)" in " ".join(found.remarks())


def test_other_hints_are_told_and_the_question_itself_is_found(tmp_path: Path) -> None:
    questions = [asked("a", "img", "Who?\nReference OCR token: x\nShort."), asked("b", "img", "Where?\nReference OCR token: x\nShort.")]
    found = match(questions, read(upstream(tmp_path, ("img", "Where?\nShort.", "2"), ("img", "Who?\nShort.", "1"))))
    assert [one.text for one in found.answered] == ["1", "2"]
    assert [line.number for line in found.reworded] == [1, 2]


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    questions = [asked("a", 1, "?"), asked("b", 2, "?"), asked("c", 3, "?")]
    found = match(questions, read(upstream(tmp_path, (1, "?", "x"), (9, "?", "y"), (1, "?", "z"))))
    assert [q.id for q in found.missing] == ["b", "c"]
    assert [line.question_id for line in found.unknown] == ["9"]
    assert [(line.number, line.text) for line in found.duplicates] == [(3, "z")]
    assert [one.text for one in found.answered] == ["x", None, None]  # the first one counts
    missing, unknown, twice = found.remarks()
    assert missing.startswith("2 of 3 questions have no answer: b, c")
    assert "line 2 (9)" in unknown
    assert "line 3 (1)" in twice


def test_our_own_line_twice_counts_once(tmp_path: Path) -> None:
    question = asked("a", 1, "?")
    (tmp_path / "a.jsonl").write_text("".join(written(question, text, "m") + "\n" for text in ("x", "y")))
    found = match([question], read(tmp_path / "a.jsonl"))
    assert ([one.text for one in found.answered], [line.text for line in found.duplicates]) == (["x"], ["y"])


# --- broken files ---------------------------------------------------------------------------------------------------------------------


def test_a_last_line_that_was_cut_off_was_not_written(tmp_path: Path) -> None:
    question, path = asked("a", 1, "?"), tmp_path / "a.jsonl"
    whole = written(question, "x", "m")
    for cut in range(1, len(whole)):
        path.write_text(whole[:-cut])
        assert texts([question], path) == [None]
    path.write_text("\ufeff" + whole)  # whole, but for its line end; with the mark that some editors write
    assert texts([question], path) == ["x"]
    path.write_text("")
    assert texts([question], path) == [None]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{", "bad_json"),
        ("[" * 100_000, "bad_json"),
        ("7", "bad_answer"),
        ('{"question_id": 1}', "bad_answer"),
        ('{"text": "x"}', "bad_answer"),
        ('{"question_id": 1, "text": null}', "bad_answer"),
        ('{"question_id": 1.5, "text": "x"}', "bad_answer"),
        ('{"question_id": true, "text": "x"}', "bad_answer"),
        ('{"question_id": 1, "prompt": 3, "text": "x"}', "bad_answer"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, code: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question_id": 1, "text": "x"}}\n\n{line}\n{{"question_id": 2, "text": "x"}}\n')
    with pytest.raises(DataError) as caught:
        read(path)
    assert (caught.value.code, caught.value.where) == (code, f"{path}:3")
    assert caught.value.remedy


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"answers\.jsonl"):
        read(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "a.jsonl")
