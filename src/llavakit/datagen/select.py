"""The whole way of the concept filter: a file of captions is read twice, first to count, then to write what is kept.

file -> phrases -> table -> which are kept          (concepts)
file ------------------------> the kept rows -> out, and the table of phrases with their counts before and after
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llavakit.datagen import concepts
from llavakit.datagen.captions import Caption, Captions, expand, instructions, lines_to
from llavakit.datagen.concepts import BATCH, Table, key
from llavakit.datagen.phrases import Choice, Engine, engine
from llavakit.errors import ConfigError, DataError

TOP = 10  # phrases that are named in the result
Work = Literal["finding phrases", "writing"]
Progress = Callable[[Work, int], None]  # what is done now, captions done
Counted = tuple[str, int, int]  # phrase, captions that have it before and after


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What the filter found. ``before`` and ``after`` are the counts of the phrases that are frequent enough, most frequent first."""

    engine: str
    captions: int
    left_out: int
    first_left_out: str
    kept: int
    phrases: int
    dropped: int  # phrases of too few captions
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    top: tuple[Counted, ...]


def select(
    captions: Captions,
    out: Path,
    *,
    choice: Choice = "auto",
    at_least: int = concepts.AT_LEAST,
    at_most: int = concepts.AT_MOST,
    seed: int = 0,
    workers: int = 1,
    records: bool = False,
    table: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Write the balanced part of a file: stage-1 samples, or with ``records`` the rows as they stand. Complete or not at all."""
    as_list = _is_list(out, tsv=records and captions.is_table)
    for path in (out, table):
        _check_place(path, captions.path)
    finder, tell = engine(choice), progress or (lambda work, done: None)
    found = concepts.count(
        (caption.text for caption in captions), choice=finder.choice, workers=workers, progress=lambda done: tell("finding phrases", done)
    )
    if not found.total:
        raise DataError(
            "no caption", code="no_captions", where=str(captions.path), remedy="give rows of caption, tab, address, or JSON records"
        )
    kept = concepts.balance(found, at_least=at_least, at_most=at_most, seed=seed)
    frequent = np.flatnonzero(found.counts >= at_least)
    before, after = found.counts[frequent], found.having(kept)[frequent]
    order = np.argsort(-before, kind="stable")
    frequent, before, after = frequent[order], before[order], after[order]
    names = _Names(found, frequent if table is not None else frequent[:TOP], finder)
    asked, seen = instructions(), 0
    with lines_to(out, as_list=as_list) as write:
        for seen, caption in enumerate(captions, 1):
            if seen > found.total:
                break
            names.look(seen - 1, caption)
            if kept[seen - 1]:
                write(caption.line if records else json.dumps(expand(caption, asked, seed=seed), ensure_ascii=False))
            if not seen % BATCH:
                tell("writing", seen)
        if seen != found.total:
            raise DataError("the file changed while it was read", code="file_changed", where=str(captions.path), remedy="start again")
    named = [(names.of(int(found.keys[i])), int(b), int(a)) for i, b, a in zip(names.wanted, before, after, strict=False)]
    if table is not None:
        _write_table(table, named)
    return Selection(
        engine=finder.name,
        captions=found.total,
        left_out=captions.left_out,
        first_left_out=captions.first,
        kept=int(kept.sum()),
        phrases=len(found.keys),
        dropped=len(found.keys) - len(frequent),
        before=before,
        after=np.sort(after)[::-1],
        top=tuple(named[:TOP]),
    )


class _Names:
    """The texts of phrases, of which the table knows only hashes: found again in the first caption of each."""

    def __init__(self, table: Table, wanted: NDArray[np.int64], finder: Engine) -> None:
        self.wanted = wanted
        self._keys = set(table.keys[wanted].tolist())
        self._shows = np.zeros(table.total, dtype=np.bool_)
        self._shows[table.captions[table.starts[wanted]]] = True
        self._finder, self._waiting, self._texts = finder, list[str](), dict[int, str]()

    def look(self, number: int, caption: Caption) -> None:
        if self._shows[number]:
            self._waiting.append(caption.text)
            if len(self._waiting) == BATCH:
                self._find()

    def of(self, number: int) -> str:
        self._find()
        return self._texts[number]

    def _find(self) -> None:
        waiting, self._waiting = self._waiting, []
        for phrases in self._finder.phrases(waiting):
            for phrase in phrases:
                if (number := key(phrase)) in self._keys:
                    self._texts[number] = phrase


def _is_list(out: Path, *, tsv: bool) -> bool:
    """Whether ``out`` is a JSON list. Its ending must fit what is written."""
    endings = (".tsv", ".txt") if tsv else (".json", ".jsonl")
    if out.suffix.lower() not in endings:
        what = "rows of a TSV" if tsv else "JSON"
        raise ConfigError(f"{what} are written", code="bad_value", where=str(out), remedy=f"let the name end in {' or '.join(endings)}")
    return out.suffix.lower() == ".json"


def _check_place(path: Path | None, source: Path) -> None:
    """Raise before the counting what would fail after it."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError("no such folder", code="bad_value", where=str(path.parent), remedy="make it first")
    if path is not None and path.resolve() == source.resolve():
        raise ConfigError("that is the file to read", code="bad_value", where=str(path), remedy="give the result another name")


def _write_table(path: Path, named: Sequence[Counted]) -> None:
    rows: Iterable[Counted] = sorted(named, key=lambda row: (-row[1], row[0]))
    with lines_to(path, as_list=False) as write:
        write("phrase\tbefore\tafter")
        for phrase, before, after in rows:
            write(f"{phrase}\t{before}\t{after}")
