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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from llavakit import config as options
from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.data.holdout import Part, groups, split
from llavakit.data.loader import Loader, Window, learned_tokens
from llavakit.data.mixture import Mixture
from llavakit.data.sources import Source
from llavakit.errors import CheckpointError, TrainingError
from llavakit.model.llava import Llava
from llavakit.processor import Batch, Processor
from llavakit.train import going_on, lora, saving, start, state
from llavakit.train.card import card
from llavakit.train.optim import Optimizer, factor
from llavakit.train.progress import EVALUATIONS, LinesFile, Mute, Progress, StepReport, plot, progress, read_lines
from llavakit.train.ranks import Ranks, joined, quietly, spread, watched
from llavakit.train.report import write_report
from llavakit.train.saving import SaveModel
from llavakit.train.signals import Signals
from llavakit.train.trackers import Tracked, tracker
from llavakit.train.watch import Watch, measure

SILENT_SHARE = 0.01  # hardening D10: more samples than this without a learned token stop the run


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
    ranks: Ranks
    model: Llava
    forward: nn.Module
    processor: Processor
    optimizer: Optimizer
    loader: Loader
    source: Source | Mixture
    watch: Watch
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
    config = lora.settled(start.settled(config))
    with joined(start.device(config).type, config.timeout) as ranks, Signals() as signals:
        if ranks.main:
            going_on.make_folder(config.out)
        shown = progress(1, every=config.log_every) if ranks.main else Mute()
        resumed = ranks.of_main(going_on.resume_point(config, shown.say) if ranks.main else None)
        run = _begin(config, ranks, resumed, shown.say, save_model)
        logs = _logs(run) if ranks.main else None
        with run.shown, watched(ranks, config.out, config.timeout) as alive:
            _steps(run, signals, logs, on_step, alive)
        if run.saved is None or state.step_of(run.saved) != run.step:
            _save(run, must=True)
        assert run.saved is not None
        if signals.received is not None and run.step < run.steps:
            name = signal.Signals(signals.received).name
            shown.say(f"stopped by {name} after step {run.step} of {run.steps}; saved {run.saved}; the same command goes on from there")
            return Outcome(checkpoint=run.saved, step=run.step, signal=signals.received)
        if logs is not None:
            logs.tracked.close()
            plot(config.out)
            if run.step:
                write_report(config.out)
        lora.check_learned(run.model, config.out)
        shown.say(f"done: {run.step} steps, saved {run.saved}; " + ", ".join(f"{n} {name}" for name, n in run.counts.items()))
        return Outcome(checkpoint=run.saved, step=run.step)


def _begin(config: TrainConfig, ranks: Ranks, resumed: Path | None, say: Callable[[str], None], save_model: SaveModel) -> _Run:
    """Read and check the data, build or load the model, freeze, make the optimizer and the loader; restore all when resuming."""
    source = start.samples(config, say)
    for line in source.report.lines():
        say(f"{source.report.records} records: {line}")
    position = optimizer_state = random = None
    if resumed is not None:
        position, optimizer_state, random = state.read_trainer(resumed)
        going_on.check_unchanged(config, position, source, say)
    torch.manual_seed(config.seed)
    device = start.device(config, ranks.local)
    dtype = start.forward_dtype(config, device)
    begun = lora.begin(config, resumed, device=device, forward=dtype, save_model=save_model)
    model, processor, rates = begun.model, begun.processor, begun.rates
    start.check_packing(config, model)
    for name in model.vision_tower.never_run():
        model.get_parameter(name).requires_grad_(False)
        rates.pop(name, None)
    cut = ranks.world > 1 and config.shard == "full"  # then each layer goes to the device when it is cut, never the whole model
    start.place(model, rates, device=torch.device("cpu") if cut else device, forward=dtype, frozen=config.frozen_dtype)
    start.set_modes(model, rates, device=device, forward=dtype, gradient_checkpointing=config.gradient_checkpointing)
    forward = spread(model, ranks, shard=config.shard, device=device, forward=dtype)
    saving.apart(config.seed, ranks)
    optimizer = Optimizer(
        model, rates, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, clip=config.clip, kind=config.optimizer
    )
    samples, held = split(source, config.holdout, seed=config.seed)
    loader = _loader(config, samples, processor, ranks)
    steps = config.steps if config.steps is not None else config.epochs * loader.steps_per_epoch
    run = _Run(
        config=config, ranks=ranks, model=model, forward=forward, processor=processor, optimizer=optimizer, loader=loader, source=source,
        watch=Watch.of(groups(held), config.panel),
        device=device, dtype=dtype, steps=steps, shown=progress(steps, every=config.log_every) if ranks.main else Mute(),
        save_model=begun.save_model,
    )  # fmt: skip
    if position is not None and optimizer_state is not None and random is not None:
        _restore(run, resumed, position, optimizer_state, random)
    if ranks.main:
        _check_room(run)
    total = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{config.stage}: {optimizer.learned:,} of {total:,} parameters learn; {len(samples):,} samples, {steps:,} steps of "
        f"{config.batch_size} x {config.accumulation}; {device.type}, {str(dtype).removeprefix('torch.')}"
        + (f" on {ranks.world} ranks" if ranks.world > 1 else "")
        + (f"; resumed at step {run.step}" if resumed else "")
    )
    if remark := start.few_steps(config, len(samples), steps):
        say(remark)
    return run


