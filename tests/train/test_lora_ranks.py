"""Adapters on two processes: the steps of a run alone, a whole adapter in every save, and on where another world stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lora import CLOSE, SMALL
from test_ranks import finished, torchrun
from torch import Tensor

from llavakit.checkpoint import store
from llavakit.config import LORA, TrainConfig
from llavakit.train import state
from llavakit.train.loop import train
from llavakit.train.progress import read_metrics

STEPS = 3


@pytest.fixture(scope="module")
def straight(data: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run alone that saved after every step; tests do not change it. Without dropout, which each rank draws for itself."""
    config = replace(
        LORA, lora=replace(SMALL, dropout=0.0), start=tiny_model_dir, data=data, out=tmp_path_factory.mktemp("ranks") / "alone",
        batch_size=1, accumulation=6, steps=STEPS, save_every=1, keep=0, lr=1e-3, dtype="fp32", device="cpu", max_length=512,
        preflight=False,
    )  # fmt: skip
    train(config)
    return config


def adapter(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / f"step-{step}" / "adapter_model.safetensors")


def assert_same_steps(one: Path, other: Path, *, steps: range) -> None:
    """At each save the same tensors by the same names: two matrices for each of 14 layers, and the projector's four."""
    for step in steps:
        first, second = adapter(one, step), adapter(other, step)
        assert first.keys() == second.keys()
        assert (sum("lora_" in name for name in first), sum("multi_modal_projector" in name for name in first)) == (28, 4)
        for name, value in first.items():
            assert float((value - second[name]).abs().max()) <= CLOSE * max(0.01, float(value.abs().max())), name
    for line, again in zip(read_metrics(one), read_metrics(other), strict=True):
        assert line["loss"] == pytest.approx(again["loss"], rel=CLOSE)
        assert line["grad_norm"] == pytest.approx(again["grad_norm"], rel=1e-4)


def stopped_after(out: Path, new: Path, step: int) -> Path:
    """A copy of a run as if it had been killed after a step."""
    shutil.copytree(out, new)
    for folder in state.checkpoints(new):
        if state.step_of(folder) > step:
            shutil.rmtree(folder)
    return new


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_ranks_take_the_steps_of_one_and_save_whole_adapters(straight: TrainConfig, tmp_path: Path, shard: str) -> None:
    two = replace(straight, out=tmp_path / "two", shard=shard)
    finished(torchrun(two))
    assert_same_steps(straight.out, two.out, steps=range(1, STEPS + 1))
    merged, _ = store.load(two.out / f"step-{STEPS}", base=straight.start, dtype="fp32")
    alone, _ = store.load(straight.out / f"step-{STEPS}", base=straight.start, dtype="fp32")
    for (name, value), other in zip(merged.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(value, other, rtol=0, atol=CLOSE * max(0.01, float(other.detach().abs().max()))), name


def test_a_cut_run_goes_on_alone_and_one_alone_is_cut(straight: TrainConfig, tmp_path: Path) -> None:
    """The matrices, the projector and the optimizer's memory of both have moved with the run."""
    cut = replace(straight, out=stopped_after(straight.out, tmp_path / "cut", 1), shard="full", steps=STEPS)
    finished(torchrun(cut))
    assert_same_steps(straight.out, cut.out, steps=range(2, STEPS + 1))
    assert (cut.out / "step-2" / "trainer" / "optimizer").is_dir()
    again = replace(straight, out=stopped_after(cut.out, tmp_path / "again", 2))
    train(again)
    assert_same_steps(straight.out, again.out, steps=range(3, STEPS + 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_on_two_ranks(straight: TrainConfig, tmp_path: Path, bits: int) -> None:
    alone = replace(straight, lora=replace(SMALL, dropout=0.0, bits=bits), out=tmp_path / "alone")
    process = torchrun(replace(alone, out=tmp_path / "two"))
    train(alone)
    finished(process)
    assert_same_steps(alone.out, tmp_path / "two", steps=range(1, STEPS + 1))
