"""Resuming: the same bits as never having stopped, whatever stopped the run, and what is refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavakit.checkpoint import store
from llavakit.config import FINETUNE, TrainConfig
from llavakit.errors import CheckpointError, LlavaError, TrainingError
from llavakit.train import state
from llavakit.train.loop import train
from llavakit.train.progress import StepReport, read_metrics

KILLS = int(os.environ.get("LLAVAKIT_KILLS", "20"))


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten samples of several lengths, three with a picture."""
    from PIL import Image as Pillow

    folder = tmp_path_factory.mktemp("dialogues")
    records: list[dict[str, Any]] = []
    for number in range(10):
        record: dict[str, Any] = {"id": number}
        question = "Which? " * (number % 4 + 1)
        if number < 3:
            Pillow.new("RGB", (24, 20 + number), (80 * number, 10, 10)).save(folder / f"{number}.png")
            record["image"], question = f"{number}.png", "<image>\n" + question
        reply = f"The one called {number}."
        records.append(record | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "data.jsonl"


@pytest.fixture
def config(dialogues: Path, tiny_model_dir: Path, tmp_path: Path) -> TrainConfig:
    return replace(
        FINETUNE, start=tiny_model_dir, data=dialogues, out=tmp_path / "run", batch_size=2, accumulation=2, epochs=3, lr=1e-3,
        weight_decay=0.01, dtype="fp32", device="cpu", max_length=512, seed=5, log_every=100,
    )  # fmt: skip


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint: weights, moments, random states."""
    return {f"{path.name}/{name}": value for path in sorted(folder.rglob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, optimizer, random states and log, bit for bit; only clocks may differ."""
    one, two = (bits(state.checkpoints(out)[0]) for out in (first, second))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    clocks = ("step_time", "tokens_per_s")
    logs = [[{k: v for k, v in line.items() if k not in clocks} for line in read_metrics(out)] for out in (first, second)]
    assert logs[0] == logs[1]


def stop_after(step: int) -> Any:
    def act(report: StepReport) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return act


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stage": "pretrain"},
        {"group": 2, "cache_mb": 1},
        {"workers": 1},
        {"gradient_checkpointing": True, "rates": ((r"vision_tower\..*", 0.1),)},
        {"dtype": "bf16", "frozen_dtype": "bf16"},
        {"optimizer": "muon"},
    ],
    ids=["finetune", "pretrain", "grouped", "workers", "all learn", "bf16", "muon"],
)
def test_resumed_equals_uninterrupted(changes: dict[str, Any], config: TrainConfig, tmp_path: Path) -> None:
    """Stopped twice, once inside an epoch and once at its end, with dropout drawing from the random state."""
    whole = replace(config, out=tmp_path / "whole", **changes)
    train(whole)
    parted = replace(config, **changes)
    for step in (2, 6):
        assert train(parted, on_step=stop_after(step)).exit_code == 143
    assert train(parted).exit_code == 0
    assert_same_run(whole.out, parted.out)


def test_a_runs_folder_stands_for_its_newest_checkpoint(config: TrainConfig) -> None:
    train(replace(config, save_every=2, keep=0), on_step=stop_after(4))
    (whole, _), (newest, _) = store.load(config.out), store.load(config.out / "step-4")
    older = store.load(config.out / "step-2")[0].state_dict()
    assert all(torch.equal(value, newest.state_dict()[name]) for name, value in whole.state_dict().items())
    assert not all(torch.equal(value, older[name]) for name, value in whole.state_dict().items())


def test_dropout_resumes_where_it_was(config: TrainConfig, dropping_model: Path, tmp_path: Path) -> None:
    whole = replace(config, start=dropping_model, out=tmp_path / "whole")
    train(whole)
    parted = replace(config, start=dropping_model)
    train(parted, on_step=stop_after(4))
    train(parted)
    assert_same_run(whole.out, parted.out)
    other = replace(whole, seed=6, out=tmp_path / "other")
    train(other)
    assert [line["loss"] for line in read_metrics(other.out)] != [line["loss"] for line in read_metrics(whole.out)]


