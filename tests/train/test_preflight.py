"""Laws of the preflight: it finds what would fail later, tells the truth about the data, and changes nothing."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_ranks import finished, torchrun
from weights import weights

from llavakit.checkpoint import store
from llavakit.cli import main
from llavakit.config import TrainConfig
from llavakit.data.sources import read_llava
from llavakit.errors import DataError, LlavaError, TrainingError
from llavakit.model.llava import Llava
from llavakit.processor import IGNORED, Processor
from llavakit.train import preflight
from llavakit.train.loop import train
from llavakit.train.plan import memory


def silent(text: object) -> None:
    """No one listens."""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the test of it takes more steps than must be."""
    monkeypatch.setattr(preflight, "PATIENCE", 0)


@pytest.fixture
def pictures(finetune: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The run on a copy of its data, which a test may spoil."""
    assert finetune.data is not None
    folder = tmp_path / "pictures"
    shutil.copytree(finetune.data.parent, folder)
    return replace(finetune, data=folder / finetune.data.name)


# ---- it tells the truth


def test_lengths_are_those_of_the_samples(finetune: TrainConfig, tiny_model_dir: Path) -> None:
    report = preflight.inspect(finetune, say=silent)
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
    report = preflight.inspect(finetune, say=silent)
    assert [mask.id for mask in report.masks] == ["c0", "c1", "c2"]
    for mask, colour in zip(report.masks, ("red", "green", "blue"), strict=True):
        learned = "".join(piece for run in mask.runs if run.kind == "learned" for piece in run.pieces)
        assert colour in learned.replace("▁", " ")
        assert learned.endswith("</s>")
        assert sum(len(run.pieces) for run in mask.runs if run.kind == "image") == 16


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_report_knows_the_run(stage: str, request: pytest.FixtureRequest) -> None:
    config: TrainConfig = replace(request.getfixturevalue(stage), steps=None, epochs=2)
    report = preflight.inspect(config, say=silent)
    assert report.run.learns == (("projector",) if stage == "pretrain" else ("projector", "language_model"))
    assert report.steps == report.run.steps == 2 * -(-report.lengths.looked // 4)
    assert report.predicted == memory(report.run, rows=2, bf16=False).total
    assert report.rehearsal.checkpoint > 8 * report.run.learned
    assert report.hours > 0
    assert any("GiB" in line for line in report.lines())


def test_hours_follow_the_measured_steps(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PATIENCE", 1000)
    monkeypatch.setattr(preflight, "MOST", 3)
    report = preflight.inspect(replace(finetune, steps=400), say=silent)
    assert report.rehearsal.steps == preflight.STEPS + 3
    mean = report.lengths.tokens * report.run.batch
    assert report.hours * 3600 == pytest.approx(400 * report.rehearsal.seconds * mean / report.rehearsal.tokens)


# ---- it changes nothing


def test_a_run_after_a_preflight_is_the_run_without(finetune: TrainConfig) -> None:
    alone = train(replace(finetune, out=finetune.out.with_name("alone")))
    preflight.inspect(finetune, say=silent)
    assert list(finetune.out.iterdir()) == []
    after = train(finetune)
    first, second = weights(alone.checkpoint), weights(after.checkpoint)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_only_a_new_run_is_inspected(finetune: TrainConfig) -> None:
    assert not preflight.begun(finetune)
    train(replace(finetune, steps=1))
    assert preflight.begun(finetune)


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
    report = preflight.inspect(replace(pictures, on_bad_sample="skip"), say=silent)
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
    assert main([*words(finetune), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "[[" in shown
    for word in ("pictures", "samples", "rehearsal", "memory", "time"):
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
    assert not (finetune.out / preflight.FOLDER).exists()
