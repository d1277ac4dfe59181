"""What is looked at before the first step of a run, so that nothing fails after ten hours that could have failed at once.

    every picture's header      opened by threads                      DataError  bad_images
    a draw of the samples       tokens, what is cut, what is silent    TrainingError  silent_samples
    the first samples           what is learned in them, to be read
    a rehearsal                 ``loop.train`` itself, a few steps in out/.preflight: steps, save, verify, load, resume
    a prediction                memory and hours (``train.plan``), with the speed that the rehearsal showed

Nothing of the run changes: the rehearsal has its own folder, which is removed, and the run draws its random numbers anew.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.data.loader import Loader
from llavakit.data.masks import Run as Piece
from llavakit.data.masks import runs
from llavakit.data.mixture import Mixture
from llavakit.data.rules import SHOWN
from llavakit.data.sources import Sample, Source
from llavakit.errors import DataError, ImageError, LlavaError, TrainingError
from llavakit.images import image_size
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.train import loop, start, state
from llavakit.train.loop import SILENT_SHARE
from llavakit.train.plan import GIB, Part, Run, calibrate, flops, hours, memory
from llavakit.train.progress import StepReport
from llavakit.train.ranks import Ranks, joined
from llavakit.train.saving import SaveModel
from llavakit.train.stages import STAGES
from llavakit.types import Image

FOLDER = ".preflight"
LOOKED = 512  # samples encoded to learn how long they are
MASKS = 3  # samples shown
STEPS = 4  # of the rehearsal's first leg; the first is not timed
PATIENCE, MOST = 8, 40  # seconds, steps: where steps are quick, so many more after resuming, because few measure badly
HEAD = 1 << 16  # bytes of a picture file that mostly hold its header
THREADS = 8
PARTS: Mapping[str, Part] = {"vision_tower": "tower", "multi_modal_projector": "projector", "language_model": "language_model"}

Say = Callable[[str], object]


@dataclass(frozen=True)
class Mask:
    """A sample as the model learns it."""

    id: str
    where: str
    runs: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of ``looked`` samples of the run: means of a sample, the longest, and how many are cut, silent, or cannot be used."""

    looked: int
    tokens: float
    image_tokens: float
    learned: float
    views: float
    longest: int
    padding: float
    cut: int
    silent: int
    replaced: int


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a few steps of the run showed. ``peak`` are bytes on a CUDA device, None elsewhere."""

    steps: int
    seconds: float  # of a step, the first left out
    tokens: float  # of those steps
    checkpoint: int  # bytes
    free: int
    save_and_train: float  # seconds of the first leg
    resume: float  # seconds of loading and restoring
    peak: int | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found; ``run`` is what ``train.plan`` computes with."""

    records: int
    remarks: tuple[str, ...]
    pictures: int
    unreadable: tuple[str, ...]
    masks: tuple[Mask, ...]
    lengths: Lengths
    rehearsal: Rehearsal
    run: Run
    steps: int
    predicted: float  # bytes on the device
    room: int | None
    rate: float  # FLOP/s reached
    hours: float

    def lines(self) -> list[str]:
        """For a person."""
        seen, tried = self.lengths, self.rehearsal
        measured = f", measured {tried.peak / GIB:.2f}" if tried.peak is not None else ""
        there = f" of {self.room / GIB:.2f}" if self.room is not None else ""
        return [
            *self.remarks,
            f"pictures    {self.pictures} headers opened, {len(self.unreadable)} cannot be read",
            f"samples     {seen.looked} of {self.records} looked at: {seen.tokens:.0f} tokens ({seen.image_tokens:.0f} of pictures, "
            f"{seen.learned:.0f} learned), the longest {seen.longest}; {seen.padding:.2f} positions for each token",
            f"            {seen.cut} cut at max_length, {seen.silent} without a learned token, {seen.replaced} cannot be used",
            f"rehearsal   {tried.steps} steps, saved and resumed: a checkpoint takes {tried.checkpoint / GIB:.3f} GiB of "
            f"{tried.free / GIB:.1f} free, resuming {tried.resume:.1f} s",
            f"memory      predicted {self.predicted / GIB:.2f} GiB{measured}{there}",
            f"time        {tried.seconds:.2f} s a step, {self.steps} steps: {_span(self.hours)}; {self.rate / 1e12:.2f} TFLOP/s reached",
        ]


def _span(spent: float) -> str:
    return f"{spent:.1f} h" if spent >= 1 else f"{60 * spent:.1f} min"


def begun(config: TrainConfig) -> bool:
    """Whether the run has a checkpoint to go on from; then it was inspected before."""
    return config.resume not in ("auto", "never") or bool(state.checkpoints(config.out))


