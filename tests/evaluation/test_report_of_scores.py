"""A score stands beside the published ones with a verdict that follows from the numbers, and with none where the asking differed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.cli.results import results
from llavakit.errors import DataError
from llavakit.eval import report
from llavakit.eval.benchmark import Benchmark, Protocol, Published, Question, Score
from llavakit.eval.benchmarks import ALL
from llavakit.eval.protocols import page
from llavakit.eval.published import table
from llavakit.eval.report import Result, Rows
from llavakit.eval.run_folder import RUN

PROTOCOL = Protocol(
    name="llava-1.5",
    template="vicuna_v1",
    aspect="pad",
    suffix="Short.",
    hints=True,
    note="Hints are Rosetta's",
    published=(
        Published(model="7B", metric="accuracy", value=58.2, tolerance=0.5, source="paper"),
        Published(model="13B", metric="accuracy", value=61.3, tolerance=0.5, source="paper"),
        Published(model="7B", metric="recall", value=80.0, tolerance=2.0, source="paper"),
    ),
)
AS_ASKED = {"template": "vicuna_v1", "aspect": "pad", "suffix": "Short.", "hints": True, "max_new_tokens": 128, "questions": 5000}


def unread(folder: Path, protocol: Protocol) -> list[Question]:
    raise AssertionError("a report reads no questions")


TEXT = Benchmark(
    name="textvqa",
    title="TextVQA, validation",
    needs="two files",
    reference="M4C; blanks are stripped",
    protocols=(PROTOCOL,),
    questions=unread,
)


def run(value: float = 58.0, **facts: object) -> Result:
    score = Score(metric="accuracy", value=value, count=5000, half_width=1.3, headline=True)
    return Result(benchmark="textvqa", protocol="llava-1.5", model="ours", scores=(score,), facts=AS_ASKED | facts)


def verdicts(found: Result, protocol: Protocol = PROTOCOL, against: Sequence[str] = ()) -> list[str]:
    return [line.verdict for line in report.compare(found, protocol, against=against)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(58.2, "within"), (58.7, "within"), (57.7, "within"), (58.71, "above"), (57.69, "below"), (0.0, "below"), (100.0, "above")],
)
def test_the_verdict_follows_from_the_tolerance(value: float, expected: str) -> None:
    assert verdicts(run(value), against=["7B"]) == [expected]


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 20))
def test_a_verdict_is_one_of_three(ours: float, printed: float, tolerance: float) -> None:
    number = Published(model="m", metric="accuracy", value=printed, tolerance=tolerance)
    (line,) = report.compare(run(ours), replace(PROTOCOL, published=(number,)))
    assert line.difference == ours - printed
    assert line.verdict == ("within" if abs(round(ours - printed, 6)) <= tolerance else "above" if ours > printed else "below")


def test_each_score_meets_the_numbers_of_its_metric() -> None:
    found = run()
    both = replace(found, scores=(*found.scores, Score(metric="recall", value=81, count=9), Score(metric="others", value=1, count=9)))
    lines = report.compare(both, PROTOCOL)
    models = [(line.score.metric, line.published and line.published.model) for line in lines]
    assert models == [("accuracy", "7B"), ("accuracy", "13B"), ("recall", "7B"), ("others", None)]
    assert report.compare(both, None)[0].published is None
    assert [line.verdict for line in lines] == ["within", "below", "within", ""]


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("template", "llava_hf", "template llava_hf, published with vicuna_v1"),
        ("aspect", "crop", "aspect crop, published with pad"),
        ("hints", False, "hints not shown, published with shown"),
        ("suffix", "", "suffix '', published with Short."),
        ("max_new_tokens", 16, "max_new_tokens 16, published with 128"),
        ("asked", 100, "100 of 5,000 questions"),
    ],
)
def test_another_asking_is_not_compared(fact: str, value: object, words: str) -> None:
    for line in report.compare(run(58.2, **{fact: value}), PROTOCOL):
        assert (line.verdict, line.reasons) == ("not comparable", (words,))


def test_another_judge_is_not_compared() -> None:
    judged = replace(PROTOCOL, judge="gpt-4-0314")
    assert verdicts(run(judge="gpt-4-0314"), judged, ["7B"]) == ["within"]
    (line,) = report.compare(run(judge="another"), judged, against=["7B"])
    assert line.reasons == ("judge another, published with gpt-4-0314",)


@pytest.mark.parametrize("unknown", ["", None])
def test_what_nobody_recorded_is_said(unknown: object) -> None:
    (line,) = report.compare(run(template=unknown), PROTOCOL, against=["7B"])
    assert (line.verdict, line.reasons) == ("within", ("template not recorded",))
    free = replace(PROTOCOL, template=None)  # the checkpoint's own: any is right
    assert report.compare(run(template=unknown), free, against=["7B"])[0].reasons == ()


def test_what_has_no_value_is_not_compared() -> None:
    (line,) = report.compare(run(float("nan")), PROTOCOL, against=["7B"])
    assert (line.verdict, line.reasons) == ("not comparable", ("no value",))


def test_all_questions_are_no_difference() -> None:
    assert verdicts(run(asked=5000), against=["7B"]) == ["within"]


@pytest.mark.parametrize("facts", [{}, {"judge": "j"}])
def test_a_run_is_read_as_it_was_written(tmp_path: Path, facts: dict[str, str]) -> None:
    write(tmp_path / "a", **facts)
    found = report.read_result(tmp_path / "a")
    assert (found.benchmark, found.protocol, found.model, found.name) == ("textvqa", "llava-1.5", "tiny@1f", "a")
    assert found.scores == run().scores
    assert {name: found.facts[name] for name in ("template", "aspect", "hints")} == {"template": "vicuna_v1", "aspect": None, "hints": True}
    (line,) = report.compare(found, replace(PROTOCOL, judge="j"), against=["7B"])
    assert line.reasons == ("aspect not recorded" if facts else "aspect, judge not recorded",)


def write(folder: Path, **facts: object) -> None:
    """A run's folder as the harness and the scorer leave it."""
    folder.mkdir()
    told = {"benchmark": "textvqa", "protocol": "llava-1.5", "model": "tiny@1f", "asked": 5000}
    (folder / RUN).write_text(json.dumps(AS_ASKED | told | {"aspect": None}), "utf-8")
    report.write_scores(folder, run().scores, **facts)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run.json", None, "no such file"),
        ("scores.json", None, "no such file"),
        ("scores.json", "{", "not JSON"),
        ("scores.json", "3", "do not describe a run"),
        ("scores.json", '{"scores": [{"metric": "x"}]}', "do not describe a run"),
        ("scores.json", '{"scores": [{"metric": "x", "value": "y", "count": 1}]}', "do not describe a run"),
        ("run.json", '{"benchmark": "textvqa"}', "do not describe a run"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / name).unlink() if text is None else (tmp_path / "a" / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=words):
        report.read_result(tmp_path / "a")


