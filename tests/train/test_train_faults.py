"""What a run leaves behind, and what stops it: signals, numbers that are none, samples that teach nothing, disks that fill."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from weights import equal, weights

from llavakit.checkpoint import store
from llavakit.config import PRETRAIN, TrainConfig
from llavakit.errors import LlavaError, TrainingError
from llavakit.train import loop, progress, start, state
from llavakit.train.loop import Outcome, train
from llavakit.train.progress import StepReport, read_metrics
from llavakit.train.signals import Signals

# ---- what a run leaves behind


def test_the_run_folder_is_complete(finetune: TrainConfig) -> None:
    reports: list[StepReport] = []
    outcome = train(finetune, on_step=reports.append)
    assert isinstance(outcome, Outcome)
    assert (outcome.step, outcome.exit_code, outcome.checkpoint) == (3, 0, finetune.out / "step-3")
    lines = read_metrics(finetune.out)
    assert [line["step"] for line in lines] == [report.step for report in reports] == [1, 2, 3]
    names = ["step", "epoch", "loss", "lr", "grad_norm", "tokens", "learned", "samples", "step_time", "tokens_per_s"]
    assert list(lines[0]) == names
    assert lines[-1]["epoch"] == 1.0
    assert (finetune.out / "latest").read_text() == "step-3\n"
    assert (finetune.out / "loss.png").stat().st_size > 1000
    echo = TrainConfig(**{"stage": "pretrain"})
    assert loop.options.load(echo, finetune.out / "config.yaml") == start.settled(finetune)


def test_the_echo_reruns_the_run_bit_for_bit(finetune: TrainConfig, tmp_path: Path) -> None:
    first = train(finetune)
    content = yaml.safe_load((finetune.out / "config.yaml").read_text())
    again = loop.options.from_dict(PRETRAIN, content | {"out": str(tmp_path / "again")})
    assert equal(weights(first), weights(train(again)))


def test_old_checkpoints_go_and_the_kept_ones_verify(finetune: TrainConfig) -> None:
    train(replace(finetune, steps=4, save_every=1, keep=2))
    kept = state.checkpoints(finetune.out)
    assert [folder.name for folder in kept] == ["step-4", "step-3"]
    for folder in kept:
        state.verify(folder)


def test_transformers_loads_a_checkpoint_as_it_is(finetune: TrainConfig) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    outcome = train(replace(finetune, steps=1))
    theirs = LlavaForConditionalGeneration.from_pretrained(outcome.checkpoint)
    ours = weights(outcome)
    assert torch.equal(theirs.get_input_embeddings().weight, ours["language_model.model.embed_tokens.weight"])
    assert AutoProcessor.from_pretrained(outcome.checkpoint).tokenizer is not None


def test_plain_lines_in_a_pipe_and_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    report = StepReport(
        step=1, epoch=0.5, loss=2.0, lr=1e-3, grad_norm=1.0, tokens=100, learned=25, samples=4, step_time=0.5, tokens_per_s=200
    )
    for stream in (io.StringIO(), Terminal()):
        with progress.progress(10, every=5, stream=stream) as shown:
            shown.step(report)
            shown.say("[words] in brackets")
        assert "loss 2.0000" in stream.getvalue()
        assert "[words] in brackets" in stream.getvalue()
        assert ("\x1b" in stream.getvalue()) == stream.isatty()


# ---- what stops a run


def test_a_step_that_is_not_finite_changes_nothing_and_too_many_stop(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call >= 4)
    seen: list[StepReport] = []
    with pytest.raises(TrainingError) as caught:
        train(replace(finetune, batch_size=4, accumulation=1, steps=9, save_every=1, keep=0, non_finite_limit=3), on_step=seen.append)
    assert caught.value.code == "non_finite"
    assert [report.loss is None for report in seen] == [False] * 3 + [True] * 3
    dumped = [json.loads(line) for line in (finetune.out / "non_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in dumped] == [4, 5, 6]
    assert all(len(line["ids"][0]) == 4 for line in dumped)
    at = {n: weights(finetune.out / f"step-{n}") for n in (2, 3, 4, 5)}
    assert equal(at[3], at[4])
    assert equal(at[4], at[5])
    assert not equal(at[2], at[3])


def test_one_bad_step_is_survived(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda call: call == 2)
    outcome = train(replace(finetune, batch_size=4, accumulation=1, steps=3, non_finite_limit=2))
    assert outcome.exit_code == 0
    assert [line["loss"] is None for line in read_metrics(finetune.out)] == [False, True, False]
    assert all(bool(value.isfinite().all()) for value in weights(outcome).values())


def poison(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    """Make the loss of some forward passes infinite."""
    calls = 0
    forward = loop.Llava.forward

    def poisoned(self: Any, batch: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        output = forward(self, batch, **options)
        return output._replace(loss_sum=output.loss_sum * math.inf) if when(calls) else output

    monkeypatch.setattr(loop.Llava, "forward", poisoned)


def test_samples_that_teach_nothing_stop_the_run(finetune: TrainConfig) -> None:
    """D10: a length that leaves no room for the replies is an error, not a loss of 0."""
    with pytest.raises(LlavaError) as caught:
        train(replace(finetune, max_length=12, batch_size=12))
    assert caught.value.code in ("silent_samples", "context_length_exceeded")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step(number: int, code: int, finetune: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(report: StepReport) -> None:
        if report.step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    outcome = train(replace(finetune, steps=5), on_step=interrupt)
    assert signal.getsignal(number) is before
    assert (outcome.step, outcome.exit_code, outcome.checkpoint.name) == (2, code, "step-2")
    assert "goes on from there" in capfd.readouterr().err
    assert train(replace(finetune, steps=5)).exit_code == 0


def test_the_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_the_own_signal_after_another_ranks_is_the_first() -> None:
    """A launcher signals one rank after the other: a rank that has agreed to stop must live until it has saved."""
    with Signals() as signals:
        signals.received = signal.SIGTERM  # as agreed with the ranks that were signalled before
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM


# ---- disks that fail


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel refuses longer files: what a full disk looks like to every writer, also those not written in Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_during_a_save_costs_only_that_save(finetune: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """T3: half a model written, then ENOSPC; the checkpoint before stays, nothing half stays, the run goes on."""
    calls = 0

    def failing(model: Any, processor: Any, folder: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            folder.mkdir()
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        store.save(model, processor, folder)

    outcome = train(replace(finetune, steps=3, save_every=1, keep=0), save_model=failing)
    assert [folder.name for folder in state.checkpoints(finetune.out)] == ["step-3", "step-1"]
    assert not list(finetune.out.glob("*.tmp*"))
    assert "step 2 could not be saved" in capfd.readouterr().err
    state.verify(outcome.checkpoint)


def test_a_last_save_that_fails_is_an_error_and_the_run_resumes(finetune: TrainConfig) -> None:
    def limited(model: Any, processor: Any, folder: Path) -> None:
        with files_limited_to(2000):
            store.save(model, processor, folder)

    train(replace(finetune, steps=2))
    with pytest.raises(TrainingError) as caught:
        train(replace(finetune, steps=3), save_model=limited)
    assert caught.value.code == "not_saved"
    assert "bytes free" in str(caught.value)
    assert state.newest(finetune.out, print) == finetune.out / "step-2"
    assert train(replace(finetune, steps=3)).step == 3


def test_a_disk_without_room_is_noticed_at_the_start(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "room", lambda folder: 10)
    with pytest.raises(TrainingError) as caught:
        train(finetune)
    assert caught.value.code == "disk_full"


def test_a_folder_that_cannot_be_written_is_noticed_at_the_start(finetune: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError) as caught:
        train(replace(finetune, out=tmp_path / "file" / "run"))
    assert caught.value.code == "cannot_write"
