"""Held-out samples: never learned from, measured alike on any world, and watching changes no bit of the run."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from weights import equal, weights

from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.data.holdout import groups, split
from llavakit.data.loader import learned_tokens
from llavakit.data.sources import read_llava
from llavakit.errors import ConfigError, TrainingError
from llavakit.train import start
from llavakit.train.loop import train
from llavakit.train.progress import EVALUATIONS, PANEL, read_lines, read_metrics
from llavakit.train.report import POINTS, figure, write_report


@given(keep=st.integers(0, 11), seed=st.integers(0, 5))
def test_a_split_keeps_so_many_and_loses_none(keep: int, seed: int, data: Path) -> None:
    source = read_llava(data)
    trained, held = split(source, keep, seed=seed)
    assert len(held) == keep
    assert sorted([sample.id for sample in trained] + [sample.id for sample in held]) == sorted(sample.id for sample in source)
    assert [sample.id for sample in split(source, keep, seed=seed)[1]] == [sample.id for sample in held]
    assert list(held.lengths()) == [source.lengths()[number] for number in held.numbers]
    assert sum(map(len, groups(held).values())) == keep


def test_keeping_everything_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match="holdout"):
        split(read_llava(data), 12, seed=0)


def test_watching_changes_no_bit(finetune: TrainConfig, tmp_path: Path) -> None:
    """The same run with and without measurements: other files, the same weights."""
    held = replace(finetune, holdout=4, steps=4, save_every=2, seed=1)
    often = train(replace(held, out=tmp_path / "often", eval_every=1, panel=3))
    seldom = train(replace(held, out=tmp_path / "seldom", panel=0))
    assert equal(weights(often.checkpoint), weights(seldom.checkpoint))
    assert [line["step"] for line in read_lines(tmp_path / "often" / EVALUATIONS)] == [1, 2, 3, 4]
    assert [line["step"] for line in read_lines(tmp_path / "seldom" / EVALUATIONS)] == [2, 4]


def test_the_held_out_loss_is_the_mean_over_learned_tokens(finetune: TrainConfig) -> None:
    """Of the saved model, sample by sample, apart from the loader and from packing."""
    config = replace(finetune, holdout=6, steps=1, seed=2)
    outcome = train(config)
    (line,) = read_lines(config.out / EVALUATIONS)
    assert config.data is not None
    _, held = split(read_llava(config.data), 6, seed=2)
    model, processor = start.model_and_processor(start.settled(config), outcome.checkpoint)
    model.eval()
    told = 0
    for name, part in groups(held).items():
        total, learned = 0.0, 0
        for sample in part:
            batch = processor.collate([processor.encode(sample.conversation, learn=True)], side="right")
            with torch.no_grad():
                total, learned = total + float(model(batch).loss_sum), learned + learned_tokens(batch)
        assert line["losses"][name]["loss"] == pytest.approx(total / learned, rel=1e-5)
        assert (line["losses"][name]["learned"], line["losses"][name]["samples"]) == (learned, len(part))
        told += len(part)
    assert told == 6
    assert sum(line["samples"] for line in read_metrics(config.out)) == 4
    store.load(outcome.checkpoint)


def test_a_resumed_run_measures_each_step_once(finetune: TrainConfig) -> None:
    config = replace(finetune, holdout=4, save_every=2, eval_every=1, steps=4)
    train(config)
    (config.out / "step-4" / "manifest.json").unlink()  # as if killed while it was written
    train(config)
    assert [line["step"] for line in read_lines(config.out / EVALUATIONS)] == [1, 2, 3, 4]


def test_a_signal_is_answered_by_a_checkpoint_not_by_a_measurement(finetune: TrainConfig) -> None:
    """A scheduler's patience is for saving; the step that was asked to be the last is measured when the run goes on past it, or never."""
    config = replace(finetune, holdout=4, eval_every=1, steps=4)
    stopped = train(config, on_step=lambda report: os.kill(os.getpid(), signal.SIGTERM) if report.step == 2 else None)
    assert (stopped.step, stopped.exit_code) == (2, 143)
    assert [line["step"] for line in read_lines(config.out / EVALUATIONS)] == [1]
    train(config)
    assert [line["step"] for line in read_lines(config.out / EVALUATIONS)] == [1, 3, 4]


def test_the_report_is_one_page_that_fetches_nothing(finetune: TrainConfig) -> None:
    config = replace(finetune, holdout=5, eval_every=1, panel=2)
    train(config)
    page = (config.out / "report.html").read_text()
    assert page == write_report(config.out).read_text()
    assert not re.search(r"https?://|<script|<link|url\(", page)
    for word in ("held-out loss", "learning rate", "What colour?", "It is", "batch_size: 2", "data:image/jpeg;base64,"):
        assert word in page
    assert len(read_lines(config.out / EVALUATIONS)[0]["replies"]) == 2
    assert (config.out / PANEL).is_file()


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no step"):
        write_report(tmp_path)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_a_curve_is_thinned_and_stays_in_its_frame(values: list[float]) -> None:
    drawn = figure("x & y", {"a": list(enumerate(values))})  # type: ignore[dict-item]
    points = [tuple(map(float, point.split(","))) for point in re.findall(r"points=\"([^\"]*)\"", drawn)[0].split()]
    assert 1 <= len(points) <= POINTS
    assert all(0 <= x <= 640 and 0 <= y <= 220 for x, y in points)


def test_every_checkpoint_says_what_is_known_of_it(finetune: TrainConfig) -> None:
    """README.md: counts and held-out loss as the run recorded them, and no folder of this machine."""
    config = replace(finetune, holdout=4, steps=2)
    outcome = train(config)
    text = (outcome.checkpoint / "README.md").read_text()
    (line,) = read_lines(config.out / EVALUATIONS)
    for row in line["losses"].values():
        assert f"| {row['samples']} | {row['learned']} | {row['loss']:.4f} |" in text
    assert "pipeline_tag: image-text-to-text" in text
    assert "8 samples of `data.json` in 2 steps" in text
    assert str(config.out.parent) not in text
    assert (
        "Nothing was held out"
        in (train(replace(finetune, out=config.out.with_name("other"), steps=1)).checkpoint / "README.md").read_text()
    )