def test_runs_stand_side_by_side() -> None:
    second = replace(run(60.0), model="other")
    rows = report.side_by_side([run(), second], [TEXT], against=["13B", "GPT"])
    assert rows == [
        ("benchmark", "protocol", "metric", "ours", "other", "13B", "GPT"),
        ("textvqa", "llava-1.5", "accuracy", "58.0 ± 1.3", "60.0 ± 1.3", "61.3", "–"),
    ]


def test_protocols_are_not_mixed_and_repetitions_are_told_apart() -> None:
    plain = replace(run(21.9), protocol="no-ocr")
    assert [row[1] for row in report.side_by_side([run(), plain])[1:]] == ["llava-1.5", "no-ocr"]
    twice = report.side_by_side([replace(run(), name="a"), replace(run(59), name="b")])
    assert twice[0][3:] == ("ours (a)", "ours (b)")
    assert twice[1][3:] == ("58.0 ± 1.3", "59.0 ± 1.3")


def test_a_run_becomes_a_row_of_a_published_table() -> None:
    scores = tuple(Score(metric=name, value=value, count=60) for name, value in (("conv", 50.0), ("all", 61.25)))
    wild = Result(benchmark="llava-bench", protocol="v0", model="mine", scores=scores)
    rows = report.beside(table("in-the-wild"), [wild])
    assert rows[0] == ("model", "conv", "detail", "complex", "all")
    assert rows[3] == ("LLaVA, decoded three times", "57.3 ± 1.9", "52.5 ± 6.3", "81.7 ± 1.8", "67.3 ± 2.0")
    assert rows[-1] == ("ours: mine, v0", "50.0", "–", "–", "61.2")
    assert len(rows) == 2 + len(table("in-the-wild").rows)


