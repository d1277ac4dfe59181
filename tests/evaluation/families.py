"""What the tests of all families of benchmarks share: files for them, questions, answers to these, scores by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llavakit.eval import benchmarks
from llavakit.eval.benchmark import Answered, Benchmark, Question, Score


def lines(path: Path, *rows: object) -> Path:
    """One value a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, *rows: Mapping[str, Any]) -> Path:
    """As the Hub has them; the test is left out where pyarrow is not installed."""
    arrow = pytest.importorskip("pyarrow", reason="the optional pyarrow package is not installed (pip install 'llavakit[eval]')")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.Table.from_pylist(list(rows)), path)
    return path


def ask(benchmark: Benchmark, folder: Path, protocol: str | None = None) -> list[Question]:
    """The questions of a folder, under the protocol of this name or the first one."""
    return benchmark.questions(folder, benchmarks.protocol(benchmark, protocol))


def replied(questions: Sequence[Question], *texts: str | None) -> list[Answered]:
    """Each question with its reply."""
    return [Answered(question=question, text=text) for question, text in zip(questions, texts, strict=True)]


def answers(questions: Sequence[Question], texts: Mapping[str, str | None]) -> list[Answered]:
    """Each question with the text of its id, if there is any."""
    return [Answered(question=question, text=texts.get(question.id)) for question in questions]


def by_name(scores: Iterable[Score]) -> dict[str, Score]:
    """No two scores have one name."""
    listed = list(scores)
    found = {score.metric: score for score in listed}
    assert len(found) == len(listed)
    return found
