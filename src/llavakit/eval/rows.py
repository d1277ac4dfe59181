"""Official files, read and checked: JSON, JSON lines, tables with tabs, parquet. What is wrong is one line with file, place and remedy.

    file --read_...--> Row(values, where) --text(key), whole(key)--> a value of the right type, or DataError

Also here, because every family of benchmarks needs it: the sources of published numbers, and a question with its protocol's suffix.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import DataError, MissingExtraError
from llavakit.eval.benchmark import Published, Question

PAPER = "arXiv 2310.03744"
ZOO = "docs/MODEL_ZOO.md of haotian-liu/LLaVA"
BLOG = "blog LLaVA-NeXT, 2024-01-30"
MAY = "blog LLaVA-NeXT with stronger LLMs, 2024-05-10"
ANEW = "take the official file anew"


@dataclass(frozen=True)
class Row:
    """One record of a file; ``where`` is how messages name its place."""

    values: Mapping[str, Any]
    where: str

    def fail(self, what: str, remedy: str = ANEW) -> DataError:
        return DataError(what, code="bad_record", where=self.where, remedy=remedy)

    def value(self, key: str) -> Any:
        """Raises DataError where the key is missing."""
        if key not in self.values:
            raise self.fail(f"no '{key}'")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self.value(key)
        if not isinstance(value, str):
            raise self.fail(f"'{key}' is {value!r}, no text")
        return value

    def whole(self, key: str) -> int:
        """A whole number, as such or as text."""
        value = number(self.value(key))
        if isinstance(value, str):
            raise self.fail(f"'{key}' is {self.values[key]!r}, no whole number")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value(key)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.fail(f"'{key}' is {value!r}, no list of texts")
        return tuple(value)

    def one_of(self, key: str, *allowed: str) -> str:
        value = self.text(key)
        if value not in allowed:
            raise self.fail(f"'{key}' is {value!r}", f"it is one of {', '.join(allowed)}")
        return value


def number(value: Any) -> int | str:
    """Ids as LLaVA's scripts take them: a whole number where the text is one, else the text."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return int(value) if isinstance(value, str) else str(value)
    except ValueError:
        return str(value)


def find(folder: Path, *names: str) -> Path:
    """The first of these files or folders that is there. Raises DataError ``missing_file`` that names them all."""
    found = seek(folder, *names)
    if found is None:
        remedy = f"put {' or '.join(names)} there"
        raise DataError(f"no {names[0]}", code="missing_file", where=str(folder), remedy=remedy)
    return found


def seek(folder: Path, *names: str) -> Path | None:
    """The first of these files or folders that is there, if any."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", code="bad_json", where=str(path), remedy=ANEW) from error


def read_object(path: Path) -> Row:
    """A file that holds one JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError("no JSON object", code="bad_file", where=str(path), remedy=ANEW)
    return Row(value, str(path))


def read_lines(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are no lines."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: it breaks inside strings that hold U+2028
        if line.strip():
            rows.append(Row(_object(line, f"{path}:{number}"), f"{path}:{number}"))
    return rows


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
                    what = f"{len(cells)} cells under {len(columns)} columns"
                    raise DataError(what, code="bad_record", where=where, remedy=ANEW)
    except OSError as error:
        raise _unreadable(path, error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"no table with tabs: {error}", code="bad_file", where=str(path), remedy=ANEW) from error
    finally:
        csv.field_size_limit(before)
    return columns, rows


def read_parquet(path: Path) -> Iterator[Row]:
    """Row by row. Raises MissingExtraError without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("parquet needs pyarrow", code="missing_extra", remedy="pip install 'llavakit[eval]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for values in batch.to_pylist():
                    yield Row(values, f"{path}[{number}]")
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"not a parquet file: {reason}", code="bad_file", where=str(path), remedy=ANEW) from error


def decoded(row: Row, text: str, key: str = "image") -> bytes:
    """The bytes of a base64 cell. Line breaks inside are allowed, other strange characters are not."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.fail(f"'{key}' is no base64: {error}") from None


def asked(question: str, suffix: str) -> str:
    """The question, and on a line of its own what the protocol adds."""
    return f"{question}\n{suffix}" if suffix else question


def printed(metric: str, source: str, values: Mapping[str, float], *, tolerance: float = 0.5) -> tuple[Published, ...]:
    """What a source prints of one metric, model by model."""
    return tuple(Published(model=model, metric=metric, value=value, tolerance=tolerance, source=source) for model, value in values.items())


def unique(questions: Sequence[Question], where: Path) -> list[Question]:
    """The same questions. Raises DataError for an id that stands twice."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"two questions with the id {question.id!r}", code="bad_record", where=str(where), remedy=ANEW)
        seen.add(question.id)
    return list(questions)


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", code="bad_json", where=where, remedy=ANEW) from error
    if not isinstance(value, dict):
        raise DataError("no JSON object", code="bad_record", where=where, remedy=ANEW)
    return value


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", code="bad_file", where=str(path), remedy=ANEW) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(error.strerror or "cannot be read", code="bad_file", where=str(path), remedy="is this the folder of official files?")
