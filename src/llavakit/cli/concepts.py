"""``llava concepts``: a balanced part of many captions, as the papers chose stage 1's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llavakit.cli import options, terminal
from llavakit.cli.border import harmless

if TYPE_CHECKING:
    from llavakit.datagen.select import Selection

EXAMPLES = """Examples:

  llava concepts Train_GCC-training.tsv --out pretrain.json            (samples for llava train pretrain)
  llava concepts captions.jsonl --out pretrain.json --at-most 50 --plot phrases.png
  llava concepts Train_GCC-training.tsv --out kept.tsv --records       (download the pictures of these)
"""
EVERY = 10.0  # seconds between plain lines


class EngineName(StrEnum):
    auto = "auto"
    spacy = "spacy"
    builtin = "builtin"


def concepts(
    captions: Annotated[Path, Argument(metavar="CAPTIONS", show_default=False, help="TSV (caption, address), JSON or JSONL; also .gz.")],
    out: Annotated[Path, Option("--out", "-o", metavar="FILE", help="Where to write the samples: NAME.json or NAME.jsonl.")],
    at_least: Annotated[int, Option("--at-least", min=1, help="Phrases of fewer captions are dropped.")] = 3,
    at_most: Annotated[int, Option("--at-most", min=1, help="So many captions are taken for a phrase.")] = 100,
    seed: Annotated[int, Option("--seed", help="Which ones, where there are more.")] = 0,
    workers: Annotated[int, Option("--workers", min=1, help="Processes that find phrases.")] = 2,
    engine: Annotated[EngineName, Option("--engine", help="Who finds them; auto: spaCy with an English model, if they are here.")] = (
        EngineName.auto
    ),
    records: Annotated[bool, Option("--records", help="Write the kept rows as they stand, not as samples.")] = False,
    image_name: Annotated[
        str, Option("--image-name", metavar="PATTERN", help="The picture of a TSV's row by its number, counted from 0.")
    ] = "GCC_train_{:09d}.jpg",
    plot: Annotated[Path | None, Option("--plot", metavar="FILE", help="Draw the phrases' counts before and after (.png, .svg).")] = None,
    table: Annotated[Path | None, Option("--table", metavar="FILE", help="Write every phrase with both counts, as TSV.")] = None,
    as_json: options.Json = False,
) -> None:
    """Keep the captions of rare things, thin those of common ones: the filter that made LLaVA's 595K of CC3M."""
    from llavakit.data.formats import records as read_records
    from llavakit.datagen.captions import Captions
    from llavakit.datagen.plot import check_plot
    from llavakit.datagen.plot import plot as draw
    from llavakit.datagen.select import select

    if plot is not None:
        check_plot(plot)
    with _meter() as meter:
        source = Captions(
            captions,
            records=lambda path, progress: read_records(path, progress=progress),
            image_name=image_name,
            progress=meter.read,
        )
        found = select(
            source,
            out,
            choice=engine.value,
            at_least=at_least,
            at_most=at_most,
            seed=seed,
            workers=workers,
            records=records,
            table=table,
            progress=meter.done,
        )
    if plot is not None:
        draw(found, plot, at_most=at_most)
    print(json.dumps(_record(found, out)) if as_json else _words(found, out, at_least, at_most))


def _record(found: Selection, out: Path) -> dict[str, Any]:
    names = ("engine", "captions", "left_out", "kept", "phrases", "dropped")
    top = [dict(zip(("phrase", "before", "after"), row, strict=True)) for row in found.top]
    return {"out": str(out)} | {name: getattr(found, name) for name in names} | {"top": top}


def _words(found: Selection, out: Path, at_least: int, at_most: int) -> str:
    lines = [
        f"phrases by {found.engine}",
        f"  captions  {found.captions:>12,}"
        + (f"  ({found.left_out:,} rows left out, e.g. {found.first_left_out})" * bool(found.left_out)),
        f"  phrases   {found.phrases:>12,}  ({found.dropped:,} in fewer than {at_least} captions)",
        f"  kept      {found.kept:>12,}  captions of {len(found.before):,} phrases, at most {at_most} for each",
        "",
        f"  {'most frequent':<32}{'before':>10}{'after':>10}",
        *(f"  {harmless(phrase)[:31]:<32}{before:>10,}{after:>10,}" for phrase, before, after in found.top),
        "",
        str(out),
    ]
    return "\n".join(lines)


class _Meter:
    """Plain lines for pipes and logs: what, how many, how fast, how long still. Time left comes from the share of bytes read."""

    def __init__(self) -> None:
        self._work, self._began, self._told = "", 0.0, 0.0
        self._read = self._total = 0

    def read(self, read: int, total: int) -> None:
        self._read, self._total = read, total

    def done(self, work: str, captions: int) -> None:
        now = time.monotonic()
        if work != self._work:
            self._work, self._began, self._told = work, now, now
        elif now - self._told >= EVERY:
            self._told = now
            self.say(work, captions, now - self._began)

    def say(self, work: str, captions: int, seconds: float) -> None:
        share = min(self._read / self._total, 1.0) if self._total else 0.0
        left = f", {_clock(seconds * (1 - share) / share)} left" if share else ""
        print(
            f"{work}: {captions:,} captions, {share:.0%}, {captions / max(seconds, 1e-9):,.0f} a second{left}", file=sys.stderr, flush=True
        )


class _Bar(_Meter):
    """The same on one line of a terminal."""

    def __init__(self, update: Any) -> None:
        super().__init__()
        self._update = update

    def done(self, work: str, captions: int) -> None:
        if work != self._work:
            self._work, self._began = work, time.monotonic()
        rate = captions / max(time.monotonic() - self._began, 1e-9)
        self._update(description=f"{work}: {captions:,} captions, {rate:,.0f} a second", completed=self._read, total=self._total or None)


@contextmanager
def _meter() -> Iterator[_Meter]:
    if not sys.stderr.isatty():
        yield _Meter()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.err(), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield _Bar(lambda **words: bar.update(task, **words))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