def first_rank() -> bool:
    """Whether this process is the one that reads for all and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def inspect(config: TrainConfig, *, say: Say, save_model: SaveModel = store.save) -> Report:
    """Look at everything a run needs. Raises what the run itself would raise, and DataError or TrainingError as listed above."""
    config = start.settled(config)
    source = start.samples(config, say)
    pictures, unreadable = headers(source, config, say) if first_rank() else (0, ())
    model, processor = start.model_and_processor(config, None)
    masks = tuple(_masks(source, processor))
    seen = lengths(source, processor, config)
    run = described(config, model, seen, samples=max(1, len(source) - config.holdout))
    del model
    steps = config.steps if config.steps is not None else run.steps
    tried = rehearse(replace(config, steps=min(STEPS, steps)), longest=steps, say=say, save_model=save_model)
    where = start.device(config)
    step = replace(run, batch=min(run.batch, run.samples))
    rate = calibrate(step, tried.seconds * run.tokens * step.batch / tried.tokens, peak=1.0)
    bf16 = start.forward_dtype(config, where) == torch.bfloat16
    remarks = [*source.report.lines(), *filter(None, [start.few_steps(config, run.samples, steps)])]
    return Report(
        records=source.report.records, remarks=tuple(remarks), pictures=pictures, unreadable=unreadable, masks=masks,
        lengths=seen, rehearsal=tried, run=run, steps=steps, predicted=memory(run, rows=config.batch_size, bf16=bf16).total,
        room=torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else None, rate=rate,
        hours=steps * min(run.batch, run.samples) * flops(run).total / rate / 3600 if config.steps is not None else hours(run, rate=rate),
    )  # fmt: skip


def headers(source: Sequence[Sample], config: TrainConfig, say: Say) -> tuple[int, tuple[str, ...]]:
    """Open every picture's header; how many pictures, and which cannot be read. Raises DataError ``bad_images`` unless they are skipped."""
    found = ((image, sample) for sample in source for image in sample.conversation.images)
    count, wrong, told = 0, list[str](), time.monotonic()
    with ThreadPoolExecutor(THREADS) as threads:
        for part in _parts(found, 64 * THREADS):
            wrong += [line for line in threads.map(lambda pair: _unreadable(*pair), part) if line]
            count += len(part)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                say(f"{count} pictures opened")
    if wrong and config.on_bad_sample == "stop":
        raise DataError(
            f"{len(wrong)} of {count} pictures cannot be read: {'; '.join(wrong[:SHOWN])}{'; ...' if len(wrong) > SHOWN else ''}",
            code="bad_images",
            where=str(config.data),
            remedy="repair them, or leave their samples out with on_bad_sample=skip",
        )
    return count, tuple(wrong)


def _parts(values: Iterator[tuple[Image, Sample]], size: int) -> Iterator[list[tuple[Image, Sample]]]:
    part: list[tuple[Image, Sample]] = []
    for value in values:
        part.append(value)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


def _unreadable(image: Image, sample: Sample) -> str:
    """What is wrong with a picture's header, or nothing. The beginning of the file is read first, all of it where that is too little."""
    try:
        if isinstance(image.source, Path):
            with contextlib.suppress(ImageError, OSError), image.source.open("rb") as file:
                image_size(Image(file.read(HEAD)))
                return ""
        image_size(image)
    except LlavaError as error:
        return f"{sample.where} (id {sample.id}): {error.where} {error.what}"
    return ""


def _masks(source: Sequence[Sample], processor: Processor) -> Iterator[Mask]:
    """The first samples that can be used."""
    long = _unbound(processor)
    shown = 0
    for sample in source:
        if shown == MASKS:
            return
        with contextlib.suppress(LlavaError):
            yield Mask(sample.id, sample.where, tuple(runs(long.encode(sample.conversation, learn=True), processor)))
            shown += 1


def _unbound(processor: Processor) -> Processor:
    """The same processor without a bound: training cuts what is too long."""
    unbound = copy(processor)
    unbound.max_length = sys.maxsize
    return unbound


