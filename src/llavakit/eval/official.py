"""Official files: found, read, and complained about with file, place and what to do.

    FILE.jsonl     one object a line                                                 }
    FILE.json      a list of objects, or an object that has the list under a key     }--> Row --text, whole, one_of--> a checked value
    FILE.tsv       a table with tabs; all cells are text                             }
    FILE.parquet   rows; pictures in them are unpacked once, into ``unpacked/`` beside the file (they would not fit in memory)

Raised is always DataError: ``missing_file`` names the folder, ``bad_file`` the file, ``bad_json`` and ``bad_record`` the place in it,
``bad_benchmark`` what does not fit together.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.eval.files import replaced
from llavakit.types import Image

ANEW = "take the file anew"
UNPACKED = "unpacked"
_ENDINGS = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"))


class Row(Mapping[str, Any]):
    """One object of a file, which knows where it stands and what its cells must be."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = values, where

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def fail(self, what: str, remedy: str = ANEW) -> DataError:
        return bad(what, self.where, remedy, code="bad_record")

    def text(self, *keys: str) -> str:
        """The first of these keys that is there; a string."""
        return str(self._typed(keys, (str,), "text"))

    def id(self, *keys: str) -> str | int:
        """The first of these keys that is there; a string or a whole number."""
        found: str | int = self._typed(keys, (str, int), "a text or a number")
        return found

    def whole(self, key: str) -> int:
        """A whole number, as such or as text."""
        value = number(self.id(key))
        if isinstance(value, str):
            raise self.fail(f"{key} is {value!r}, no whole number")
        return value

    def list(self, *keys: str) -> Sequence[Any]:
        """The first of these keys that is there; a list."""
        found: Sequence[Any] = self._typed(keys, (list, tuple), "a list")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self.list(key)
        if not all(isinstance(item, str) for item in value):
            raise self.fail(f"{key} is {value!r}, no list of texts")
        return tuple(value)

    def one_of(self, key: str, *allowed: str) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.fail(f"{key} is {value!r}", f"it is one of {', '.join(allowed)}")
        return value

    def _typed(self, keys: Sequence[str], kinds: tuple[type, ...], what: str) -> Any:
        key = next((key for key in keys if key in self._values), None)
        if key is None:
            raise self.fail(f"no {' or '.join(keys)}", f"it has {', '.join(self._values) or 'nothing'}: is this the right file?")
        if not isinstance(self._values[key], kinds) or isinstance(self._values[key], bool):
            raise self.fail(f"{key} is not {what}")
        return self._values[key]


def number(value: Any) -> int | str:
    """Ids as LLaVA's scripts take them: a whole number where the text is one, else the text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value) if isinstance(value, str) else str(value)
    except ValueError:
        return str(value)


def bad(what: str, where: str | Path, remedy: str = ANEW, *, code: str = "bad_benchmark") -> DataError:
    return DataError(what, code=code, where=str(where), remedy=remedy)


# --- finding --------------------------------------------------------------------------------------------------------------------------


def find(folder: Path, *names: str, remedy: str = "put the official file there, or give the folder that has it") -> Path:
    """The first of these files that is there."""
    found = there(folder, *names)
    if found is None:
        listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
        raise bad(f"no {listed}", folder, remedy, code="missing_file")
    return found


def there(folder: Path, *names: str) -> Path | None:
    """As ``find``, but None where there is none."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def pictures(folder: Path, *names: str) -> Path:
    """The first of these folders that is there; the first of all where none is: asking says what is missing."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def parquets(folder: Path, split: str, *, instead: str) -> list[Path]:
    """``test-00000-of-00001.parquet`` and its like, in the folder or below. ``instead``: what else would do."""
    found = sorted(folder.rglob(f"{split}-*.parquet")) or sorted(folder.glob(f"{split}.parquet"))
    if not found:
        remedy = "put the official files there, or the Hub's parquet files"
        raise bad(f"no {instead} and no {split}-*.parquet", folder, remedy, code="missing_file")
    return found


# --- reading --------------------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, under: str | None = None, *, lines: bool = False) -> Iterator[Row]:
    """The objects of a file, one by one; ``under``: the key of the list in a JSON object; ``lines``: one a line, under any name."""
    for where, value in _values(path, under, lines):
        yield as_row(value, where)


def as_row(value: Any, where: str) -> Row:
    """A value that must be an object."""
    if not isinstance(value, Mapping):
        raise bad("not an object", where, code="bad_record")
    return Row(value, where)


def read_object(path: Path) -> Row:
    """A file that holds one JSON object."""
    value = read_json(path)
    if not isinstance(value, Mapping):
        raise bad("not an object", path, code="bad_file")
    return Row(value, str(path))


def read_json(path: Path) -> Any:
    """A whole JSON file."""
    return _json(read_text(path), path, None)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise bad("no such file", path, "check the path", code="bad_file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise bad(f"cannot be read: {error}", path, code="bad_file") from error


def read_table(path: Path) -> tuple[tuple[str, ...], list[Row]]:
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
                    raise bad(f"{len(cells)} cells under {len(columns)} columns", where, code="bad_record")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise bad(f"no table with tabs: {error}", path, code="bad_file") from error
    finally:
        csv.field_size_limit(before)
    return columns, rows


def decoded(row: Row, text: str, key: str = "image") -> bytes:
    """The bytes of a base64 cell. Line breaks inside are allowed, other strange characters are not."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.fail(f"{key} is no base64: {error}") from None


def picture(row: Row, key: str, path: Path) -> Image:
    """A picture of a parquet row ({"bytes", "path"}), as a file of its own; in memory where the folder cannot be written to."""
    cell = row.get(key)
    data = cell.get("bytes") if isinstance(cell, Mapping) else None
    if not isinstance(data, bytes):
        raise row.fail(f"no picture in {key}")
    ending = next((ending for magic, ending in _ENDINGS if data.startswith(magic)), ".bin")
    place = path.parent / UNPACKED / f"{hashlib.sha256(data).hexdigest()[:24]}{ending}"
    try:
        return Image(place if place.is_file() else replaced(place, data, sync=False))
    except OSError:
        return Image(data)


def _values(path: Path, under: str | None, by_line: bool) -> Iterator[tuple[str, Any]]:
    """Each value with its place."""
    if path.suffix == ".parquet":
        from llavakit.data.parquet import Rows

        yield from ((f"{path} [{number}]", values) for number, values in Rows(path))
    elif path.suffix == ".jsonl" or by_line:
        lines = enumerate(read_text(path).split("\n"), 1)  # not splitlines: it breaks inside strings that hold U+2028
        yield from ((f"{path}:{number}", _json(line, path, number)) for number, line in lines if line.strip())
    else:
        found = read_json(path)
        listed = found if under is None else found.get(under) if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise bad("not a list" if under is None else f"no list {under!r}", path, code="bad_file")
        yield from ((f"{path} {under or ''}[{number}]", value) for number, value in enumerate(listed))


def _json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise bad(f"not JSON: {error.msg} (column {error.colno})", f"{path}:{line or error.lineno}", code="bad_json") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in brackets
        raise bad(f"not JSON: {error}", path if line is None else f"{path}:{line}", code="bad_json") from error
