"""The first steps of a run as a trial, in a folder of its own that is removed: what can fail late fails here, and the steps are timed.

    begin (from where the run begins or goes on) -> look -> steps -> save -> verify -> forget it all -> begin from what was saved -> a step

It is the run's own code (``loop``); only its options for saving and watching differ, which change nothing that a step computes.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from llavakit.config import TrainConfig
from llavakit.train import going_on, loop, start, state
from llavakit.train.loop import Running
from llavakit.train.progress import Mute, StepReport
from llavakit.train.ranks import Ranks, watched
from llavakit.train.saving import SaveModel
from llavakit.train.signals import Signals
from llavakit.train.watch import Watch

FOLDER = ".preflight"
STEPS = 4  # at least, where the run has them; the first is not timed
PATIENCE, MOST = 8, 40  # seconds, steps: where steps are quick, so many more, because few measure badly
NEVER = 1 << 60  # a step that no run reaches

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What a few steps of the run showed. ``peak`` are bytes on a CUDA device, None elsewhere."""

    begins: int  # steps that are behind the run
    total: int  # steps of the run
    steps: int  # that were tried
    seconds: float  # of a step, the first left out
    tokens: float  # of those steps
    checkpoint: int  # bytes
    free: int
    begin: float  # seconds of loading and making everything ready
    save: float
    resume: float  # seconds of the same from the checkpoint
    peak: int | None

    @property
    def left(self) -> int:
        """Steps before the run."""
        return self.total - self.begins


def rehearse(
    config: TrainConfig, ranks: Ranks, signals: Signals, resumed: Path | None, *, look: Callable[[Running], T], save_model: SaveModel
) -> tuple[T, Rehearsal] | None:
    """Try the run, and ``look`` at it once it is ready; None where it has no step left.

    Raises what the run would raise, and KeyboardInterrupt when it was stopped by a signal.
    """
    folder = config.out / FOLDER
    tried = replace(config, out=folder, resume="auto", keep=0, save_every=NEVER, eval_every=0, track="none")
    where = start.device(config, ranks.local)
    if ranks.main:
        remove(config)
        going_on.make_folder(folder)
    ranks.sums([0])  # the folder is there
    try:
        with watched(ranks, config.out, config.timeout) as alive:
            trial = _Trial(tried, ranks, signals, save_model, alive, where)
            found = trial.forwards(resumed, look)
            if found is None:
                return None
            looked, told, saved = found
            gc.collect()  # one model at a time
            if where.type == "cuda":
                torch.cuda.empty_cache()
            told = replace(told, resume=trial.back(saved))
            ranks.sums([0])  # all are done with the folder
        return looked, told
    finally:
        if ranks.main:
            remove(config)


@dataclass(frozen=True)
class _Trial:
    config: TrainConfig
    ranks: Ranks
    signals: Signals
    save_model: SaveModel
    alive: Callable[[], None]
    where: torch.device

    def forwards(self, resumed: Path | None, look: Callable[[Running], T]) -> tuple[T, Rehearsal, Path] | None:
        """From the beginning to a checkpoint that verifies. What it built is gone when it returns."""
        if self.where.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.where)
        run, ready = self._begun(resumed)
        begins, total = run.step, run.steps
        if begins >= total:
            return None
        looked, reports = look(run), list[StepReport]()
        self._take(run, min(STEPS, total - begins), reports)
        slowest = self.ranks.of_main(max(report.step_time for report in reports[1:] or reports))
        more = min(MOST, total - run.step, int(PATIENCE / slowest))
        if more > 0:
            self._take(run, more, reports)
        peak = torch.cuda.max_memory_allocated(self.where) if self.where.type == "cuda" else None
        began = time.perf_counter()
        loop.save_now(run, must=True)
        spent = time.perf_counter() - began
        assert run.saved is not None
        state.verify(run.saved)
        timed = reports[1:] or reports
        told = Rehearsal(
            begins=begins, total=total, steps=len(reports), seconds=sum(report.step_time for report in timed) / len(timed),
            tokens=sum(report.tokens for report in timed) / len(timed), free=start.room(self.config.out), begin=ready, save=spent,
            checkpoint=sum(path.stat().st_size for path in run.saved.rglob("*") if path.is_file()), resume=0.0, peak=peak,
        )  # fmt: skip
        return looked, told, run.saved

    def back(self, saved: Path) -> float:
        """Seconds of making everything ready from a checkpoint, after which a step can be taken."""
        run, ready = self._begun(saved)
        assert run.step == state.step_of(saved), "the resumed run found its place"
        self._take(run, 1, [])
        return ready

    def _begun(self, resumed: Path | None) -> tuple[Running, float]:
        began = time.perf_counter()
        run = loop.begin(self.config, self.ranks, resumed, lambda text: None, self.save_model)
        run.shown, run.watch = Mute(), Watch(groups={}, panel=())
        return run, time.perf_counter() - began

    def _take(self, run: Running, steps: int, reports: list[StepReport]) -> None:
        run.steps = run.step + steps
        loop.take_steps(run, self.signals, None, reports.append, self.alive)
        if self.signals.received is not None:
            raise KeyboardInterrupt


def remove(config: TrainConfig) -> None:
    """What a rehearsal, perhaps a killed one, left."""
    shutil.rmtree(config.out / FOLDER, ignore_errors=True)
