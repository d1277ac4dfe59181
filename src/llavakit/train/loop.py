"""The training run, told from top to bottom: settle, begin or resume, then window by window until the end or a signal.

    window -> batches -> loss sums / learned tokens of the whole window -> gradients -> finite? -> AdamW -> metrics -> checkpoint?

Exactly one thing changes the weights (``_update``), exactly one writes a checkpoint (``_save``). A run and its resumption give the
same bits, because everything a step depends on is in ``state.Position``, the optimizer's tensors and the random states.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError

from llavakit import config as options
from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.data.loader import Loader, Window, learned_tokens
from llavakit.data.sources import Source, read_llava
from llavakit.errors import CheckpointError, TrainingError
from llavakit.model.llava import Llava
from llavakit.processor import Batch, Processor
from llavakit.train import start, state
from llavakit.train.optim import Optimizer, factor
from llavakit.train.progress import MetricsFile, Progress, StepReport, plot, progress
from llavakit.train.stages import STAGES

SaveModel = Callable[[Llava, Processor, Path], None]
SILENT_SHARE = 0.01  # hardening D10: more samples than this without a learned token stop the run
NOT_COMPARED = frozenset({"out", "resume", "force", "log_every", "preflight"})


@dataclass(frozen=True, kw_only=True)
class Outcome(os.PathLike[str]):
    """How a run ended: its last checkpoint, and the signal that stopped it, if one did. Usable as the checkpoint's path."""

    checkpoint: Path
    step: int
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0 when the run is complete, 128 + signal when it can be resumed: 130 for Ctrl-C, 143 for SIGTERM."""
        return 0 if self.signal is None else 128 + self.signal

    def __fspath__(self) -> str:
        return str(self.checkpoint)


@dataclass(kw_only=True)
class _Run:
    """Everything a step needs; the counters are what a checkpoint records of them."""

    config: TrainConfig
    model: Llava
    processor: Processor
    optimizer: Optimizer
    loader: Loader
    source: Source
    device: torch.device
    dtype: torch.dtype
    steps: int
    shown: Progress
    save_model: SaveModel
    step: int = 0
    non_finite: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    saved: Path | None = field(default=None)


def train(config: TrainConfig, *, on_step: Callable[[StepReport], None] | None = None, save_model: SaveModel = store.save) -> Outcome:
    """Run or resume a stage; the last checkpoint is a native model that every command and transformers load.

    ``on_step`` sees each report; ``save_model`` is the writer of the model's files. Raises ConfigError, DataError, CheckpointError or
    TrainingError before the first step where possible; the newest checkpoint survives all of them.
    """
    config = start.settled(config)
    _make_folder(config.out)
    shown = progress(1, every=config.log_every)
    with _Signals() as signals:
        resumed = _resume_point(config, shown.say)
        run = _begin(config, resumed, shown.say, save_model)
        metrics = MetricsFile(config.out, after=run.step)
        options.save(config, config.out / "config.yaml")
        with run.shown:
            _steps(run, signals, metrics, on_step)
        if run.saved is None or state.step_of(run.saved) != run.step:
            _save(run, must=True)
        assert run.saved is not None
        if signals.received is not None and run.step < run.steps:
            name = signal.Signals(signals.received).name
            shown.say(f"stopped by {name} after step {run.step} of {run.steps}; saved {run.saved}; the same command goes on from there")
            return Outcome(checkpoint=run.saved, step=run.step, signal=signals.received)
        plot(config.out)
        shown.say(f"done: {run.step} steps, saved {run.saved}; " + ", ".join(f"{n} {name}" for name, n in run.counts.items()))
        return Outcome(checkpoint=run.saved, step=run.step)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        reason = error.strerror or "not possible"
        raise TrainingError(f"cannot write there ({reason})", code="cannot_write", where=str(out), remedy="choose another out") from error


def _resume_point(config: TrainConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, or None for a new run. Clears what a killed run left behind."""
    state.sweep(config.out)
    if config.resume == "auto":
        return state.newest(config.out, say)
    used = state.checkpoints(config.out)
    if config.resume == "never":
        if used:
            raise TrainingError(
                "the folder holds a run", code="run_exists", where=str(config.out), remedy="choose another out, or resume=auto"
            )
        return None
    chosen = Path(config.resume)
    state.verify(chosen)
    newer = [
        folder for folder in used if folder != chosen and chosen.parent == config.out and state.step_of(folder) > state.step_of(chosen)
    ]
    if newer:
        raise TrainingError(
            f"{newer[0].name} is newer than {chosen.name}",
            code="newer_checkpoints",
            where=str(config.out),
            remedy="move the newer ones away, or choose another out",
        )
    return chosen