def _loader(config: TrainConfig, source: Source | Mixture | Part, processor: Processor, ranks: Ranks) -> Loader:
    return Loader(
        source,
        processor,
        batch_size=config.batch_size,
        seed=config.seed,
        accumulation=config.accumulation,
        workers=config.workers,
        group=config.group,
        pack=config.pack,
        rank=ranks.rank,
        world=ranks.world,
        lengths=source.lengths(),
        placement=config.placement,
        cache_bytes=config.cache_mb << 20,
        on_bad=config.on_bad_sample,
    )


def _restore(run: _Run, folder: Path | None, position: state.Position, optimizer: dict[str, Any], random: dict[str, Any]) -> None:
    assert folder is not None
    saving.restore(folder, run.optimizer, optimizer)
    run.loader.restore(position.loader)
    run.step, run.non_finite, run.counts = position.step, position.non_finite, Counter(position.counts)
    run.saved = folder if folder.parent == run.config.out else None
    saving.restore_random(random, ranks=run.ranks, seed=run.config.seed + position.step, device=run.device)


def _steps(
    run: _Run,
    signals: Signals,
    logs: Logs | None,
    on_step: Callable[[StepReport], None] | None,
    alive: Callable[[], None],
) -> None:
    """Consume windows until the last step or a signal."""
    if run.step >= run.steps or signals.received is not None:
        return
    began = time.perf_counter()
    for window in run.loader:
        alive()
        for problem in window.replaced:
            run.shown.say(f"replaced: {problem}")
        share = factor(run.step, steps=run.steps, warmup=run.config.warmup)
        met = _met(run, window)
        loss, norm, rate = _update(run, window, share, met["learned"])
        run.step, now = run.step + 1, time.perf_counter()
        report = StepReport(
            step=run.step, epoch=window.epoch, loss=loss, lr=rate, grad_norm=norm, tokens=met["tokens"], learned=met["learned"],
            samples=met["samples"], step_time=now - began, tokens_per_s=met["tokens"] / (now - began),
        )  # fmt: skip
        began = now
        if logs is not None:
            logs.steps.write(asdict(report))
            logs.tracked.log(run.step, asdict(report))
        run.shown.step(report)
        if on_step is not None:
            on_step(report)
        _check_health(run, window, report, met)
        _agree(run, signals)
        if signals.received is not None:
            return  # who asks for the machine waits for the checkpoint, not for a measurement
        if run.step >= run.steps or run.step % (run.config.eval_every or run.config.save_every) == 0:
            _evaluate(run, logs)
            alive()
        if run.step >= run.steps:
            return
        if run.step % run.config.save_every == 0:
            _save(run, must=False)


@dataclass(frozen=True)
class Logs:
    """The files the main process appends to."""

    steps: LinesFile
    evaluations: LinesFile
    tracked: Tracked


def _logs(run: _Run) -> Logs:
    out = run.config.out
    options.save(run.config, out / "config.yaml")
    if run.watch.panel:
        run.watch.write_panel(out)
    tracked = tracker(run.config.track, out, options.to_dict(run.config), run.shown.say)
    return Logs(LinesFile(out, after=run.step), LinesFile(out, after=run.step, name=EVALUATIONS), tracked)


