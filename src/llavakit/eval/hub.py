"""Scores as the Hugging Face Hub reads them: ``.eval_results/NAME.yaml`` in the model's repository, and ``model-index`` for older readers.

    Result --entries()--> EvalResultEntry ... --export()--> OUT/.eval_results/textvqa.yaml      one number a run: its headline
        --index()----> EvalResult ...      ---'--------> OUT/README.md, front matter         every number; only where that file is there

The files are written by huggingface_hub's own converters (format seen with 2.4: dataset.id, dataset.task_id, value, date, source, notes).
Nothing is sent anywhere: ``hf upload MODEL OUT`` does that. The Hub shows a number on a leaderboard only where the dataset is registered
as a benchmark and names that task in its ``eval.yaml``; other files are valid and wait.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llavakit import __version__
from llavakit.errors import ConfigError, DataError
from llavakit.eval.benchmark import Score
from llavakit.eval.files import replaced
from llavakit.eval.report import Result

FOLDER, CARD = ".eval_results", "README.md"


@dataclass(frozen=True)
class Place:
    """Where a benchmark's questions lie on the Hub."""

    dataset: str
    task: str = "default"


PLACES: Mapping[str, Place] = {  # the official repository where there is one, otherwise the copy that lmms-eval 0.7.3 reads
    "vqav2": Place("lmms-lab-encoder/VQAv2"),
    "gqa": Place("lmms-lab-encoder/GQA"),
    "vqav2-val": Place("lmms-lab-encoder/VQAv2", "validation"),
    "vizwiz": Place("lmms-lab-encoder/VizWiz-VQA"),
    "vizwiz-val": Place("lmms-lab-encoder/VizWiz-VQA", "val"),
    "scienceqa": Place("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL"),
    "scienceqa-img": Place("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"),
    "textvqa": Place("lmms-lab-encoder/textvqa"),
    "pope": Place("lmms-lab-encoder/POPE"),
    "mme": Place("lmms-lab-encoder/MME"),
    "mmbench": Place("lmms-lab-encoder/MMBench", "en"),
    "mmbench-cn": Place("lmms-lab-encoder/MMBench", "cn"),
    "seed": Place("lmms-lab-encoder/SEED-Bench"),
    "llava-bench": Place("lmms-lab-encoder/llava-bench-in-the-wild"),
    "llava-bench-coco": Place("lmms-lab-encoder/llava-bench-coco"),
    "mm-vet": Place("lmms-lab-encoder/MMVet"),
    "mmmu": Place("MMMU/MMMU"),
    "mathvista": Place("AI4Math/MathVista", "testmini"),
    "ai2d": Place("lmms-lab-encoder/ai2d"),
    "chartqa": Place("lmms-lab-encoder/ChartQA"),
    "docvqa": Place("lmms-lab-encoder/DocVQA", "validation"),
    "docvqa-test": Place("lmms-lab-encoder/DocVQA", "test"),
}