def lengths(source: Source | Mixture, processor: Processor, config: TrainConfig) -> Lengths:
    """Encode samples drawn evenly from the file, in batches as the run makes them. Raises TrainingError ``silent_samples``."""
    every = max(1, math.ceil(len(source) / LOOKED))
    chosen = range(0, len(source), every)
    sizes = source.lengths()
    loader = Loader(
        [source[i] for i in chosen], processor, batch_size=config.batch_size, seed=config.seed, accumulation=config.accumulation,
        group=config.group, lengths=[sizes[i] for i in chosen], pack=config.pack, placement=config.placement, on_bad=config.on_bad_sample,
    )  # fmt: skip
    windows = [window for _, window in zip(range(loader.steps_per_epoch), loader, strict=False)]
    batches = [batch for window in windows for batch in window.batches]
    looked = sum(window.samples for window in windows)
    tokens = sum(window.tokens for window in windows)
    silent = sum(window.silent for window in windows)
    if silent > SILENT_SHARE * max(looked, 100):
        raise TrainingError(
            f"{silent} of {looked} samples looked at have no learned token",
            code="silent_samples",
            where=str(config.data),
            remedy="raise max_length, or look at a sample with `llava show`",
        )
    return Lengths(
        looked=looked,
        tokens=tokens / looked,
        image_tokens=sum(grid.tokens for batch in batches for grid in batch.grids) / looked,
        learned=sum(window.learned for window in windows) / looked,
        views=sum(len(batch.views) for batch in batches) / looked,
        longest=max(max(batch.segments or (int(batch.mask.sum(1).max()),)) for batch in batches),
        padding=sum(batch.input_ids.numel() for batch in batches) / tokens,
        cut=sum(window.cut for window in windows),
        silent=silent,
        replaced=sum(len(window.replaced) for window in windows),
    )


def described(config: TrainConfig, model: Llava, seen: Lengths, *, samples: int) -> Run:
    """A run as ``train.plan`` sees it, with the lengths that were seen."""
    rates = STAGES[config.stage].with_rows(config.rates).apply(model)
    learns = tuple(part for name, part in PARTS.items() if any(found.startswith(name) for found in rates))
    stored = next(model.language_model.parameters()).dtype
    half = stored == torch.bfloat16 or config.frozen_dtype == "bf16"
    return Run(
        config=model.config, samples=samples, epochs=config.epochs, batch=config.batch_size * config.accumulation, views=seen.views,
        image_tokens=seen.image_tokens, text_tokens=seen.tokens - seen.image_tokens, learned_tokens=seen.learned, padding=seen.padding,
        learns=learns or ("projector",), weights="bf16" if half else "fp32", checkpointing=config.gradient_checkpointing,
    )  # fmt: skip


def rehearse(config: TrainConfig, *, longest: int, say: Say, save_model: SaveModel = store.save) -> Rehearsal:
    """Train ``config.steps`` steps, and more where they are quick but never more than ``longest``, in a folder of its own
    inside ``out``, save, verify what was saved, load it and resume. All is removed.

    Raises what these raise, KeyboardInterrupt when it was stopped by a signal.
    """
    with joined(start.device(config).type, config.timeout) as ranks:
        return _rehearsed(config, ranks, longest, say, save_model)


def _rehearsed(config: TrainConfig, ranks: Ranks, longest: int, say: Say, save_model: SaveModel) -> Rehearsal:
    folder = config.out / FOLDER
    if ranks.main:
        _remove(folder)
    tried = replace(config, out=folder, resume="auto", keep=1, save_every=config.steps or 1, holdout=0, track="none")
    reports: list[StepReport] = []
    where = start.device(config, ranks.local)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    say(f"rehearsing: {config.steps} steps, save, load, resume")
    try:
        began = time.perf_counter()
        saved = _quietly(tried, reports.append, save_model)
        first = time.perf_counter() - began
        state.verify(saved)
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        began = time.perf_counter()
        _quietly(tried, reports.append, save_model)  # there is no step left: it loads, restores and ends
        again = time.perf_counter() - began
        assert len(reports) == config.steps, "the resumed run found its place"
        slowest = ranks.of_main(max(report.step_time for report in reports[1:] or reports))
        more = min(MOST, longest - len(reports), int(PATIENCE / slowest))
        if more > 0:
            _quietly(replace(tried, steps=len(reports) + more, save_every=MOST + STEPS), reports.append, save_model)
        ranks.sums([0])  # all are done with the folder
    finally:
        if ranks.main:
            _remove(folder)
    timed = reports[1:] or reports
    return Rehearsal(
        steps=len(reports),
        seconds=sum(report.step_time for report in timed) / len(timed),
        tokens=sum(report.tokens for report in timed) / len(timed),
        checkpoint=size,
        free=start.room(config.out),
        save_and_train=first,
        resume=again,
        peak=torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None,
    )


def _quietly(config: TrainConfig, on_step: Callable[[StepReport], None], save_model: SaveModel) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        outcome = loop.train(config, on_step=on_step, save_model=save_model)
    if outcome.signal is not None:
        raise KeyboardInterrupt
    return outcome.checkpoint


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
