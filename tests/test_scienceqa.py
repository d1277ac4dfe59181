"""Laws of ``data.scienceqa``: every code is what the original's converter writes; every broken file is one typed line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.data.scienceqa import LETTERS, Problem, check_code, convert_scienceqa, read_problem, to_llava, turns
from llavakit.data.sources import read_llava
from llavakit.errors import DataError

ASKED = ["CQM", "QCM", "QCML", "QCME", "QCMLE", "QCLM", "QCEM", "QCLEM"]
ANSWERED = ["A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA"]
MAGNETS = Problem(
    id="7",
    question="Do they attract?",
    choices=("yes", "no"),
    answer=1,
    hint="Two magnets.",
    lecture="Like poles\\nrepel.",
    solution="Both are north.",
    image="image.png",
    split="val",
)

pieces = st.lists(st.sampled_from(["a", "b c", " ", "  ", "\n", "\\n", "?", "BECAUSE:", "é"]), max_size=6).map("".join)
problems = st.builds(
    Problem,
    id=st.just("1"),
    question=pieces,
    choices=st.lists(pieces, min_size=1, max_size=5).map(tuple),
    answer=st.just(0),
    hint=pieces,
    caption=pieces,
    lecture=pieces,
    solution=pieces,
)


def expected_question(p: Problem, code: str) -> str:
    """Read off the table of codes, one sentence a code; the reference is scripts/convert_sqa_to_llava of haotian-liu/LLaVA."""
    lecture, solution = p.lecture.replace("\\n", "\n"), p.solution.replace("\\n", "\n")
    question, context = f"Question: {p.question}\n", f"Context: {' '.join([p.hint, p.caption]).strip() or 'N/A'}\n"
    options = "Options: " + " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(p.choices)) + "\n"
    reasons = {"L": lecture, "E": solution, "LE": f"{lecture} {solution}"}
    told = code.strip("QCM") if code[-1] in "LE" else code[2:-1]
    because = f"BECAUSE: {reasons[told]}\n" if told else ""
    order = {"C": context + question, "Q": question + context}[code[0]]
    text = order + (options + because if code[-1] in "LE" else because + options)
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace("Question: ", "") if text.startswith("Question: ") else text


def expected_answer(p: Problem, code: str) -> str:
    lecture, solution = p.lecture.replace("\\n", "\n"), p.solution.replace("\\n", "\n")
    says = f"The answer is {p.letter}."
    text = {
        "A": f"Answer: {says}",
        "AL": f"Answer: {says} BECAUSE: {lecture}",
        "AE": f"Answer: {says} BECAUSE: {solution}",
        "ALE": f"Answer: {says} BECAUSE: {lecture} {solution}",
        "AEL": f"Answer: {says} BECAUSE: {solution} {lecture}",
        "LA": f"Answer: {lecture} {says}",
        "EA": f"Answer: {solution} {says}",
        "LEA": f"Answer: {lecture} {solution} {says}",
        "ELA": f"Answer: {solution} {lecture} {says}",
        "LEPA": (f"LECTURE: {lecture}\n" if lecture.strip() else "")
        + (f"SOLUTION: {solution}\n" if solution.strip() else "")
        + f"###\nANSWER: {p.letter}.",
    }[code]
    text = text.replace("  ", " ").strip()
    if text.endswith("BECAUSE:"):
        text = text.replace("BECAUSE:", "").strip()
    return text.replace("Answer: ", "") if text.startswith("Answer: ") else text


@settings(max_examples=200, deadline=None)
@given(problem=problems, asked=st.sampled_from(ASKED), answered=st.sampled_from(ANSWERED))
def test_every_code_is_the_original_conversion(problem: Problem, asked: str, answered: str) -> None:
    made = turns(problem, f"{asked}-{answered}")
    assert made == (expected_question(problem, asked), expected_answer(problem, answered))


def test_the_codes_of_the_released_models() -> None:
    question = "Do they attract?\nContext: Two magnets.\nOptions: (A) yes (B) no"
    told = "Like poles\nrepel."
    assert turns(MAGNETS, "QCM-LEA") == (question, f"{told} Both are north. The answer is B.")
    assert turns(MAGNETS, "QCM-LEPA") == (question, f"LECTURE: {told}\nSOLUTION: Both are north.\n###\nANSWER: B.")
    assert turns(replace(MAGNETS, hint=""), "CQM-A") == (
        "Context: N/A\nQuestion: Do they attract?\nOptions: (A) yes (B) no",
        "The answer is B.",
    )


def test_the_bare_lines_of_the_evaluation_file() -> None:
    """The picture first, a context only where there is one, the letter alone (spec 6.4)."""
    record = to_llava(MAGNETS, "bare")
    values = [turn["value"] for turn in record["conversations"]]
    assert values == ["<image>\nContext: Two magnets.\nDo they attract?\nA. yes\nB. no", "B"]
    assert turns(replace(MAGNETS, hint=""), "bare") == ("Do they attract?\nA. yes\nB. no", "B")


def test_nothing_to_tell_leaves_the_answer_alone() -> None:
    silent = replace(MAGNETS, lecture="", solution=" ")
    assert turns(silent, "QCM-ALE")[1] == "The answer is B."
    assert turns(silent, "QCM-LEPA")[1] == "###\nANSWER: B."
    assert turns(replace(silent, solution=""), "QCM-LEA")[1] == " The answer is B."  # the blank is in the files of the released runs


@pytest.mark.parametrize(
    "code", ["", "QCM", "QCM-", "-A", "QC-A", "QQCM-A", "QCM-LAE", "QCM-LE", "QCM-AA", "QCM-LLA", "QCM-PA", "qcm-lea", "QCM-LEA-"]
)
def test_a_code_that_is_none(code: str) -> None:
    with pytest.raises(DataError) as caught:
        check_code(code)
    assert caught.value.code == "unknown_code"
    assert "QCM-LEA" in str(caught.value)


# ---- files


def entry(**fields: Any) -> dict[str, Any]:
    whole = {"question": "Q?", "choices": ["x", "y"], "answer": 0, "hint": "", "image": None, "lecture": "L.", "solution": "S."}
    return whole | {"split": "train", "task": "closed choice"} | fields


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "problems.json").write_text(
        json.dumps({"1": entry(), "2": entry(image="image.png", split="val"), "3": entry(hint="H.", answer=1)}), encoding="utf-8"
    )
    (tmp_path / "pid_splits.json").write_text(json.dumps({"train": ["3", "1"], "minival": ["2"]}), encoding="utf-8")
    (tmp_path / "captions.json").write_text(json.dumps({"captions": {"2": "a red cube"}}), encoding="utf-8")
    return tmp_path


def test_a_split_in_its_order(folder: Path) -> None:
    assert [record["id"] for record in convert_scienceqa(folder)] == ["3", "1"]
    record = convert_scienceqa(folder, split="minival", captions=folder / "captions.json")[0]
    assert record["image"] == "2/image.png"
    assert record["conversations"][0]["value"] == "Q?\nContext: a red cube\nOptions: (A) x (B) y\n<image>"
    assert convert_scienceqa(folder, split="minival", split_in_name=True)[0]["image"] == "val/2/image.png"
    assert "image" not in convert_scienceqa(folder)[0]


@pytest.mark.parametrize("code", [*(f"{asked}-LEA" for asked in ASKED), *(f"QCM-{answered}" for answered in ANSWERED), "bare"])
def test_what_is_written_is_read(code: str, folder: Path) -> None:
    for split in ("train", "minival"):
        records = convert_scienceqa(folder, split=split, code=code)
        path = folder / "data.json"
        path.write_text(json.dumps(records), encoding="utf-8")
        source = read_llava(path, check_images=False)
        assert [sample.id for sample in source] == [record["id"] for record in records]
        assert not source.report.faults
        assert not source.report.remarks


@pytest.mark.parametrize(
    ("options", "code"),
    [({"split": "valid"}, "unknown_split"), ({"code": "QCM"}, "unknown_code"), ({"captions": Path("none")}, "bad_file")],
)
def test_what_is_asked_wrongly(options: dict[str, Any], code: str, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        convert_scienceqa(folder, **options)
    assert caught.value.code == code
    assert caught.value.remedy


@pytest.mark.parametrize("key", ["question", "choices", "answer", "hint", "image", "lecture", "solution", "split"])
def test_a_key_that_is_missing_or_wrong(key: str) -> None:
    whole = entry()
    for broken in ({k: v for k, v in whole.items() if k != key}, whole | {key: 1.5}, whole | {key: True}):
        with pytest.raises(DataError) as caught:
            read_problem("9", broken, where="problems.json")
        assert caught.value.code == "bad_problem"
        assert f"'{key}'" in str(caught.value)
        assert "problem 9" in caught.value.where


@pytest.mark.parametrize(
    "broken", [entry(answer=2), entry(answer=-1), entry(choices=[]), entry(choices=list("abcdef")), entry(choices=[1]), "x"]
)
def test_choices_and_answers_that_do_not_fit(broken: Any) -> None:
    with pytest.raises(DataError) as caught:
        read_problem("9", broken)
    assert caught.value.code == "bad_problem"


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("problems.json", None, "bad_file"),
        ("problems.json", b"{", "bad_json"),
        ("problems.json", b"\xff{}", "bad_json"),
        ("pid_splits.json", b"[]", "bad_file"),
        ("problems.json", b"{}", "unknown_problem"),
    ],
)
def test_a_file_that_is_broken(name: str, content: bytes | None, code: str, folder: Path) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        convert_scienceqa(folder)
    assert caught.value.code == code
    assert name in caught.value.where