def _begin(config: TrainConfig, resumed: Path | None, say: Callable[[str], None], save_model: SaveModel) -> _Run:
    """Read and check the data, build or load the model, freeze, make the optimizer and the loader; restore all when resuming."""
    assert config.data is not None
    source = read_llava(config.data, image_root=config.images, on_bad=config.on_bad_sample, allow_outside=config.allow_outside)
    for line in source.report.lines():
        say(f"{source.report.records} records: {line}")
    position = optimizer_state = random = None
    if resumed is not None:
        position, optimizer_state, random = state.read_trainer(resumed)
        _check_unchanged(config, position, source, say)
    torch.manual_seed(config.seed)
    device = start.device(config)
    dtype = start.forward_dtype(config, device)
    model, processor = start.model_and_processor(config, resumed)
    rates = STAGES[config.stage].with_rows(config.rates).apply(model)
    start.place(model, rates, device=device, forward=dtype, frozen=config.frozen_dtype)
    start.set_modes(model, rates, device=device, forward=dtype, gradient_checkpointing=config.gradient_checkpointing)
    optimizer = Optimizer(
        model, rates, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, clip=config.clip, kind=config.optimizer
    )
    loader = _loader(config, source, processor)
    steps = config.steps if config.steps is not None else config.epochs * loader.steps_per_epoch
    run = _Run(
        config=config, model=model, processor=processor, optimizer=optimizer, loader=loader, source=source, device=device, dtype=dtype,
        steps=steps, shown=progress(steps, every=config.log_every), save_model=save_model,
    )  # fmt: skip
    if position is not None and optimizer_state is not None and random is not None:
        _restore(run, resumed, position, optimizer_state, random)
    _check_room(run)
    total = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{config.stage}: {optimizer.learned:,} of {total:,} parameters learn; {len(source):,} samples, {steps:,} steps of "
        f"{config.batch_size} x {config.accumulation}; {device.type}, {str(dtype).removeprefix('torch.')}"
        + (f"; resumed at step {run.step}" if resumed else "")
    )
    return run


def _loader(config: TrainConfig, source: Source, processor: Processor) -> Loader:
    return Loader(
        source,
        processor,
        batch_size=config.batch_size,
        seed=config.seed,
        accumulation=config.accumulation,
        workers=config.workers,
        group=config.group,
        lengths=source.lengths() if config.group else (),
        cache_bytes=config.cache_mb << 20,
        on_bad=config.on_bad_sample,
    )


def _restore(run: _Run, folder: Path | None, position: state.Position, optimizer: dict[str, Any], random: dict[str, Any]) -> None:
    run.optimizer.restore(optimizer)
    run.loader.restore(position.loader)
    run.step, run.non_finite, run.counts = position.step, position.non_finite, Counter(position.counts)
    run.saved = folder if folder is not None and folder.parent == run.config.out else None
    state.restore_random(random, run.device)


def _check_unchanged(config: TrainConfig, position: state.Position, source: Source, say: Callable[[str], None]) -> None:
    """Print what differs from the checkpoint's run; refuse what changes the model, the samples or their order (T10, D12)."""
    now = options.to_dict(config)
    changed = [d for d in options.differences(position.config, now) if d.name not in NOT_COMPARED]
    for difference in changed:
        say(f"changed since the checkpoint: {difference}")
    refused = [difference.name for difference in changed if difference.name in options.FIXED]
    if position.config["batch_size"] * position.config["accumulation"] != config.batch_size * config.accumulation:
        refused.append("batch_size x accumulation")
    if position.fingerprint != source.fingerprint:
        refused.append(f"the content of {config.data}")
    if refused and not config.force:
        raise TrainingError(
            f"not the run of the checkpoint: {', '.join(refused)} changed",
            code="run_changed",
            where=str(config.out),
            remedy="undo the change, choose another out, or force=true",
        )


def _steps(run: _Run, signals: _Signals, metrics: MetricsFile, on_step: Callable[[StepReport], None] | None) -> None:
    """Consume windows until the last step or a signal."""
    if run.step >= run.steps or signals.received is not None:
        return
    began = time.perf_counter()
    for window in run.loader:
        for problem in window.replaced:
            run.shown.say(f"replaced: {problem}")
        share = factor(run.step, steps=run.steps, warmup=run.config.warmup)
        loss, norm, rate = _update(run, window, share)
        run.step, now = run.step + 1, time.perf_counter()
        report = StepReport(
            step=run.step, epoch=window.epoch, loss=loss, lr=rate, grad_norm=norm, tokens=window.tokens, learned=window.learned,
            samples=window.samples, step_time=now - began, tokens_per_s=window.tokens / (now - began),
        )  # fmt: skip
        began = now
        metrics.write(report)
        run.shown.step(report)
        if on_step is not None:
            on_step(report)
        _check_health(run, window, report)
        if run.step >= run.steps or signals.received is not None:
            return
        if run.step % run.config.save_every == 0:
            _save(run, must=False)


