"""Parquet, as HF datasets write it: a column of ``messages`` or LLaVA's ``conversations``, pictures as ``{"bytes", "path"}``.

An extra: pyarrow is imported when a parquet file is met. What no column has a place for (further keys, ids that are no text) travels as
JSON in the column ``llavakit_extra``, so that the way there and back is without loss.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavakit.data.messages import normal, pictures
from llavakit.data.reading import CHUNK, Progress
from llavakit.errors import DataError, MissingExtraError

ROWS = 64  # rows that are held at once: with their pictures
_EXTRA = "llavakit_extra"
_COLUMNS = ("id", "messages", "images", _EXTRA)


class Rows:
    """Iterate once for ``(number, record)``; ``fingerprint`` is the SHA-256 of the file."""

    is_list = True

    def __init__(self, path: Path, *, progress: Progress | None = None) -> None:
        self._path, self._progress = path, progress
        self.fingerprint = ""
        self._arrow, self._parquet = _arrow()

    def place(self, number: int) -> str:
        return f"[{number}]"

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            with self._parquet.ParquetFile(self._path) as file:
                total = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=ROWS):
                    for row in batch.to_pylist():
                        yield number, _record(row)
                        number += 1
                    if self._progress is not None:
                        self._progress(number, total)
            self.fingerprint = _sha256(self._path)
        except (OSError, self._arrow.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"not a parquet file: {reason}", code="bad_file", where=str(self._path), remedy="write it again") from error


class Writer:
    """Records to one parquet file, as messages with their pictures inside. Close it, or use it in ``with``."""

    def __init__(self, path: Path, *, image_root: Path) -> None:
        arrow, parquet = _arrow()
        cell = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
        part = arrow.struct([("type", arrow.string()), ("text", arrow.string())])
        message = arrow.struct([("role", arrow.string()), ("content", arrow.list_(part))])
        kinds = (arrow.string(), arrow.list_(message), arrow.list_(cell), arrow.string())
        self._schema = arrow.schema(list(zip(_COLUMNS, kinds, strict=True)))
        self._root, self._rows, self._arrow = image_root, list[dict[str, Any]](), arrow
        self._file = parquet.ParquetWriter(path, self._schema)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """A record of messages. Raises DataError ``image_missing`` for a picture that cannot be read."""
        self._rows.append(_row(normal(record), self._root))
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("parquet needs pyarrow", code="missing_extra", remedy="pip install 'llavakit[data]'") from error
    return pyarrow, pyarrow.parquet


def _row(record: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A record in normal form as a row of the four columns."""
    told = record["messages"]
    rest = {key: value for key, value in record.items() if key not in ("messages", "image", "images")}
    turns = [{key: value for key, value in message.items() if key not in ("role", "content")} for message in told]
    plain_id = isinstance(record.get("id"), str)
    if plain_id:
        del rest["id"]
    extra: dict[str, Any] = {"record": rest} if rest else {}
    extra |= {"messages": turns} if any(turns) else {}
    extra |= {key: None if record[key] is None else len(pictures(record)) for key in ("image", "images") if key in record}
    return {
        "id": record["id"] if plain_id else None,
        "messages": [{"role": message["role"], "content": message["content"]} for message in told],
        "images": [_cell(name, root) for name in pictures(record)],
        _EXTRA: json.dumps(extra) if extra else None,
    }


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as a record. Rows of other writers are records already, but for the nulls of their columns."""
    made = {key: value for key, value in row.items() if value is not None and key != _EXTRA and (key, value) != ("images", [])}
    for message in made.get("messages", ()) if isinstance(made.get("messages"), list) else ():
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message["content"] = [_without_nulls(part) for part in message["content"]]
    if row.get(_EXTRA) is None:
        return made
    extra: dict[str, Any] = json.loads(row[_EXTRA])
    cells = made.pop("images", [])
    held = {key: None if extra[key] is None else cells if key == "images" else cells[0] for key in ("image", "images") if key in extra}
    turns = [message | more for message, more in zip(made["messages"], extra.get("messages", [{}] * len(made["messages"])), strict=True)]
    rest: dict[str, Any] = extra.get("record", {})
    return rest | made | held | {"messages": turns}


def _without_nulls(part: Any) -> Any:
    return {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part


def _cell(name: Any, root: Path) -> dict[str, Any]:
    if not isinstance(name, str):
        return {"bytes": name.get("bytes"), "path": name.get("path")}
    if name.startswith("data:"):
        return {"bytes": None, "path": name}
    try:
        return {"bytes": (root / name).read_bytes(), "path": name}
    except OSError as error:
        raise DataError(f"no image file {name}", code="image_missing", where=str(root), remedy="give the pictures' folder") from error


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            found.update(piece)
    return found.hexdigest()