def export(
    runs: Sequence[Result],
    out: Path,
    *,
    source: str | None = None,
    places: Mapping[str, Place] = PLACES,
    titles: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write the files of all runs; returns them. ``source``: the address where the runs can be seen.

    A benchmark's file holds one entry a protocol and is written anew; other benchmarks' files are left. Raises ConfigError for a run
    that has no place on the Hub or whose model is not the others', DataError for a README.md whose front matter cannot be read.
    """
    _check(runs, places)
    card = out / CARD if (out / CARD).is_file() else None
    front = None if card is None else _front_matter(card, runs, index(runs, source=source, places=places, titles=titles or {}))
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    written = []
    for benchmark in dict.fromkeys(run.benchmark for run in runs):
        found = [run for run in runs if run.benchmark == benchmark]
        written.append(_write(out / FOLDER / f"{benchmark}.yaml", found, source, places))
    if card is not None and front is not None:
        from huggingface_hub.repocard import metadata_save

        metadata_save(card, front)
        written.append(card)
    return written


def headline(run: Result) -> Score:
    """The number that papers quote, or the first."""
    return next((score for score in run.scores if score.headline), run.scores[0])


def notes(run: Result, score: Score) -> str:
    """How it was asked, on one line: the only place that the format has for it."""
    facts = [f"{name} {run.facts[name]}" for name in ("template", "aspect", "judge") if run.facts.get(name)]
    facts += ["OCR hints shown"] if run.facts.get("hints") else []
    interval = [] if score.half_width is None else [f"± {score.half_width:.2f} (95 %)"]
    told = [score.metric, f"protocol {run.protocol}", *facts, f"{score.count:,} questions", *interval, f"llavakit {__version__}"]
    return " ".join("; ".join(told).split())  # also without the rarer line ends, which YAML's readers and writers take differently


def entries(runs: Sequence[Result], *, source: str | None = None, places: Mapping[str, Place] = PLACES) -> list[Any]:
    """huggingface_hub's ``EvalResultEntry`` of every run."""
    from huggingface_hub import EvalResultEntry

    made = []
    for run in runs:
        place, score = places[run.benchmark], headline(run)
        entry = EvalResultEntry(
            dataset_id=place.dataset,
            task_id=place.task,
            value=round(score.value, 4),
            dataset_revision=run.facts.get("dataset_revision"),
            date=run.facts.get("date"),
            source_url=source,
            notes=notes(run, score),
        )
        made.append(entry)
    return made


def index(runs: Sequence[Result], *, source: str | None, places: Mapping[str, Place], titles: Mapping[str, str]) -> list[Any]:
    """huggingface_hub's ``EvalResult`` of every number."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=places[run.benchmark].dataset,
            dataset_name=titles.get(run.benchmark, run.benchmark),
            dataset_config=None if places[run.benchmark].task == "default" else places[run.benchmark].task,
            metric_type=score.metric,
            metric_name=f"{score.metric}, protocol {run.protocol}",
            metric_value=round(score.value, 4),
            source_url=source,
        )
        for run in runs
        for score in run.scores
    ]


def _check(runs: Sequence[Result], places: Mapping[str, Place]) -> None:
    models = dict.fromkeys(run.model for run in runs)
    if len(models) > 1:
        what = f"the runs are of {len(models)} models: {', '.join(models)}"
        raise ConfigError(what, code="bad_value", where="--hub", remedy="these files belong to one model: export one after the other")
    for run in runs:
        scored = bool(run.scores) and math.isfinite(headline(run).value)
        if run.benchmark not in places or not scored:
            what = f"{run.benchmark} has no data set on the Hub" if scored else f"{run.name or run.benchmark} has no scores"
            raise ConfigError(what, code="bad_value", where="--hub", remedy="leave this run out")


def _write(path: Path, runs: Sequence[Result], source: str | None, places: Mapping[str, Place]) -> Path:
    from huggingface_hub import eval_result_entries_to_yaml

    data = eval_result_entries_to_yaml(entries(runs, source=source, places=places))
    return replaced(path, yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000))


def _front_matter(card: Path, runs: Sequence[Result], ours: Sequence[Any]) -> dict[str, Any]:
    """The card's front matter, its ``model-index`` with our numbers in place of older ones of the same metric."""
    from huggingface_hub.repocard import metadata_load
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    try:
        data: dict[str, Any] = metadata_load(card) or {}
        name, there = model_index_to_eval_results(data["model-index"]) if data.get("model-index") else (runs[0].model, [])
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        remedy = "mend the lines between --- at its top, or write to another folder"
        raise DataError(f"its front matter cannot be read ({error})", code="bad_file", where=str(card), remedy=remedy) from error
    kept = [old for old in there if not any(_same(old, new) for new in ours)]
    return data | {"model-index": eval_results_to_model_index(name, [*kept, *ours])}


def _same(old: Any, new: Any) -> bool:
    """The same metric of the same questions, whatever its value and source."""
    return (old.unique_identifier, old.metric_type, old.metric_name) == (new.unique_identifier, new.metric_type, new.metric_name)
