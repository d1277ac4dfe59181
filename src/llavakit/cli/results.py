"""``llava eval report``: runs beside what was published, and for the Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from llavakit.cli import options, terminal

if TYPE_CHECKING:
    from llavakit.eval.report import Result, Rows

EXAMPLES = """Examples:

  llava eval report runs/textvqa                              (against everything published under its protocol)
  llava eval report runs/*-7b --against 1.5-7B --markdown     (side by side)
  llava eval report runs/llava-bench --table in-the-wild      (as a row of a published table)
  llava eval report runs/* --hub runs/finetune                (.eval_results/*.yaml for the model's repository)
"""
WORDS = ("protocol", "metric", "model", "verdict")  # columns of words; numbers stand to the right


def results(
    runs: Annotated[list[Path], Argument(metavar="RUN...", show_default=False, help="Folders that llava eval wrote.")],
    against: Annotated[
        list[str] | None, Option("--against", metavar="MODEL", help="Only these published models (may be repeated).")
    ] = None,
    table: Annotated[str | None, Option("--table", metavar="NAME", help="Show this published table with the runs as rows.")] = None,
    markdown: Annotated[bool, Option("--markdown", help="Print Markdown.")] = False,
    as_json: options.Json = False,
    hub: Annotated[
        Path | None, Option("--hub", metavar="FOLDER", help="Write the Hub's evaluation files into this model's folder.")
    ] = None,
    source: Annotated[str | None, Option("--source", metavar="URL", help="Where the runs can be seen, for the Hub.")] = None,
) -> None:
    """Put runs beside the published numbers: within, above, below, or not comparable and why."""
    from llavakit.eval import hub as exporter
    from llavakit.eval.benchmarks import ALL
    from llavakit.eval.report import read_result

    opened = [read_result(folder) for folder in runs]
    if as_json:
        _as_json(opened, against or ())
    else:
        _show(opened, against or (), table, plain=markdown)
    if hub is not None:
        for path in exporter.export(opened, hub, source=source, titles={benchmark.name: benchmark.title for benchmark in ALL}):
            print(path, file=sys.stderr)


def _as_json(runs: list[Result], against: list[str] | tuple[str, ...]) -> None:
    from llavakit.eval.benchmarks import ALL
    from llavakit.eval.report import compare, protocol_of, record

    print(json.dumps([record(run, compare(run, protocol_of(run, ALL), against=against)) for run in runs]))


def _show(runs: list[Result], against: list[str] | tuple[str, ...], name: str | None, *, plain: bool) -> None:
    from llavakit.eval.benchmarks import ALL
    from llavakit.eval.published import table
    from llavakit.eval.report import beside, compare, departures, detailed, heading, protocol_of, side_by_side

    if name is not None or len(runs) > 1:
        rows = side_by_side(runs, ALL, against=against) if name is None else beside(table(name), runs, ALL)
        _print("side by side" if name is None else f"{table(name).title} ({table(name).unit})", rows, plain=plain)
        for run in runs:
            if found := departures(run, ALL):
                print(f"* {run.model}, {run.benchmark}: {'; '.join(found)}\n")
    if name is None:
        for run in runs:
            protocol = protocol_of(run, ALL)
            _print(heading(run, protocol), detailed(compare(run, protocol, against=against)), plain=plain)


def _print(title: str, rows: Rows, *, plain: bool) -> None:
    """A table for a terminal; Markdown for everything else, whose lines have no width."""
    from llavakit.eval.report import markdown

    if plain or not sys.stdout.isatty():
        print(f"{title}\n\n{markdown(rows)}\n")
        return
    from rich import box
    from rich.table import Table

    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(rows[0]):
        shown.add_column(name, justify="left" if number == 0 or name in WORDS else "right")
    for row in rows[1:]:
        shown.add_row(*row)
    terminal.out().print(shown)
