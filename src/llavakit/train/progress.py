"""What a run shows and leaves behind: metrics.jsonl (every step), a bar on a terminal or plain lines in a pipe, and loss.png.

Nothing here may stop a run: a log folder that vanished costs the log, not the training (hardening T9).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

METRICS, EVALUATIONS, PANEL = "metrics.jsonl", "evaluations.jsonl", "panel.json"
SMOOTHED = 0.98  # weight of the past in the plotted running mean


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One line of metrics.jsonl. ``loss`` is the mean over learned tokens, ``step_time`` in seconds, the rest counts or rates.

    ``loss`` and ``grad_norm`` are None when they are no finite numbers or the step had no learned token: it changed nothing then.
    """

    step: int
    epoch: float
    loss: float | None
    lr: float
    grad_norm: float | None
    tokens: int
    learned: int
    samples: int
    step_time: float
    tokens_per_s: float

    def line(self) -> str:
        loss = "none" if self.loss is None else f"{self.loss:.4f}"
        norm = "none" if self.grad_norm is None else f"{self.grad_norm:.2f}"
        share = self.learned / self.tokens if self.tokens else 0.0
        return (
            f"step {self.step}  epoch {self.epoch:.2f}  loss {loss}  lr {self.lr:.2e}  norm {norm}"
            f"  learned {share:.0%}  {self.tokens_per_s:,.0f} tokens/s"
        )


class LinesFile:
    """Appends JSON lines with a step; opening it at step N first drops every line after N and any torn last line."""

    def __init__(self, folder: Path, *, after: int, name: str = METRICS) -> None:
        self._path = folder / name
        kept = [line for line in read_lines(self._path) if line["step"] <= after] if after else []
        draft = folder / (name + ".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(draft, self._path)

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError:
            return  # the log is lost, the run is not


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without a torn last one."""
    return read_lines(folder / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """Plain lines every ``every`` steps: for pipes, logs and tests."""

    def __init__(self, total: int, *, every: int, stream: TextIO) -> None:
        self._total, self._every, self._stream = total, every, stream

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def step(self, report: StepReport) -> None:
        if report.step % self._every == 0 or report.step in (1, self._total):
            self.say(f"{report.line()}  of {self._total}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        return None


class Mute(Progress):
    """For all ranks but the main one."""

    def __init__(self) -> None:
        super().__init__(1, every=1, stream=sys.stderr)

    def say(self, text: str) -> None:
        return None

    def step(self, report: StepReport) -> None:
        return None


class Bar(Progress):
    """A live bar with the time left, for a terminal."""

    def __init__(self, total: int, *, every: int, stream: TextIO) -> None:
        super().__init__(total, every=every, stream=stream)
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._bar = RichProgress(*columns, console=Console(file=stream))
        self._task = self._bar.add_task("", total=total)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def step(self, report: StepReport) -> None:
        self._bar.update(self._task, completed=report.step, description=report.line().partition("  ")[2])

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()


def progress(total: int, *, every: int, stream: TextIO | None = None) -> Progress:
    """A bar on a terminal, plain lines elsewhere; on stderr unless told."""
    stream = stream if stream is not None else sys.stderr
    return (Bar if stream.isatty() else Progress)(total, every=every, stream=stream)


def plot(folder: Path) -> Path | None:
    """Draw loss and learning rate of metrics.jsonl into loss.png; None without matplotlib (extra ``plots``) or with nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [line for line in read_metrics(folder) if line["loss"] is not None]
    if not lines:
        return None
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="loss of a step")
    axes.plot(steps, _running_mean(losses), color="tab:blue", label="running mean")
    axes.set(xlabel="step", ylabel="loss per learned token", title=folder.name)
    rates = axes.twinx()
    rates.plot(steps, [line["lr"] for line in lines], color="tab:gray", linestyle=":", label="learning rate")
    rates.set_ylabel("learning rate")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(folder / "loss.png")
    return folder / "loss.png"


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential mean that starts as a plain mean, so that the first values are not overweighted."""
    means: list[float] = []
    mean = 0.0
    for count, value in enumerate(values, 1):
        weight = max(1.0 - SMOOTHED, 1.0 / count)
        mean += weight * (value - mean)
        means.append(mean)
    return means
