"""What ``official`` reads, with cells that are checked: rows that can say what is wrong with them, and tables with tabs.

    file --lines, entries, table--> Row --whole, texts, one_of--> a value of the right type, or DataError with file and line

``asked`` is a question with what a protocol adds.
"""

from __future__ import annotations

import base64
import binascii
import csv
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.eval import official

ANEW = "take the official file anew"


class Row(official.Row):
    """One object of a file, which knows where it stands and what its cells must be."""

    def fail(self, what: str, remedy: str = ANEW) -> DataError:
        return official.bad(what, self.where, remedy)

    def whole(self, key: str) -> int:
        """A whole number, as such or as text."""
        value = number(self.id(key))
        if isinstance(value, str):
            raise self.fail(f"{key} is {value!r}, no whole number")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.list(key)
        if not all(isinstance(item, str) for item in value):
            raise self.fail(f"{key} is {value!r}, no list of texts")
        return tuple(value)

    def one_of(self, key: str, *allowed: str) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.fail(f"{key} is {value!r}", f"it is one of {', '.join(allowed)}")
        return value


def number(value: Any) -> int | str:
    """Ids as LLaVA's scripts take them: a whole number where the text is one, else the text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value) if isinstance(value, str) else str(value)
    except ValueError:
        return str(value)


def entries(path: Path, under: str | None = None, *, lines: bool = False) -> Iterator[Row]:
    """The objects of a file, as ``official.rows`` gives them; ``lines``: one a line, whatever the file's ending."""
    return (Row(row, row.where) for row in official.rows(path, under, lines=lines))


def whole_object(path: Path) -> Row:
    """A file that holds one JSON object."""
    value = official.content(path)
    if not isinstance(value, Mapping):
        raise official.bad("not an object", path, ANEW)
    return Row(value, str(path))


def table(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """Column names and rows of a table with tabs; cells in quotes may hold tabs and line breaks. All cells are text."""
    before = csv.field_size_limit(sys.maxsize)  # a cell holds a picture; the limit is the whole interpreter's
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            columns = tuple(next(reader, ()))
            rows, line = [], reader.line_num
            for cells in reader:
                where, line = f"{path}:{line + 1}", reader.line_num
                if len(cells) == len(columns):
                    rows.append(Row(dict(zip(columns, cells, strict=True)), where))
                elif cells:
                    raise official.bad(f"{len(cells)} cells under {len(columns)} columns", where, ANEW)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise official.bad(f"no table with tabs: {error}", path, ANEW) from error
    finally:
        csv.field_size_limit(before)
    return columns, rows


def decoded(row: Row, text: str, key: str = "image") -> bytes:
    """The bytes of a base64 cell. Line breaks inside are allowed, other strange characters are not."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.fail(f"{key} is no base64: {error}") from None


def asked(question: str, suffix: str) -> str:
    """The question, and on a line of its own what the protocol adds."""
    return f"{question}\n{suffix}" if suffix else question
