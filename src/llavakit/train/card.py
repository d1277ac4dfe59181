"""The README.md of a checkpoint: what it was made from, how, and what is known of how well it does. Facts only, from the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit import __version__
from llavakit.config import TrainConfig

SETTINGS = ("lr", "batch_size", "accumulation", "optimizer", "rates", "template", "aspect", "max_length", "placement", "seed")


def card(config: TrainConfig, *, step: int, samples: int, learned: int, evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with the front matter that the Hub reads. ``samples``: those seen so far; ``learned``: how many numbers learn."""
    base = config.start if config.start is not None else f"{_name(config.tower)} and {_name(config.decoder)}"
    rows = [f"| {name} | `{getattr(config, name)}` |" for name in SETTINGS]
    return "\n".join([
        "---", "library_name: llavakit", "pipeline_tag: image-text-to-text", "tags: [llava, vision-language]", "---", "",
        f"# {config.out.name}, step {step}", "",
        f"A LLaVA made by llavakit {__version__}, stage `{config.stage}`{' with LoRA' if config.lora else ''}, from {_name(base)}: "
        f"{learned:,} numbers learned from {samples:,} samples of `{_name(config.data)}` in {step:,} steps.", "",
        "| option | value |", "| --- | --- |", *rows, "", "## What is known of it", "", *_evidence(config, evaluations), "",
    ])  # fmt: skip


def _evidence(config: TrainConfig, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    if not evaluations:
        return ["Nothing was held out, so nothing is known but the training loss in `metrics.jsonl` of the run."]
    last = evaluations[-1]
    rows = [f"| {name} | {row['samples']} | {row['learned']} | {row['loss']:.4f} |" for name, row in last["losses"].items()]
    text = f"Mean loss of a learned token at step {last['step']} on {config.holdout} samples that it never learned from:"
    return [text, "", "| group | samples | learned tokens | loss |", "| --- | --- | --- | --- |", *rows]


def _name(path: object) -> str:
    """The last part of a path: a card is for others, who have no use for the folders of this machine."""
    return path if isinstance(path, str) else Path(str(path)).name