@pytest.fixture
def dropping_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with attention dropout, so that every step draws."""
    model, processor = store.load(tiny_model_dir)
    text = {**model.config.text, "attention_dropout": 0.2}
    changed = type(model)(replace(model.config, text=text))
    changed.load_state_dict(model.state_dict())
    store.save(changed, processor, tmp_path / "dropping")
    return tmp_path / "dropping"


def test_the_split_of_a_batch_may_change_the_order_may_not(config: TrainConfig) -> None:
    """T6: batch_size x accumulation is one number; other shapes of it go on, other numbers are refused."""
    train(config, on_step=stop_after(2))
    with pytest.raises(TrainingError) as caught:
        train(replace(config, batch_size=4))
    assert caught.value.code == "run_changed"
    assert "batch_size x accumulation" in str(caught.value)
    outcome = train(replace(config, batch_size=4, accumulation=1))
    assert outcome.step == 9
    assert [line["samples"] for line in read_metrics(config.out)] == [4, 4, 2] * 3


# ---- what is refused


@pytest.mark.parametrize("changes", [{"seed": 6}, {"template": "llava_v1"}, {"group": 3}, {"stage": "pretrain"}, {"aspect": "square"}])
def test_another_run_is_refused_unless_forced(changes: dict[str, Any], config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """T10: the difference is printed, a changed model or order of samples is refused."""
    train(config, on_step=stop_after(2))
    with pytest.raises(TrainingError) as caught:
        train(replace(config, **changes))
    (name,) = changes
    assert caught.value.code == "run_changed"
    assert name in str(caught.value)
    assert f"changed since the checkpoint: {name}: " in capfd.readouterr().err
    if name != "stage":
        assert train(replace(config, **changes, force=True, steps=3)).step == 3


def test_rates_and_lengths_may_change_and_are_shown(config: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    train(config, on_step=stop_after(2))
    assert train(replace(config, lr=5e-4, epochs=1)).step == 3
    assert "lr: 0.001 -> 0.0005" in capfd.readouterr().err


def test_changed_data_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """D12: the same name with another content."""
    assert config.data is not None
    copy = config.data.with_name(f"{tmp_path.name}.jsonl")
    copy.write_bytes(config.data.read_bytes())
    mine = replace(config, data=copy)
    train(mine, on_step=stop_after(2))
    copy.write_text(copy.read_text().replace("called 9", "called nine"))
    with pytest.raises(TrainingError) as caught:
        train(mine)
    assert str(copy) in str(caught.value)


def test_a_used_folder_is_never_overwritten(config: TrainConfig) -> None:
    train(replace(config, steps=2, save_every=1))
    with pytest.raises(TrainingError) as caught:
        train(replace(config, resume="never"))
    assert caught.value.code == "run_exists"
    with pytest.raises(TrainingError) as caught:
        train(replace(config, resume=str(config.out / "step-1")))
    assert caught.value.code == "newer_checkpoints"


def test_a_run_goes_on_in_another_folder(config: TrainConfig, tmp_path: Path) -> None:
    train(config, on_step=stop_after(4))
    moved = replace(config, out=tmp_path / "moved", resume=str(config.out / "step-4"))
    train(moved)
    train(config)
    one, two = bits(config.out / "step-9"), bits(moved.out / "step-9")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_run_is_left_as_it_is(config: TrainConfig) -> None:
    first = train(config)
    written = (first.checkpoint / "manifest.json").stat().st_mtime_ns
    log = (config.out / "metrics.jsonl").read_bytes()
    assert train(config).checkpoint == first.checkpoint
    assert (first.checkpoint / "manifest.json").stat().st_mtime_ns == written
    assert (config.out / "metrics.jsonl").read_bytes() == log


# ---- damage


@pytest.fixture
def two_checkpoints(config: TrainConfig) -> TrainConfig:
    train(replace(config, save_every=2), on_step=stop_after(4))
    assert [folder.name for folder in state.checkpoints(config.out)] == ["step-4", "step-2"]
    return config


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest", "torn manifest"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, two_checkpoints: TrainConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = two_checkpoints.out / "step-4"
    victim = next(newest.glob("*.safetensors")) if "manifest" not in damage else newest / "manifest.json"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage in ("remove", "no manifest"):
        victim.unlink()
    else:
        victim.write_bytes(content if damage == "flip" else content[:-9])
    with pytest.raises(CheckpointError):
        state.verify(newest)
    with pytest.raises(LlavaError):
        train(replace(two_checkpoints, resume=str(newest)))
    train(two_checkpoints)
    assert "passed over: " in capfd.readouterr().err
    whole = replace(two_checkpoints, out=tmp_path / "whole")
    train(whole)
    assert_same_run(whole.out, two_checkpoints.out)


def test_the_last_good_checkpoint_is_never_pruned(two_checkpoints: TrainConfig) -> None:
    """keep=1 with a damaged newest: the older one is all there is, and stays."""
    (two_checkpoints.out / "step-4" / "config.json").write_text("{}")
    state.prune(two_checkpoints.out, 1)
    state.verify(two_checkpoints.out / "step-2")


def test_a_mere_model_cannot_be_resumed(config: TrainConfig, tiny_model_dir: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        train(replace(config, resume=str(tiny_model_dir)))
    assert caught.value.code == "no_manifest"


# ---- kill -9


NURSERY = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import torch
from llavakit import config as options
from llavakit.checkpoint import store
from llavakit.train import state
from llavakit.train.loop import train

torch.set_num_threads(1)  # no thread pool, so that a fork is a fresh process
path, out, seed, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
config = options.load(options.FINETUNE, path)

def start(folder):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 1
        try:
            code = train(replace(config, out=folder)).exit_code
        finally:
            os._exit(code)
    return child

began = time.monotonic()
child = start(out / "whole")
assert os.waitpid(child, 0)[1] == 0, "the uninterrupted run failed"
longest = (time.monotonic() - began) / 3

draw, done, finished = random.Random(seed), 0, 0
steps_seen = []
while done < kills or not finished:
    folder = out / f"killed-{finished}"
    child = start(folder)
    deadline = time.monotonic() + (draw.uniform(0, longest) if done < kills else 60)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"a resumed run failed with status {status}"
            finished += 1
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        warnings = []
        newest = state.newest(folder, warnings.append)
        assert not warnings, warnings
        if newest is not None:
            store.load(newest)
            steps_seen.append(state.step_of(newest))
        pointed = folder / "latest"
        assert not pointed.exists() or state.verify(folder / pointed.read_text().strip()) is None
print(json.dumps({"kills": done, "finished": finished, "steps": steps_seen}))
"""