def _evaluate(run: _Run, logs: Logs | None) -> None:
    """Measure on the held-out samples, all ranks together."""
    if not run.watch.groups:
        return
    found = measure(
        run.watch, model=run.model, forward=run.forward, processor=run.processor, config=run.config, ranks=run.ranks, device=run.device,
        narrow=run.dtype == torch.bfloat16,
    )  # fmt: skip
    if logs is not None:
        logs.evaluations.write({"step": run.step} | found)
        logs.tracked.log(run.step, {f"held out/{name}": row["loss"] for name, row in found["losses"].items()})
    told = ", ".join(f"{name} {row['loss']:.4f}" for name, row in found["losses"].items())
    run.shown.say(f"held out at step {run.step}: {told}")


def _met(run: _Run, window: Window) -> dict[str, int]:
    """The counts of a window on all ranks."""
    names = ("samples", "silent", "cut", "learned", "tokens")
    own = [getattr(window, name) for name in names] + [len(window.replaced)]
    return dict(zip((*names, "replaced"), map(int, run.ranks.sums(own)), strict=True))


def _agree(run: _Run, signals: Signals) -> None:
    """A signal to one rank is a signal to all."""
    if run.ranks.world > 1 and run.ranks.sums([signals.received or 0])[0] and signals.received is None:
        signals.received = signal.SIGTERM


def _update(run: _Run, window: Window, share: float, learned: int) -> tuple[float | None, float | None, float]:
    """One optimizer step: mean loss over all ranks' learned tokens, gradient norm, rate. Nothing changes unless both are finite (T4)."""
    total, world = torch.zeros((), device=run.device), run.ranks.world
    try:
        for number, batch in enumerate(window.batches, 1):
            if world == 1 and learned_tokens(batch) == 0:
                continue
            last = number == len(window.batches)
            with quietly(run.forward, last=last), torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16):
                output = run.forward(_unmasked(batch).to(run.device, torch.float32))
                (output.loss_sum * (world / max(1, learned))).backward()  # DDP and FSDP2 take the mean over ranks
            total += output.loss_sum.detach()
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(window) from error
    if learned == 0:
        run.optimizer.forget_gradients()
        return None, None, run.config.lr * share
    norm = float(run.optimizer.clip_gradients())
    loss = run.ranks.sums([float(total)])[0] / learned
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


def _check_health(run: _Run, window: Window, report: StepReport, met: dict[str, int]) -> None:
    """Count steps that could not be taken and samples that teach nothing; stop when there are too many."""
    run.counts += Counter({name: met[name] for name in ("samples", "silent", "cut", "replaced")})
    if report.loss is not None:
        run.non_finite = 0
    elif met["learned"]:
        run.non_finite += 1
        ids = [one for rank in run.ranks.all(window.ids) for one in rank]
        if run.ranks.main:
            with (run.config.out / "non_finite.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": report.step, "ids": ids, "learned": met["learned"]}) + "\n")
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
    try:
        run.saved = saving.save(
            run.config.out, position, model=run.model, processor=run.processor, optimizer=run.optimizer, ranks=run.ranks,
            device=run.device, save_model=run.save_model, card=_card(run),
        )  # fmt: skip
        if run.ranks.main:
            state.prune(run.config.out, run.config.keep)
    except (OSError, SafetensorError, CheckpointError) as error:
        what = f"step {run.step} could not be saved: {error}; {start.room(run.config.out)} bytes free, about {_size(run)} needed"
        if must:
            raise TrainingError(
                what, code="not_saved", where=str(run.config.out), remedy="make room; the checkpoint before is intact and resumes"
            ) from error
        run.shown.say(f"{what}; going on")


def _card(run: _Run) -> str:
    known = [line for line in read_lines(run.config.out / EVALUATIONS) if line["step"] <= run.step]
    return card(run.config, step=run.step, samples=run.counts["samples"], learned=run.optimizer.learned, evaluations=known)


def _size(run: _Run) -> int:
    """Bytes of one checkpoint: the weights in it, and two fp32 moments of each learned one."""
    return lora.bytes_stored(run.model) + 8 * run.optimizer.learned


def _check_room(run: _Run) -> None:
    free, needed = start.room(run.config.out), _size(run)
    if free < needed:
        raise TrainingError(
            f"a checkpoint needs {needed} bytes, {free} are free", code="disk_full", where=str(run.config.out), remedy="make room"
        )