def _update(run: _Run, window: Window, share: float) -> tuple[float | None, float | None, float]:
    """One optimizer step: mean loss over the window's learned tokens, gradient norm, rate. Nothing changes unless both are finite (T4)."""
    total = torch.zeros((), device=run.device)
    try:
        for batch in window.batches:
            if learned_tokens(batch) == 0:
                continue
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
                output = run.model(_unmasked(batch).to(run.device, torch.float32))
            (output.loss_sum / window.learned).backward()
            total += output.loss_sum.detach()
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(window) from error
    if window.learned == 0:
        return None, None, run.config.lr * share
    norm = float(run.optimizer.clip_gradients())
    loss = float(total) / window.learned
    finite = math.isfinite(loss) and math.isfinite(norm)
    rate = run.optimizer.step(share) if finite else run.config.lr * share
    run.optimizer.forget_gradients()
    return (loss, norm, rate) if finite else (None, None, rate)


def _unmasked(batch: Batch) -> Batch:
    """The padding stands on the right, where causal attention never looks: without a mask the kernels are faster, the loss the same."""
    return replace(batch, mask=torch.ones_like(batch.mask))


def _out_of_memory(window: Window) -> TrainingError:
    longest = max(window.batches, key=lambda batch: batch.input_ids.numel())
    count, length = longest.input_ids.shape
    return TrainingError(
        f"out of device memory at {count} samples of up to {length} tokens with {longest.views.shape[0]} views",
        code="out_of_memory",
        remedy="halve batch_size and double accumulation (the same run), or gradient_checkpointing=true, or lower max_length",
    )


def _check_health(run: _Run, window: Window, report: StepReport) -> None:
    """Count steps that could not be taken and samples that teach nothing; stop when there are too many."""
    run.counts += Counter(samples=window.samples, silent=window.silent, cut=window.cut, replaced=len(window.replaced))
    if report.loss is not None:
        run.non_finite = 0
    elif window.learned:
        run.non_finite += 1
        line = {"step": report.step, "ids": window.ids, "learned": window.learned}
        with (run.config.out / "non_finite.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        run.shown.say(f"step {report.step}: loss or gradient is not finite; weights unchanged; sample ids in non_finite.jsonl")
        if run.non_finite >= run.config.non_finite_limit:
            raise TrainingError(
                f"{run.non_finite} steps in a row without a finite loss and gradient",
                code="non_finite",
                where=str(run.config.out),
                remedy="lower lr, look at the samples in non_finite.jsonl, or dtype=fp32; the last checkpoint is from before",
            )
    if run.counts["silent"] > SILENT_SHARE * max(run.counts["samples"], 100):
        raise TrainingError(
            f"{run.counts['silent']} of {run.counts['samples']} samples have no learned token",
            code="silent_samples",
            where=str(run.config.data),
            remedy="raise max_length, or look at a sample with `llava show`",
        )


def _save(run: _Run, *, must: bool) -> None:
    """Write the checkpoint of this step. A full disk costs this checkpoint, never the last one (T3); it is an error when ``must``."""
    position = state.Position(
        step=run.step, loader={"window": run.step}, non_finite=run.non_finite, counts=dict(run.counts),
        fingerprint=run.source.fingerprint, config=options.to_dict(run.config),
    )  # fmt: skip

    def write(folder: Path) -> None:
        run.save_model(run.model, run.processor, folder)
        state.write_trainer(folder, position, run.optimizer.state(), run.device)

    try:
        run.saved = state.commit(run.config.out, run.step, write)
        state.prune(run.config.out, run.config.keep)
    except (OSError, SafetensorError, CheckpointError) as error:
        what = f"step {run.step} could not be saved: {error}; {start.room(run.config.out)} bytes free, about {_size(run)} needed"
        if must:
            raise TrainingError(
                what, code="not_saved", where=str(run.config.out), remedy="make room; the checkpoint before is intact and resumes"
            ) from error
        run.shown.say(f"{what}; going on")


def _size(run: _Run) -> int:
    """Bytes of one checkpoint: every weight, and two fp32 moments of each learned one."""
    return sum(parameter.nbytes for parameter in run.model.parameters()) + 8 * run.optimizer.learned


def _check_room(run: _Run) -> None:
    free, needed = start.room(run.config.out), _size(run)
    if free < needed:
        raise TrainingError(
            f"a checkpoint needs {needed} bytes, {free} are free", code="disk_full", where=str(run.config.out), remedy="make room"
        )


class _Signals:
    """SIGINT and SIGTERM ask the run to end after the step; the second one ends the process at once (T2)."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