def test_twenty_random_kills_leave_a_loadable_checkpoint_and_the_same_run(config: TrainConfig, tmp_path: Path) -> None:
    """T1: a run that saves every step is killed -9 at random moments, in steps, in saves, while resuming, and ends bit-equal."""
    from llavakit import config as options

    path = tmp_path / "run.yaml"
    options.save(replace(config, steps=16, save_every=1, keep=2, batch_size=2, accumulation=1), path)
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, "-c", NURSERY, str(path), str(tmp_path), str(seed), str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, f"seed {seed}: {ended.stderr}"
    found = json.loads(ended.stdout)
    assert found["kills"] == KILLS
    assert found["steps"], "no kill came after a save"
    for number in range(found["finished"]):
        assert_same_run(tmp_path / "whole", tmp_path / f"killed-{number}")


def test_a_signal_to_the_whole_group_stops_after_the_step(config: TrainConfig) -> None:
    """T2 as schedulers do it: SIGTERM reaches the loader's processes too. The step is finished, saved, and the run goes on later."""
    long = replace(config, epochs=100_000, workers=2, save_every=100_000)
    words = [
        "start",
        "data",
        "images",
        "out",
        "batch_size",
        "accumulation",
        "epochs",
        "workers",
        "save_every",
        "dtype",
        "device",
        "max_length",
    ]
    options = {**vars(long), "images": long.data.parent}  # type: ignore[union-attr]
    command = [sys.executable, "-m", "llavakit", "train", "finetune", *(f"{name}={options[name]}" for name in words)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(read_metrics(long.out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert state.step_of(state.checkpoints(long.out)[0]) == len(read_metrics(long.out))
