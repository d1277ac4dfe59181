"""What is looked at before the first step of a run, or before it goes on, so that nothing fails after ten hours that could have at once.

    every picture's header      opened by threads                      DataError  bad_images
    a draw of the samples       tokens, what is cut, what is silent    TrainingError  silent_samples
    the first samples           what is learned in them, to be read
    a rehearsal                 a few steps of the run, saved, verified, read back, gone on (``rehearsal``)
    a prediction                memory, hours and cost by ``train.plan``'s formulas, at the speed of the rehearsal's steps

The model is loaded once from where the run begins or goes on, and once from what the rehearsal wrote, which is to be read back.
Nothing of the run changes: the rehearsal has its own folder, which is removed, and the run draws its random numbers anew.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import partial
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
from llavakit.processor import Processor
from llavakit.train import going_on, lora, start
from llavakit.train.described import Samples, described
from llavakit.train.loop import SILENT_SHARE, Running
from llavakit.train.plan import GIB, Run, Sharding, calibrate, hours, memory
from llavakit.train.ranks import Ranks, joined
from llavakit.train.rehearsal import Rehearsal, rehearse
from llavakit.train.saving import SaveModel
from llavakit.train.signals import Signals
from llavakit.types import Image

LOOKED = 512  # samples encoded to learn how long they are
MASKS = 3  # samples shown
HEAD = 1 << 16  # bytes of a picture file that mostly hold its header
THREADS = 8

Say = Callable[[str], None]


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
class Report:
    """All that was found; ``run`` is what ``train.plan`` computes with. Hours and cost are those of what is left of it."""

    records: int
    remarks: tuple[str, ...]
    pictures: int
    unreadable: tuple[str, ...]
    masks: tuple[Mask, ...]
    lengths: Lengths
    rehearsal: Rehearsal
    run: Run
    saves: int
    devices: int
    predicted: float  # bytes on a device
    room: int | None
    rate: float  # FLOP/s reached by all devices
    hours: float
    price: float | None  # of a device for an hour

    @property
    def cost(self) -> float | None:
        """In the money of ``price``."""
        return None if self.price is None else self.hours * self.devices * self.price

    def lines(self) -> list[str]:
        """For a person."""
        seen, tried = self.lengths, self.rehearsal
        return [
            *self.remarks,
            f"pictures    {self.pictures} headers opened, {len(self.unreadable)} cannot be read",
            f"samples     {seen.looked} of {self.records} looked at: {seen.tokens:.0f} tokens ({seen.image_tokens:.0f} of pictures, "
            f"{seen.learned:.0f} learned), the longest {seen.longest}; {seen.padding:.2f} positions for each token",
            f"            {seen.cut} cut at max_length, {seen.silent} without a learned token, {seen.replaced} cannot be used",
            f"rehearsal   {tried.steps} steps{f' from step {tried.begins}' if tried.begins else ''}, saved, verified, read back, gone on",
            f"            a checkpoint takes {tried.checkpoint / GIB:.3f} GiB of {tried.free / GIB:.1f} free; beginning took "
            f"{tried.begin:.1f} s, saving {tried.save:.1f} s, resuming {tried.resume:.1f} s",
            *self.prediction(),
        ]

    def prediction(self) -> list[str]:
        """What it will take: closed formulas, at the speed that was measured."""
        tried = self.rehearsal
        measured = f", measured {tried.peak / GIB:.2f}" if tried.peak is not None else ""
        there = f", of {self.room / GIB:.2f}" if self.room is not None else ""
        spent = f"{self.cost:.2f} at {self.price:g} for a device and hour" if self.cost is not None else "with --price"
        return [
            f"prediction  {self.run.learned:,} numbers learn; {tried.left:,} steps of {self.run.batch} on {self.devices} "
            f"device{'s' if self.devices > 1 else ''}, by formulas at the speed of {max(1, tried.steps - 1)} measured steps",
            f"    memory  {self.predicted / GIB:.2f} GiB a device{measured}{there}",
            f"    time    {_span(self.hours)}: {tried.seconds:.2f} s a step ({self.rate / self.devices / 1e12:.2f} TFLOP/s a device), "
            f"{self.saves} checkpoint{'s' if self.saves != 1 else ''}",
            f"    cost    {self.hours * self.devices:.2f} device hours; {spent}",
        ]


def _span(spent: float) -> str:
    return f"{spent:.1f} h" if spent >= 1 else f"{60 * spent:.1f} min"


def first_rank() -> bool:
    """Whether this process is the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def inspect(config: TrainConfig, *, say: Say, save_model: SaveModel = store.save, price: float | None = None) -> Report | None:
    """Look at everything a run needs to begin, or to go on from its newest checkpoint; None where no step of it is left.

    Raises what the run itself would raise, DataError or TrainingError as listed above, and KeyboardInterrupt when a signal stopped it.
    """
    config = lora.settled(start.settled(config))
    with joined(start.device(config).type, config.timeout) as ranks:
        if ranks.main:
            going_on.make_folder(config.out)
        resumed = ranks.of_main(going_on.resume_point(config, say) if ranks.main else None)
        source = start.samples(config, say)
        pictures, unreadable = headers(source, config, say) if ranks.main else (0, ())
        say("rehearsing: a few steps, save, load, go on")
        with Signals() as signals:
            found = rehearse(config, ranks, signals, resumed, look=partial(_looked, source, config, ranks), save_model=save_model)
    if found is None:
        return None
    (masks, seen, run, predicted), tried = found
    where = start.device(config, ranks.local)
    rate = calibrate(run, tried.seconds * run.tokens * run.batch / tried.tokens, peak=1.0)
    saves = math.ceil(tried.left / config.save_every)
    remarks = [*source.report.lines(), *filter(None, [start.few_steps(config, max(1, len(source) - config.holdout), tried.total)])]
    return Report(
        records=source.report.records, remarks=tuple(remarks), pictures=pictures, unreadable=unreadable, masks=masks,
        lengths=seen, rehearsal=tried, run=run, saves=saves, devices=ranks.world, predicted=predicted,
        room=torch.cuda.mem_get_info(where)[1] if where.type == "cuda" else None, rate=rate,
        hours=hours(run, rate=rate) * tried.left / tried.total + saves * tried.save / 3600, price=price,
    )  # fmt: skip


def _looked(source: Source | Mixture, config: TrainConfig, ranks: Ranks, ready: Running) -> tuple[tuple[Mask, ...], Lengths, Run, float]:
    """What a run that is ready shows: masks, lengths, itself as a value, and the memory of a device by the formulas."""
    seen = lengths(source, ready.processor, config)
    data = Samples(
        samples=max(1, len(source) - config.holdout), views=seen.views, image_tokens=seen.image_tokens, learned_tokens=seen.learned,
        text_tokens=seen.tokens - seen.image_tokens, padding=seen.padding,
    )  # fmt: skip
    frozen = [value.dtype for value in ready.model.parameters() if not value.requires_grad and value.is_floating_point()]
    learning = [name for name, value in ready.model.named_parameters() if value.requires_grad]
    run = described(config, ready.model, learning, data, stored=frozen[0] if frozen else torch.float32)
    way: Sharding = "none" if ranks.world == 1 else "fsdp" if config.shard == "full" else "ddp"
    narrow, mask = ready.dtype == torch.bfloat16, 1 if ready.device.type == "cuda" else 4
    held = memory(run, rows=config.batch_size, devices=ranks.world, sharding=way, bf16=narrow, mask=mask)
    return tuple(_masks(source, ready.processor)), seen, run, held.total


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
