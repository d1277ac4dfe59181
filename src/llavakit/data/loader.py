"""Samples to batches, in an order that is a pure function of (number of samples, seed, epoch) and, when grouped, their lengths.

One window is what one optimizer step eats, on all ranks together: ``accumulation`` times ``batch_size`` samples. Windows are numbered
through all epochs, every sample stands in exactly one window of an epoch, and the last window of an epoch may be short. So the whole
state of the loader is one number, and resuming is asking for the next window, on any number of ranks: no batch is read to be thrown away.

    epoch 0                          epoch 1
    [window 0][window 1][window 2]   [window 3][window 4][window 5] ...
        |  dealt by length: packed rows of nearly equal sums, or padded rows of nearly equal lengths; as many on every rank
        +--> rank 0: batch batch     rank 1: batch batch
"""

from __future__ import annotations

import heapq
import math
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch

from llavakit.data.features import FeatureStore
from llavakit.data.placement import Placement
from llavakit.data.placement import place as placed
from llavakit.data.sources import OnBad, Sample
from llavakit.errors import ContextError, DataError, LlavaError, TrainingError
from llavakit.processor import IGNORED, Batch, Inputs, Processor

BYTES_OF_A_TOKEN = 4  # of English text in a file; only for dealing samples to batches
MOST_REPLACED = 100  # neighbours tried for one bad sample before giving up


@dataclass(frozen=True, kw_only=True)
class Window:
    """This rank's batches of one optimizer step. ``epoch`` counts what is read when it is done; ``learned`` counts shifted labels.

    A batch without samples keeps the ranks in step where a short window has too few for all.
    """

    step: int
    epoch: float
    batches: tuple[Batch, ...]
    ids: tuple[tuple[str, ...], ...]
    tokens: int
    learned: int
    cut: int  # samples longer than max_length, of which the beginning is used (hardening D7)
    silent: int  # samples without one learned token (hardening D10)
    replaced: tuple[str, ...]  # what was wrong with samples whose place a neighbour took

    @property
    def samples(self) -> int:
        return sum(len(ids) for ids in self.ids)


def learned_tokens(batch: Batch) -> int:
    """How many positions carry loss once labels are shifted: the first position never does."""
    return int((batch.labels[:, 1:] != IGNORED).sum())


def epoch_windows(
    count: int, *, size: int, seed: int, epoch: int, lengths: Sequence[tuple[bool, int]] = (), group: int = 0
) -> list[list[int]]:
    """The sample numbers of each window of an epoch.

    ``RandomState`` draws, because numpy promises that its streams never change. With ``group`` runs of so many windows are sorted by
    (has image, length), cut, and the cuts shuffled: neighbours pad less, any one window is still a random draw of the run.
    """
    draw = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, epoch])))
    order: list[int] = draw.permutation(count).tolist()
    if not group:
        return [order[i : i + size] for i in range(0, count, size)]
    windows: list[list[int]] = []
    for start in range(0, count, size * group):
        run = sorted(order[start : start + size * group], key=lambda i: lengths[i])
        cuts = [run[i : i + size] for i in range(0, len(run), size)]
        windows += [cuts[i] for i in draw.permutation(len(cuts)).tolist()]
    return windows


