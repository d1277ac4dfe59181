"""The published tables as data: ``published.md`` is read, cell by cell.

    published.md --tables()--> Table(name, title, unit, rows) -- rows --> Row(model, protocol, source, cells) --> Cell(value, spread, delta)
                                                                               '--numbers(benchmark, protocol)--> Published of a Protocol

A column is a metric of the table's benchmark, or names its own: ``benchmark`` (its headline), ``benchmark/metric``, and
``benchmark@protocol`` where the number was made under another protocol than its row's. In brackets it is no score of ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from llavakit.errors import ConfigError
from llavakit.eval.benchmark import Protocol, Published

WORDS = ("model", "protocol", "source", "note")
HEADLINE = ""  # the metric of a column that names none
_CELL = re.compile(r"(-?\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?(?: \(([−+]\d+(?:\.\d+)?)\))?")
_TOLERANCE: Mapping[str, float] = {  # of these a repetition moves more than 0.5: one answer weighs much, or somebody judges
    "mme/perception": 15.0,
    "mme/cognition": 10.0,
    "llava-bench": 2.0,
    "llava-bench-coco": 2.0,
    "mm-vet": 1.0,
}


@dataclass(frozen=True)
class Cell:
    """A printed number; ``text`` is how it stands there."""

    text: str
    value: float
    spread: float | None = None
    "Of repetitions, after ±."
    delta: float | None = None
    "The printed difference to the table's best."


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a column holds. ``benchmark`` is None where it is no score of ours."""

    name: str
    benchmark: str | None
    metric: str
    protocol: str | None
    "Only where it differs from the row's."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model's numbers, by column; what was not printed is absent."""

    model: str
    protocol: str | None
    source: str
    cells: Mapping[str, Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One published table."""

    name: str
    title: str
    unit: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def row(self, model: str) -> Row:
        return next(row for row in self.rows if row.model == model)

    def value(self, model: str, column: str) -> float | None:
        cell = self.row(model).cells.get(column)
        return None if cell is None else cell.value


@cache
def tables() -> Mapping[str, Table]:
    """All published tables by name, in the order of the page."""
    page = resources.files("llavakit.eval").joinpath("published.md").read_text("utf-8")
    return {table.name: table for table in map(_table, re.split(r"^## ", page, flags=re.MULTILINE)[1:])}


def table(name: str) -> Table:
    """Raises ConfigError for a name that is not there."""
    if name not in tables():
        remedy = f"the tables are {', '.join(tables())}"
        raise ConfigError(f"no published table {name!r}", code="bad_value", where="--table", remedy=remedy)
    return tables()[name]


def numbers(benchmark: str, protocol: str, *, headline: str) -> tuple[Published, ...]:
    """All that was printed for a benchmark under a protocol. ``headline``: the metric of columns that name the benchmark alone."""
    found = (
        Published(
            model=row.model,
            metric=column.metric or headline,
            value=row.cells[column.name].value,
            tolerance=row.cells[column.name].spread or tolerance(benchmark, column.metric),
            source=row.source,
        )
        for table in tables().values()
        for column in table.columns
        for row in table.rows
        if column.benchmark == benchmark and protocol == (column.protocol or row.protocol) and column.name in row.cells
    )
    return tuple(dict.fromkeys(found))


def with_numbers(benchmark: str, headline: str, *protocols: Protocol) -> tuple[Protocol, ...]:
    """These protocols of a benchmark with what was printed under each."""
    return tuple(one.but(published=numbers(benchmark, one.name, headline=headline)) for one in protocols)


def tolerance(benchmark: str, metric: str = HEADLINE) -> float:
    """Within this a repetition counts as the same: half a point, or what one answer or one judgement more can move."""
    return _TOLERANCE.get(f"{benchmark}/{metric}", _TOLERANCE.get(benchmark, 0.5))


def _table(section: str) -> Table:
    """One section of the page: its name, its list, its table."""
    lines = section.splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("- "))
    header, _, *body = [_split(line) for line in lines if line.startswith("|")]
    columns = tuple(_column(name, about.get("benchmark")) for name in header if name not in WORDS)
    header = [name.strip("()") for name in header]
    return Table(
        name=lines[0].strip(),
        title=about["title"],
        unit=about["unit"],
        columns=columns,
        rows=tuple(_row(dict(zip(header, cells, strict=True)), about["source"]) for cells in body),
    )


def _column(name: str, benchmark: str | None) -> Column:
    if benchmark is not None or name.startswith("("):
        return Column(name=name.strip("()"), benchmark=benchmark, metric=name, protocol=None)
    whole, _, protocol = name.partition("@")
    first, _, metric = whole.partition("/")
    return Column(name=name, benchmark=first, metric=metric, protocol=protocol or None)


def _row(words: Mapping[str, str], source: str) -> Row:
    protocol = words.get("protocol", "–")
    return Row(
        model=words["model"],
        protocol=None if protocol == "–" else protocol,
        source=words.get("source") or source,
        cells=dict(_cells(words)),
    )


def _cells(words: Mapping[str, str]) -> Iterator[tuple[str, Cell]]:
    for name, text in words.items():
        if name not in WORDS and text != "–":
            found = _CELL.fullmatch(text)
            assert found, f"published.md: {text!r} is no number"
            value, spread, delta = found.groups()
            yield name, Cell(text, float(value), _number(spread), _number(delta))


def _number(text: str | None) -> float | None:
    return None if text is None else float(text.replace("−", "-"))


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
