"""What is exported reads back with the Hub's own library as the numbers that were given."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.errors import ConfigError, DataError
from llavakit.eval.benchmark import Score
from llavakit.eval.benchmarks import ALL
from llavakit.eval.hub import PLACES, entries, export
from llavakit.eval.published import tables
from llavakit.eval.report import Result

CARD = "---\nlicense: apache-2.0\ntags:\n- llava\n---\n# A model\n\nIts words.\n"


def run(benchmark: str = "textvqa", value: float = 58.21, *, protocol: str = "llava-1.5", model: str = "tiny") -> Result:
    scores = (Score(metric="part", value=1.0, count=9), Score(metric="accuracy", value=value, count=5000, half_width=1.3, headline=True))
    facts = {"template": "vicuna_v1", "aspect": "pad", "hints": True, "date": "2026-11-21T18:00:00+00:00"}
    return Result(benchmark=benchmark, protocol=protocol, model=model, scores=scores, facts=facts)


def read(path: Path) -> list[object]:
    return list(parse_eval_result_entries(yaml.safe_load(path.read_text("utf-8"))))


def test_a_file_reads_back_as_its_entries(tmp_path: Path) -> None:
    runs = [run(), run(protocol="no-ocr", value=46.5), run("pope", 85.9)]
    paths = export(runs, tmp_path, source="https://example.org/runs")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [".eval_results/textvqa.yaml", ".eval_results/pope.yaml"]
    assert read(paths[0]) == entries(runs[:2], source="https://example.org/runs")
    assert read(paths[1]) == entries(runs[2:], source="https://example.org/runs")


def test_an_entry_says_what_and_how(tmp_path: Path) -> None:
    (path,) = export([run()], tmp_path)
    (found,) = yaml.safe_load(path.read_text("utf-8"))
    assert found["dataset"] == {"id": PLACES["textvqa"].dataset, "task_id": "default"}
    assert found["value"] == 58.21
    assert found["date"] == "2026-11-21T18:00:00+00:00"
    for words in ("accuracy", "llava-1.5", "vicuna_v1", "pad", "OCR hints", "5,000 questions", "± 1.30"):
        assert words in found["notes"]
    assert "source" not in found


@settings(deadline=None, max_examples=50)
@given(value=st.floats(0, 2000), model=st.text(min_size=1), date=st.none() | st.datetimes().map(datetime.isoformat))
def test_any_value_and_words_survive(tmp_path_factory: pytest.TempPathFactory, value: float, model: str, date: str | None) -> None:
    found = run(value=value, model=model)
    found = Result(benchmark="mme", protocol="p: #", model=model, scores=found.scores, facts={"date": date, "judge": model})
    (path,) = export([found], tmp_path_factory.mktemp("hub"))
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text("utf-8")))
    assert (entry.value, entry.date) == (round(value, 4), date)
    assert " ".join(model.split()) in entry.notes
    assert len(entry.notes.splitlines()) == 1


def test_the_card_gains_an_index_and_keeps_its_words(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, "utf-8")
    paths = export([run(), run("pope", 85.9)], tmp_path, titles={"textvqa": "TextVQA"})
    assert paths[-1] == tmp_path / "README.md"
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.strip() == "# A model\n\nIts words."
    assert (card.data.license, card.data.tags) == ("apache-2.0", ["llava"])
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    text, pope = PLACES["textvqa"].dataset, PLACES["pope"].dataset
    assert found == {(text, "part"): 1.0, (text, "accuracy"): 58.21, (pope, "part"): 1.0, (pope, "accuracy"): 85.9}
    assert {r.dataset_name for r in card.data.eval_results} == {"TextVQA", "pope"}


def test_a_second_export_replaces_its_numbers_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD, "utf-8")
    export([run(value=1.5), run("pope", 85.9)], tmp_path)
    once = (tmp_path / "README.md").read_text("utf-8")
    export([run(value=58.21)], tmp_path)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert sorted(r.metric_value for r in results if r.metric_type == "accuracy") == [58.21, 85.9]
    assert len(results) == 4
    export([run(value=1.5)], tmp_path)
    assert len((tmp_path / "README.md").read_text("utf-8")) == len(once)
    assert (tmp_path / ".eval_results" / "pope.yaml").is_file()


def test_without_a_card_none_is_made(tmp_path: Path) -> None:
    export([run()], tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("top", ["- a list\n", "model-index: 3\n", "model-index:\n- name: x\n", "a: [\n"])
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path: Path, top: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{top}---\nwords\n", "utf-8")
    with pytest.raises(DataError, match="front matter"):
        export([run()], tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == f"---\n{top}---\nwords\n"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scenes has no data set"):
        export([run(), run("scenes")], tmp_path)
    with pytest.raises(ConfigError, match="2 models: tiny, other"):
        export([run(), run(model="other")], tmp_path)
    with pytest.raises(ConfigError, match="no scores"):
        export([Result(benchmark="textvqa", protocol="p", model="m", scores=())], tmp_path)
    with pytest.raises(ConfigError, match="no scores"):
        export([run(value=float("nan"))], tmp_path)
    assert not any(tmp_path.iterdir())


def test_every_published_benchmark_has_a_place() -> None:
    compared = {c.benchmark for t in tables().values() for c in t.columns if c.benchmark and any(row.protocol for row in t.rows)}
    assert compared <= set(PLACES)


@pytest.mark.skipif(not ALL, reason="eval/benchmarks.py lists no benchmark yet")
def test_every_benchmark_of_ours_has_a_place() -> None:
    assert {benchmark.name for benchmark in ALL} - {"scenes", "scenes-bench"} <= set(PLACES)  # scenes are drawn, not published
