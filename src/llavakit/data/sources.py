"""Training files to samples, checked before a step is spent. What a record must be stands in ``rules``, how it is kept in ``index``.

    file --(once)--> index --> Source: the usable samples, each built when it is asked for

A ``Source`` is a view of an index: a slice of one, or what is left of it when pictures are missing, holds numbers and no records. It goes
to worker processes as a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from llavakit.data.index import Index, open_index
from llavakit.data.present import elsewhere, missing
from llavakit.data.reading import Progress
from llavakit.data.rules import SHOWN, Report
from llavakit.errors import DataError
from llavakit.types import Conversation

__all__ = ["Lengths", "OnBad", "Report", "Sample", "Source", "read_llava"]

OnBad = Literal["stop", "skip"]
Numbers = range | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One closed conversation. ``where`` is file and line (or position), for messages; ``source`` its name in a mixture."""

    id: str
    conversation: Conversation
    where: str
    source: str = ""


class Lengths(Sequence[tuple[bool, int]]):
    """For each sample: does it hold an image, and its length as bytes of text (only used to sort: spec 4.3). Two arrays, no objects."""

    def __init__(self, pictured: npt.NDArray[np.bool_], sizes: npt.NDArray[np.int64]) -> None:
        self.pictured, self.sizes = pictured, sizes

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> tuple[bool, int]: ...
    @overload
    def __getitem__(self, index: slice) -> Lengths: ...
    def __getitem__(self, index: int | slice) -> tuple[bool, int] | Lengths:
        if isinstance(index, slice):
            return Lengths(self.pictured[index], self.sizes[index])
        return bool(self.pictured[index]), int(self.sizes[index])


@dataclass(frozen=True, eq=False)
class Source(Sequence[Sample]):
    """The usable samples of one file. ``fingerprint`` is the SHA-256 of its content: it changes when the file does (D12)."""

    held: Index
    numbers: Numbers  # which of its records these are
    name: str
    image_root: Path
    report: Report

    @property
    def fingerprint(self) -> str:
        return self.held.fingerprint

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Source: ...
    def __getitem__(self, index: int | slice) -> Sample | Source:
        if isinstance(index, slice):
            return replace(self, numbers=self.numbers[index])
        number = int(self.numbers[index])
        sample_id, conversation = self.held.sample(number, self.image_root)
        return Sample(sample_id, conversation, f"{self.name}:{self.held.place(number)}")

    def take(self, chosen: Sequence[int] | npt.NDArray[np.int64]) -> Source:
        """The samples of these positions, in this order."""
        return replace(self, numbers=np.asarray(self.numbers, np.int64)[np.asarray(chosen, np.int64)])

    def lengths(self) -> Lengths:
        chosen: Any = self.numbers
        if isinstance(chosen, range):
            chosen = slice(chosen.start, chosen.stop, chosen.step) if chosen.step > 0 else np.asarray(chosen, np.int64)
        return Lengths(np.diff(self.held.image_starts)[chosen] > 0, self.held.sizes[chosen])


def read_llava(
    path: Path,
    *,
    image_root: Path | None = None,
    on_bad: OnBad = "stop",
    allow_outside: bool = False,
    check_images: bool = True,
    progress: Progress | None = None,
) -> Source:
    """Open a training file: LLaVA's JSON list or JSONL, ``messages``, plain or gzipped, or parquet. ``image_root`` defaults to its folder.

    Raises DataError: ``bad_file`` (unreadable), ``bad_json`` (with line and column), ``no_samples``, or the first fault's code;
    for missing images the message counts all of them.
    """
    root = image_root if image_root is not None else path.parent
    index = open_index(path, allow_outside=allow_outside, progress=progress)
    if on_bad == "stop" and index.fault is not None:
        raise _first(index)
    source = Source(index, range(len(index)), path.name, root, index.report())
    if check_images:
        source = _with_pictures(source, path, on_bad)
    if not source:
        remedy = "; ".join(source.report.lines()) or "the file is empty"
        raise DataError("no usable sample", code="no_samples", where=str(path), remedy=remedy)
    return source


def _first(index: Index) -> DataError:
    """The first fault, and how many there are."""
    assert index.fault is not None
    first, count = index.fault.error(), index.report().faults.total()
    if count == 1:
        return first
    others = f"{first.remedy}; {count - 1} more samples cannot be used: llava data check lists them"
    return DataError(first.what, code=first.code, where=first.where, remedy=others)


def _with_pictures(source: Source, path: Path, on_bad: OnBad) -> Source:
    """The samples whose pictures are there. Raises DataError ``image_missing`` unless they may be left out."""
    index = source.held
    names = index.names()
    absent = missing(names, source.image_root)
    if not absent:
        return source
    lost = np.flatnonzero(np.fromiter((name in absent for name in names), bool, len(names)))
    rows = np.flatnonzero(np.isin(index.image_ids, lost))
    bad = np.unique(np.searchsorted(index.image_starts, rows, "right") - 1)
    shown = []
    for number in map(int, bad[:SHOWN]):
        ids = index.image_ids[index.image_starts[number] : index.image_starts[number + 1]]
        shown.append((index.sample(number, source.image_root)[0], index.place(number), next(names[i] for i in ids if names[i] in absent)))
    if on_bad == "stop":
        found = elsewhere(shown[0][2], source.image_root)
        mend = f"set images={found}" if found else "correct the names, or set images=<folder>"
        told = "; ".join(f"{path.name}:{place} {name}" for _, place, name in shown) + ("; ..." if len(bad) > SHOWN else "")
        raise DataError(
            f"{len(bad)} samples name images that are not under {source.image_root}: {told}",
            code="image_missing",
            where=str(path),
            remedy=f"{mend}, or leave them out with on_bad_sample=skip",
        )
    source.report.faults["image_missing"] += len(bad)
    source.report.places["image_missing"] = [
        f"{path.name}:{place} (id {sample_id}): no image file {name}" for sample_id, place, name in shown
    ]
    return replace(source, numbers=np.delete(np.arange(len(index)), bad))