def deal(order: Sequence[int], costs: Mapping[int, int], parts: int, *, alike: bool) -> list[list[int]]:
    """The samples of a window in so many batches, as equal in number as can be; a pure function, so that every rank deals the same.

    alike: batches of samples of nearly one length, which pad least; else batches whose sums of ``costs`` are nearly one (spec 4.3).
    """
    ranked = sorted(order, key=lambda i: -costs[i])  # stable: equal ones keep their drawn order
    sizes = [len(order) // parts + (part < len(order) % parts) for part in range(parts)]
    if alike:
        ends = list(accumulate(sizes))
        return [ranked[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts) if sizes[part]]
    for index in ranked:
        total, part = heapq.heappop(heap)
        dealt[part].append(index)
        if len(dealt[part]) < sizes[part]:
            heapq.heappush(heap, (total + costs[index], part))
    return dealt


class Loader:
    """Endless windows; ``state()`` is the number of windows already given out.

    ``lengths`` (has an image, length in bytes) are only used to sort and deal. ``pack``: batches are packed rows, else padded ones.
    ``rank`` of ``world``: whose batches of each window these are. With ``workers`` the windows are prepared in as many processes, in the
    same order. ``cache_bytes`` bounds a memory of prepared samples (one for each process): it fills once and is never emptied, so it
    changes the speed and nothing else. ``features``: a store that is asked for pictures before their views are made.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        *,
        batch_size: int,
        seed: int,
        accumulation: int = 1,
        workers: int = 0,
        group: int = 0,
        lengths: Sequence[tuple[bool, int]] = (),
        pack: bool = False,
        placement: Placement = "as_data",
        rank: int = 0,
        world: int = 1,
        cache_bytes: int = 0,
        on_bad: OnBad = "stop",
        features: FeatureStore | None = None,
    ) -> None:
        assert len(samples), "a source is never empty"
        assert not (group or pack) or len(lengths) == len(samples), "grouping and packing need a length for each sample"
        self._maker = _WindowMaker(
            samples, processor, pack=pack, placement=placement, seed=seed, cache_bytes=cache_bytes, on_bad=on_bad, features=features
        )
        self._size = batch_size * accumulation
        self._parts = world * math.ceil(self._size / (world * batch_size))
        self._seed, self._group, self._lengths, self._workers = seed, group, lengths, workers
        self._pack, self._rank, self._world = pack, rank, world
        self._image_cost = processor.tiling.grid(1, 1).view_tokens * (1 + bool(processor.tiling.canvases)) * BYTES_OF_A_TOKEN
        self._count = len(samples)
        self._next = 0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self._count / self._size)

    def state(self) -> dict[str, int]:
        return {"window": self._next}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on after the windows that ``state`` counts; takes effect for the next ``iter``."""
        self._next = state["window"]

    def __iter__(self) -> Iterator[Window]:
        for made in self._made():
            if isinstance(made, LlavaError):
                raise made
            self._next = made.step + 1
            yield made

    def _made(self) -> Iterator[Window | LlavaError]:
        if not self._workers:
            yield from map(self._maker.__getitem__, self._plan(self._next))
            return
        from torch.utils.data import DataLoader

        loader: DataLoader[Window | LlavaError] = DataLoader(
            self._maker,  # type: ignore[arg-type]  # map-style: __getitem__ takes what the sampler gives
            sampler=_Plan(self, self._next),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self._workers,
            collate_fn=_as_is,  # type: ignore[arg-type]  # without a batch_size it gets one item
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # its own, so that the run's random stream is not touched
        )
        try:
            yield from loader
        except RuntimeError as error:  # what torch raises when a worker process is gone (T8)
            raise TrainingError(
                f"a loader process died: {error}", code="worker_died", remedy="often memory: lower workers or cache_mb, then resume"
            ) from error

    def _plan(self, start: int) -> Iterator[_Order]:
        """The orders for windows from ``start`` on, through all epochs."""
        per_epoch = self.steps_per_epoch
        for epoch in range(start // per_epoch, 2**31):
            windows = epoch_windows(self._count, size=self._size, seed=self._seed, epoch=epoch, lengths=self._lengths, group=self._group)
            done = 0
            for number, indices in enumerate(windows):
                done += len(indices)
                step = epoch * per_epoch + number
                if step >= start:
                    yield _Order(step, epoch + done / self._count, self._mine(indices))

    def _mine(self, indices: Sequence[int]) -> list[list[int]]:
        """This rank's batches of a window."""
        costs = {i: self._lengths[i][1] + self._image_cost * self._lengths[i][0] if self._lengths else 0 for i in indices}
        return deal(indices, costs, self._parts, alike=not self._pack)[self._rank :: self._world]


@dataclass(frozen=True)
class _Order:
    step: int
    epoch: float
    parts: list[list[int]]


class _Plan:
    """``Loader._plan`` as something that can be iterated again."""

    def __init__(self, loader: Loader, start: int) -> None:
        self._loader, self._start = loader, start

    def __iter__(self) -> Iterator[_Order]:
        return self._loader._plan(self._start)


@dataclass(frozen=True)
class _Example:
    id: str
    inputs: Inputs
    cut: bool


class _WindowMaker:
    """Orders to windows; lives in the training process or in each worker. Errors are returned, so that they cross processes whole.

    The processor refuses long conversations, because a prompt must not lose its end; training cuts them, as LLaVA does (spec 3.6).
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        processor: Processor,
        *,
        pack: bool,
        placement: Placement,
        seed: int,
        cache_bytes: int,
        on_bad: OnBad,
        features: FeatureStore | None,
    ) -> None:
        self._samples, self._processor, self._longest = samples, copy(processor), processor.max_length
        self._processor.max_length = sys.maxsize
        self._pack, self._on_bad, self._placement, self._seed = pack, on_bad, placement, seed
        self._room = cache_bytes
        self._known = None if features is None else features.get
        self._cache: dict[int, _Example] = {}

    def __getitem__(self, order: _Order) -> Window | LlavaError:
        replaced: list[str] = []
        try:
            parts = [[self._usable(index, replaced) for index in part] for part in order.parts]
        except LlavaError as error:
            return error
        examples = [example for part in parts for example in part]
        batches = tuple(self._batch([example.inputs for example in part]) for part in parts)
        return Window(
            step=order.step,
            epoch=order.epoch,
            batches=batches,
            ids=tuple(tuple(example.id for example in part) for part in parts),
            tokens=sum(len(example.inputs.input_ids) for example in examples),
            learned=sum(map(learned_tokens, batches)),
            cut=sum(example.cut for example in examples),
            silent=sum(not bool((example.inputs.labels[1:] != IGNORED).any()) for example in examples),
            replaced=tuple(replaced),
        )

    def _batch(self, inputs: list[Inputs]) -> Batch:
        if not inputs:
            nothing = torch.zeros(1, dtype=torch.long)
            side = self._processor.preprocess.size
            inputs = [Inputs(nothing, torch.full_like(nothing, IGNORED), torch.zeros(0, 3, side, side), ())]
        return self._processor.pack(inputs) if self._pack else self._processor.collate(inputs, side="right")

    def _usable(self, index: int, replaced: list[str]) -> _Example:
        """The sample, or with on_bad="skip" the next one that can be used: always the same for the same files (D2)."""
        for offset in range(MOST_REPLACED if self._on_bad == "skip" else 1):
            place = (index + offset) % len(self._samples)
            cached = self._cache.get(place)
            if cached is not None:
                return cached
            sample = self._samples[place]
            try:
                talk = placed(sample.conversation, self._placement, seed=self._seed, sample_id=sample.id)
                return self._remembered(place, self._cut(sample.id, self._processor.encode(talk, learn=True, known=self._known)))
            except LlavaError as error:
                failure = DataError(
                    error.what,
                    code=error.code,
                    where=f"{sample.where} (id {sample.id}) {error.where}".rstrip(),
                    remedy=error.remedy or "repair the sample, or on_bad_sample=skip",
                )
                replaced.append(str(failure))
        raise failure

    def _cut(self, sample_id: str, inputs: Inputs) -> _Example:
        """The first ``max_length`` tokens. Raises ContextError where that would cut a picture."""
        if len(inputs.input_ids) <= self._longest:
            return _Example(sample_id, inputs, cut=False)
        ids, labels = inputs.input_ids[: self._longest], inputs.labels[: self._longest]
        pictured = sum(grid.tokens for grid in inputs.grids)
        if int((ids == self._processor.image_token_id).sum()) < pictured:
            raise ContextError(
                f"its pictures take {pictured} tokens and do not end within {self._longest}",
                code="context_length_exceeded",
                remedy="raise max_length, or on_bad_sample=skip",
            )
        return _Example(sample_id, replace(inputs, input_ids=ids, labels=labels), cut=True)

    def _remembered(self, place: int, example: _Example) -> _Example:
        inputs = example.inputs
        held = (inputs.views, inputs.input_ids, inputs.labels, inputs.features)
        size = sum(tensor.nbytes for tensor in held if tensor is not None)
        if size <= self._room and all(picture.known for picture in inputs.kept):
            self._room -= size
            self._cache[place] = example
        return example


def _as_is(window: Window | LlavaError) -> Window | LlavaError:
    return window


def _quiet_worker(_: int) -> None:
    """Ctrl-C, and what a scheduler sends before it takes the machine, reach the whole group; only the training process answers (T2).

    A worker that ignores SIGTERM still ends: when told to, when killed, and seconds after its parent is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
