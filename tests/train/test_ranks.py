"""Two processes as one run, by torchrun and gloo: DDP and FSDP2 take the steps of a run alone, and go on where another world stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llavakit import config as options
from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.train import state
from llavakit.train.loop import train
from llavakit.train.progress import read_metrics


def torchrun(config: TrainConfig, *, ranks: int = 2) -> subprocess.Popen[str]:
    """The command line of a user, on this machine's loopback."""
    words = [f"{name}={_word(value)}" for name, value in options.to_dict(config).items() if name != "stage"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    given = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [*run, "-m", "llavakit", "train", config.stage, *words], env=os.environ | given, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _word(value: object) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, list | dict | bool) else str(value)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out + err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def close(one: Path, other: Path) -> None:
    """Weights after some AdamW steps: within 1e-5 of a tensor's largest, or of 0.01 (a key's bias begins at 0 and moves by rounding)."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert float((value - second[name]).abs().max()) <= 1e-5 * max(0.01, float(value.abs().max())), name


@pytest.fixture
def config(finetune: TrainConfig) -> TrainConfig:
    """Everything learns, the tower too; twelve samples, two without a picture; the last window of an epoch is short."""
    return replace(finetune, steps=4, batch_size=1, accumulation=5, rates=((r".*", 1.0),), lr=1e-4, seed=3, warmup=0.0)


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_ranks_take_the_steps_of_one(config: TrainConfig, tmp_path: Path, shard: str) -> None:
    alone = train(replace(config, out=tmp_path / "alone")).checkpoint
    finished(torchrun(replace(config, out=tmp_path / "two", shard=shard)))
    two = tmp_path / "two" / "step-4"
    close(alone, two)
    logs = [read_metrics(folder.parent) for folder in (alone, two)]
    for one, other in zip(*logs, strict=True):
        assert [one[key] for key in ("step", "epoch", "tokens", "learned", "samples", "lr")] == [
            other[key] for key in ("step", "epoch", "tokens", "learned", "samples", "lr")
        ]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    store.load(two)
    assert (two / "trainer" / "optimizer").is_dir() == (shard == "full")


@pytest.mark.parametrize(("first", "then"), [("full", "alone"), ("alone", "full"), ("full", "none")])
def test_a_run_goes_on_in_another_world(config: TrainConfig, tmp_path: Path, first: str, then: str) -> None:
    """Two steps in one world, two in another: the weights of four steps alone. The optimizer's memory has moved with the run."""
    straight = train(replace(config, out=tmp_path / "straight")).checkpoint
    moved = replace(config, out=tmp_path / "moved", save_every=2, keep=0)
    for world, steps in ((first, 2), (then, 4)):
        if world == "alone":
            train(replace(moved, steps=4), on_step=_stop_after(steps))
        else:
            finished(torchrun(replace(moved, shard=world, steps=4)))
            _forget_after(moved.out, steps)
    close(straight, state.checkpoints(moved.out)[0])


def _stop_after(step: int):  # type: ignore[no-untyped-def]
    return lambda report: os.kill(os.getpid(), signal.SIGTERM) if report.step == step < 4 else None


def _forget_after(out: Path, step: int) -> None:
    """As if the run had been killed after a step."""
    import shutil

    for folder in state.checkpoints(out):
        if state.step_of(folder) > step:
            shutil.rmtree(folder)


def test_a_signal_to_one_rank_stops_all_and_saves(config: TrainConfig, tmp_path: Path) -> None:
    process = torchrun(replace(config, out=tmp_path / "run", steps=100_000, save_every=100_000))
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.communicate(timeout=120)
    (saved,) = state.checkpoints(tmp_path / "run")
    state.verify(saved)
    assert state.step_of(saved) == len(read_metrics(tmp_path / "run"))


def test_a_rank_that_hangs_ends_the_others(config: TrainConfig, tmp_path: Path) -> None:
    """One rank stands still, the other waits: it ends by itself after the timeout and leaves its stacks."""
    out = tmp_path / "run"
    process = torchrun(replace(config, out=out, steps=100_000, save_every=100_000, timeout=5))
    deadline = time.monotonic() + 120
    while not read_metrics(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(children[0], signal.SIGSTOP)  # hangs, which torchrun cannot see
    told: list[Path] = []
    while not told and time.monotonic() < deadline:
        time.sleep(0.2)
        told = [file for file in out.glob("stacks-*.txt") if "most recent call first" in file.read_text()]
    os.kill(children[0], signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert told, "a rank said where it hung"