def test_the_big_table_takes_runs_of_one_model_into_one_row() -> None:
    pope = Result(benchmark="pope", protocol="llava-1.5", model="ours", scores=(
        Score(metric="adversarial", value=80, count=3000), Score(metric="f1", value=81, count=9000, headline=True)))  # fmt: skip
    rows = report.beside(table("twelve"), [run(), pope])
    found = dict(zip(rows[0], rows[-1], strict=True))
    assert (found["textvqa"], found["pope/adversarial"], found["pope"], found["gqa"]) == ("58.0 ± 1.3", "80.0", "81.0", "–")


def test_a_departure_is_marked_in_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run(template="llava_hf")
    assert report.side_by_side([run(), replace(asked, model="b")], [TEXT])[1][3:] == ("58.0 ± 1.3", "58.0 ± 1.3*")
    assert "58.0 ± 1.3*" in report.beside(table("twelve"), [asked], [TEXT])[-1]
    assert "58.0 ± 1.3" in report.beside(table("twelve"), [run()], [TEXT])[-1]
    monkeypatch.setattr("llavakit.eval.benchmarks.ALL", (replace(TEXT, protocols=(replace(PROTOCOL, suffix="Long."),)),))
    write(tmp_path / "a")
    results(runs=[tmp_path / "a"], table="twelve")
    assert "* tiny@1f, textvqa: suffix Short., published with Long." in capsys.readouterr().out


def test_tables_are_rectangles() -> None:
    shown: list[Rows] = [
        report.detailed(report.compare(run(), PROTOCOL)),
        report.side_by_side([run()], [TEXT], against=["7B"]),
        *(report.beside(table(name), [run()]) for name in ("twelve", "coco")),
    ]
    for rows in shown:
        assert len({len(row) for row in rows}) == 1
        lines = report.markdown(rows).splitlines()
        assert len(lines) == len(rows) + 1
        assert len({line.count("|") for line in lines}) == 1


def test_a_record_holds_every_number() -> None:
    found = json.loads(json.dumps(report.record(run(), report.compare(run(), PROTOCOL))))
    (score,) = found["scores"]
    assert (score["metric"], score["value"], score["half_width"]) == ("accuracy", 58.0, 1.3)
    assert [(row["model"], row["verdict"]) for row in score["published"]] == [("7B", "within"), ("13B", "below")]


def test_the_heading_says_how_it_was_asked() -> None:
    said = report.heading(run(), PROTOCOL)
    for word in ("textvqa", "llava-1.5", "vicuna_v1", "pad", "hints shown", "5,000 questions", "Rosetta"):
        assert word in said
    assert "nothing to compare with" in report.heading(run(), None)


def test_the_command_prints_tables_and_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavakit.eval.benchmarks.ALL", (TEXT,))
    write(tmp_path / "a")
    results(runs=[tmp_path / "a"], markdown=True)
    assert "| accuracy | 58.0 ± 1.3 | 58.2 ± 0.5 | 7B | -0.2 | within (aspect not recorded) |" in capsys.readouterr().out
    results(runs=[tmp_path / "a"], as_json=True, against=["13B"])
    (found,) = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in found["scores"][0]["published"]] == ["13B"]
    results(runs=[tmp_path / "a"], table="twelve", markdown=True)
    assert "| ours: tiny@1f, llava-1.5 |" in capsys.readouterr().out
    results(runs=[tmp_path / "a", tmp_path / "a"])
    assert "side by side" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    results(runs=[tmp_path / "a"], against=["7B"])
    shown = capsys.readouterr().out
    assert "58.0 ± 1.3" in shown
    assert "| accuracy" not in shown


def test_the_page_of_protocols_says_everything() -> None:
    said = page([TEXT])
    for word in (
        "## textvqa",
        "TextVQA, validation",
        "two files",
        "M4C",
        "`llava-1.5`",
        "vicuna_v1",
        "pad",
        "`Short.`",
        "shown",
        "128 tokens",
    ):
        assert word in said
    assert "| llava-1.5 | accuracy | 7B **58.2**; 13B **61.3** | 0.5 | paper |" in said
    assert "nowhere yet" in said


@pytest.mark.skipif(not ALL, reason="eval/benchmarks.py lists no benchmark yet")
def test_the_page_of_protocols_is_that_of_the_benchmarks() -> None:
    docs = Path(__file__).parents[2] / "docs" / "evaluate-protocols.md"
    assert docs.read_text("utf-8") == page(ALL), "python dev/write_protocols.py"
