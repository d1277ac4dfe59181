"""Which reader a training file has, by what it begins with: JSON and JSONL, plain or gzipped, or parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from llavakit.data.reading import Broken, Progress, Records


class Reader(Protocol):
    """Iterate once for ``(number, record)``; ``fingerprint`` is complete afterwards."""

    is_list: bool

    @property
    def fingerprint(self) -> str: ...

    def place(self, number: int) -> str: ...

    def __iter__(self) -> Iterator[tuple[int, Any]]: ...


def records(path: Path, *, tolerant: bool = False, broken: Broken | None = None, progress: Progress | None = None) -> Reader:
    """The records of a file, one at a time, as they are written. Raises DataError, and MissingExtraError for parquet without pyarrow."""
    if begins_with(path, b"PAR1"):
        from llavakit.data.parquet import Rows

        return Rows(path, progress=progress)
    return Records(path, tolerant=tolerant, broken=broken, progress=progress)


def begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        return False
