"""Which reader a training file has, by what it begins with: JSON and JSONL, plain or gzipped, or parquet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from llavakit.data.reading import Progress, Records


class Reader(Protocol):
    """Iterate once for ``(number, record)``; ``fingerprint`` is complete afterwards."""

    is_list: bool

    @property
    def fingerprint(self) -> str: ...

    def place(self, number: int) -> str: ...

    def __iter__(self) -> Iterator[tuple[int, Any]]: ...


def records(path: Path, *, tolerant: bool = False, progress: Progress | None = None) -> Reader:
    """The records of a file, one at a time, as they are written."""
    return Records(path, tolerant=tolerant, progress=progress)
