"""Laws of the preflight: it finds what would fail later, tells the truth about the data, and changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import finished, torchrun
from weights import weights

from llavakit.checkpoint import store
from llavakit.cli import main
from llavakit.config import Lora, TrainConfig
from llavakit.data.sources import read_llava
from llavakit.errors import DataError, LlavaError, TrainingError
from llavakit.model.llava import Llava
from llavakit.processor import IGNORED, Processor
from llavakit.train import lora, preflight, rehearsal, state
from llavakit.train.loop import train
from llavakit.train.plan import GIB, flops, memory


def silent(text: str) -> None:
    """No one listens."""


def inspected(config: TrainConfig, **options: Any) -> preflight.Report:
    report = preflight.inspect(config, say=silent, **options)
    assert report is not None
    return report


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the test of it takes more steps than must be."""
    monkeypatch.setattr(rehearsal, "PATIENCE", 0)


@pytest.fixture
def pictures(finetune: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The run on a copy of its data, which a test may spoil."""
    assert finetune.data is not None
    folder = tmp_path / "pictures"
    shutil.copytree(finetune.data.parent, folder)
    return replace(finetune, data=folder / finetune.data.name)


# ---- it tells the truth


def test_lengths_are_those_of_the_samples(finetune: TrainConfig, tiny_model_dir: Path) -> None:
    report = inspected(finetune)
    assert finetune.data is not None
    processor = Processor.load(tiny_model_dir)
    inputs = [processor.encode(sample.conversation, learn=True) for sample in read_llava(finetune.data)]
    seen = report.lengths
    assert (report.records, report.pictures, report.unreadable, seen.looked) == (12, 10, (), 12)
    assert seen.tokens * 12 == pytest.approx(sum(len(one.input_ids) for one in inputs))
    assert seen.learned * 12 == pytest.approx(sum(int((one.labels[1:] != IGNORED).sum()) for one in inputs))
    assert seen.longest == max(len(one.input_ids) for one in inputs)
    assert (seen.image_tokens * 12, seen.views * 12) == (pytest.approx(160), pytest.approx(10))
    assert seen.padding >= 1
    assert (seen.cut, seen.silent, seen.replaced) == (0, 0, 0)


def test_the_masks_show_whole_samples_and_what_is_learned(finetune: TrainConfig) -> None:
    report = inspected(finetune)
    assert [mask.id for mask in report.masks] == ["c0", "c1", "c2"]
    for mask, colour in zip(report.masks, ("red", "green", "blue"), strict=True):
        learned = "".join(piece for run in mask.runs if run.kind == "learned" for piece in run.pieces)
        assert colour in learned.replace("▁", " ")
        assert learned.endswith("</s>")
        assert sum(len(run.pieces) for run in mask.runs if run.kind == "image") == 16


ADAPTERS = Lora(r=4, alpha=8, dropout=0.0)
KINDS = {
    "pretrain": {"stage": "pretrain", "template": "plain"},
    "finetune": {},
    "lora": {"lora": ADAPTERS},
    "queries": {"lora": replace(ADAPTERS, targets=r"language_model\..*q_proj")},
    "4 bits": {"lora": replace(ADAPTERS, bits=4)},
    "last layer": {"rates": ((r"language_model\.(?!.*layers\.1\.).*", None),)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_knows_the_run(kind: str, finetune: TrainConfig, captions: Path) -> None:
    """What learns is counted on the model that was made ready: rank, targets and rows of rates all tell."""
    config = replace(finetune, steps=None, epochs=2, **KINDS[kind])
    config = replace(config, data=captions) if kind == "pretrain" else config
    report = inspected(config)
    assert ("language_model" in report.run.learns) == (kind in ("finetune", "last layer"))
    assert report.run.steps == report.rehearsal.total == report.rehearsal.left == 2 * -(-report.lengths.looked // 4)
    outcome = train(config)
    stored = load_file(outcome.checkpoint / "trainer" / "state.safetensors")
    moments = sum(value.nbytes for name, value in stored.items() if name.startswith("optimizer/exp_avg"))
    found = memory(report.run, rows=2, bf16=False, mask=4)
    assert (report.predicted, found.moments) == (found.total, moments)
    assert report.run.learned == moments // 8
    if config.lora is not None:
        wide, held = 4 if kind == "queries" else 28, load_file(outcome.checkpoint / "adapter_model.safetensors")
        assert sum("lora_" in name for name in held) == wide
        assert report.run.adapters == sum(value.numel() for name, value in held.items() if "lora_" in name)
    assert report.run.weights == ("4bit" if kind == "4 bits" else "fp32")
    assert report.hours > 0


def test_hours_and_cost_follow_the_measured_steps(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "PATIENCE", 1000)
    monkeypatch.setattr(rehearsal, "MOST", 3)
    report = inspected(replace(finetune, steps=400, save_every=150), price=2.5)
    tried = report.rehearsal
    assert (tried.steps, report.saves) == (rehearsal.STEPS + 3, 3)
    mean = report.lengths.tokens * report.run.batch
    steps = 400 * tried.seconds * mean / tried.tokens
    assert report.hours * 3600 == pytest.approx(steps + 3 * tried.save)
    assert report.rate == pytest.approx(400 * report.run.batch * flops(report.run).total / steps)
    assert report.cost == pytest.approx(2.5 * report.hours)
    block = report.prediction()
    assert [line.split()[0] for line in block] == ["prediction", "memory", "time", "cost"]
    assert f"{report.predicted / GIB:.2f} GiB" in block[1]
    assert f"{report.cost:.2f} at 2.5" in block[3]
    assert "with --price" in replace(report, price=None).prediction()[3]


# ---- it reads the model once, and what it wrote


@pytest.mark.parametrize("kind", ["finetune", "lora"])
def test_the_model_is_loaded_once_and_the_checkpoint_read_back(kind: str, finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load, adapter, trainer = store.load, lora.read, state.read_trainer
    monkeypatch.setattr(store, "load", lambda folder, **how: (read.append(f"model {folder.name}"), load(folder, **how))[1])
    monkeypatch.setattr(lora, "read", lambda model, folder: (read.append(f"adapter {folder.name}"), adapter(model, folder))[1])
    monkeypatch.setattr(state, "read_trainer", lambda folder: (read.append(f"trainer {folder.name}"), trainer(folder))[1])
    inspected(replace(finetune, **KINDS[kind]))
    back = ["trainer step-3", *(["model tiny", "adapter step-3"] if kind == "lora" else ["model step-3"])]
    assert read == ["model tiny", *back]


# ---- a run that goes on


def test_a_run_that_goes_on_is_inspected_from_where_it_stands(finetune: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(finetune, steps=6, save_every=1, holdout=2)
    stopped = train(config, on_step=lambda report: os.kill(os.getpid(), signal.SIGTERM) if report.step == 2 else None)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    report = inspected(config)
    assert (report.rehearsal.begins, report.rehearsal.left, report.rehearsal.steps, report.saves) == (2, 4, 4, 4)
    assert "rehearsal   4 steps from step 2," in "\n".join(report.lines())
    assert {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()} == before
    with pytest.raises(TrainingError, match="seed changed"):
        preflight.inspect(replace(config, seed=5), say=silent)
    (stopped.checkpoint / "trainer" / "state.safetensors").unlink()
    assert inspected(config).rehearsal.begins == 1, "a damaged checkpoint is passed over, as the run will"
    assert train(config).step == 6
    assert preflight.inspect(config, say=silent) is None
    command = [word for word in words(config) if not word.startswith(("batch", "accum", "steps"))]
    options = ["batch_size=2", "accumulation=2", "steps=6", "holdout=2", "lr=1e-3", "max_length=512", "device=cpu"]
    assert main([*command, *options, "--dry-run"]) == 0
    assert "no step is left" in capsys.readouterr().out


# ---- it changes nothing


def test_a_run_after_a_preflight_is_the_run_without(finetune: TrainConfig) -> None:
    alone = train(replace(finetune, out=finetune.out.with_name("alone")))
    inspected(finetune)
    assert list(finetune.out.iterdir()) == []
    after = train(finetune)
    first, second = weights(alone.checkpoint), weights(after.checkpoint)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- it finds what would fail


def test_pictures_whose_header_cannot_be_read_are_named(pictures: TrainConfig) -> None:
    assert pictures.data is not None
    for number in (3, 7):
        (pictures.data.parent / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as caught:
        preflight.inspect(pictures, say=silent)
    assert caught.value.code == "bad_images"
    assert "2 of 10" in caught.value.what
    assert "(id c3)" in caught.value.what
    report = inspected(replace(pictures, on_bad_sample="skip"))
    assert len(report.unreadable) == 2
    assert report.lengths.replaced >= 2


def test_a_long_header_is_read_whole(pictures: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "HEAD", 4)
    assert pictures.data is not None
    count, wrong = preflight.headers(read_llava(pictures.data), pictures, silent)
    assert (count, wrong) == (10, ())


def test_samples_without_a_learned_token_stop_it(finetune: TrainConfig, tiny_model_dir: Path) -> None:
    assert finetune.data is not None
    processor = Processor.load(tiny_model_dir)
    encoded = [processor.encode(sample.conversation, learn=True) for sample in read_llava(finetune.data)]
    start = min(int((one.labels != IGNORED).nonzero()[0]) for one in encoded if one.grids)
    with pytest.raises(TrainingError) as caught:
        preflight.inspect(replace(finetune, max_length=start), say=silent)
    assert caught.value.code == "silent_samples"


def test_a_save_that_fails_is_found_before_the_first_step(finetune: TrainConfig) -> None:
    def broken(model: Llava, processor: Processor, folder: Path) -> None:
        store.save(model, processor, folder)
        raise OSError("no room")

    with pytest.raises(LlavaError) as caught:
        preflight.inspect(finetune, say=silent, save_model=broken)
    assert caught.value.code == "not_saved"
    assert list(finetune.out.iterdir()) == []


def test_what_was_saved_wrongly_is_found(finetune: TrainConfig) -> None:
    def forgetful(model: Llava, processor: Processor, folder: Path) -> None:
        store.save(model, processor, folder)
        (folder / "model.safetensors").unlink()

    with pytest.raises(LlavaError):
        preflight.inspect(finetune, say=silent, save_model=forgetful)
    assert list(finetune.out.iterdir()) == []


# ---- the command


def words(config: TrainConfig) -> list[str]:
    given = {"start": config.start, "data": config.data, "out": config.out, "batch_size": 2, "accumulation": 1, "steps": 2, "dtype": "fp32"}
    return ["train", "finetune", *(f"{name}={value}" for name, value in given.items())]


def test_a_dry_run_reports_and_leaves_nothing(finetune: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(finetune), "--dry-run", "--price", "2"]) == 0
    shown = capsys.readouterr().out
    assert "[[" in shown
    for word in ("pictures", "samples", "rehearsal", "prediction", "    memory", "    time", "    cost"):
        assert re.search(rf"^{word} ", shown, re.MULTILINE)
    assert list(finetune.out.iterdir()) == []


def test_training_inspects_first_unless_told_not_to(finetune: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(finetune)) == 0
    told = capsys.readouterr()
    assert "rehearsal" in told.err
    assert told.out.strip() == str(finetune.out / "step-2")
    assert main([*words(replace(finetune, out=finetune.out.with_name("other"))), "preflight=false"]) == 0
    assert "rehearsal" not in capsys.readouterr().err


def test_two_ranks_inspect_together_and_one_speaks(finetune: TrainConfig) -> None:
    said = finished(torchrun(replace(finetune, preflight=True, steps=2)))
    assert said.count("rehearsal ") == 1
    assert (finetune.out / "step-2").is_dir()
    assert not (finetune.out / rehearsal.FOLDER).exists()
    assert "2 devices" in said
