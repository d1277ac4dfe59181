"""Official files: found, read, and complained about with file, place and what to do.

FILE.jsonl     one object a line
FILE.json      a list of objects, or an object that has the list under a key
FILE.parquet   rows; pictures in them are unpacked once, into ``unpacked/`` beside the file (they would not fit in memory)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.eval.benchmark import Answered, Question
from llavakit.types import Image

UNPACKED = "unpacked"
_ENDINGS = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"))


class Row(Mapping[str, Any]):
    """One object of a file, which knows where it stands."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self.where = values, where

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def text(self, *keys: str) -> str:
        """The first of these keys that is there; a string."""
        return str(self._typed(keys, (str,), "text"))

    def id(self, *keys: str) -> str | int:
        """The first of these keys that is there; a string or a whole number."""
        found: str | int = self._typed(keys, (str, int), "a text or a number")
        return found

    def list(self, *keys: str) -> Sequence[Any]:
        """The first of these keys that is there; a list."""
        found: Sequence[Any] = self._typed(keys, (list, tuple), "a list")
        return found

    def _typed(self, keys: Sequence[str], kinds: tuple[type, ...], what: str) -> Any:
        key = next((key for key in keys if key in self._values), None)
        if key is None:
            raise bad(f"no {' or '.join(keys)}", self.where, f"it has {', '.join(self._values) or 'nothing'}: is this the right file?")
        if not isinstance(self._values[key], kinds) or isinstance(self._values[key], bool):
            raise bad(f"{key} is not {what}", self.where, "take the official file as it is")
        return self._values[key]


def bad(what: str, where: str | Path, remedy: str) -> DataError:
    return DataError(what, code="bad_benchmark", where=str(where), remedy=remedy)


def find(folder: Path, *names: str) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    raise bad(f"no {listed}", folder, "put the official file there, or give the folder that has it")


def there(folder: Path, *names: str) -> Path | None:
    """As ``find``, but None where there is none."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def pictures(folder: Path, *names: str) -> Path:
    """The first of these folders that is there; the first of all where none is: asking says what is missing."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def rows(path: Path, under: str | None = None, *, lines: bool = False) -> Iterator[Row]:
    """The objects of a file, one by one; ``under``: the key of the list in a JSON object; ``lines``: one a line, under any name."""
    for where, value in _values(path, under, lines):
        if not isinstance(value, Mapping):
            raise bad("not an object", where, "take the official file as it is")
        yield Row(value, where)


def content(path: Path) -> Any:
    """A whole JSON file."""
    return _json(read_text(path), path, None)


def unique(questions: list[Question], path: Path) -> list[Question]:
    """Raises DataError where two have one id, or where there is none at all."""
    if not questions:
        raise bad("no question", path, "the file is empty: get it again")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise bad(f"two questions have the id {question.id}", path, "take the official file as it is")
        seen.add(question.id)
    return questions


def truths(answered: Sequence[Answered], needs: str) -> Sequence[Answered]:
    """Raises DataError where right answers are not known (or nothing is to be scored)."""
    if not answered:
        raise bad("no question", needs, "there is nothing to score")
    unknown = next((one.question for one in answered if one.question.truth is None), None)
    if unknown is not None:
        raise bad(f"no right answer is known for question {unknown.id}", unknown.origin or needs, f"put {needs} beside it")
    return answered


def complete(answered: Sequence[Answered]) -> Sequence[tuple[Question, str]]:
    """Every question with its answer. Raises DataError for the first that has none: the server would refuse the upload."""
    pairs = [(one.question, one.text) for one in answered if one.text is not None]
    if len(pairs) < len(answered):
        first = next(one.question.id for one in answered if one.text is None)
        what = f"{len(answered) - len(pairs)} of {len(answered)} questions have no answer, the first is {first}"
        raise DataError(what, code="unanswered", where="answers", remedy="let the run go on to its end first")
    return pairs


def upload(path: Path, entries: Sequence[Mapping[str, Any]]) -> Path:
    """A list of objects as the servers take it, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(json.dumps(list(entries)), encoding="utf-8")
    os.replace(draft, path)
    return path


def picture(row: Row, key: str, path: Path) -> Image:
    """A picture of a parquet row ({"bytes", "path"}), as a file of its own."""
    cell = row.get(key)
    data = cell.get("bytes") if isinstance(cell, Mapping) else None
    if not isinstance(data, bytes):
        raise bad(f"no picture in {key}", row.where, "take the official file as it is")
    ending = next((ending for magic, ending in _ENDINGS if data.startswith(magic)), ".bin")
    place = path.parent / UNPACKED / f"{hashlib.sha256(data).hexdigest()[:24]}{ending}"
    if not place.is_file():
        place.parent.mkdir(exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}.part")
        draft.write_bytes(data)
        os.replace(draft, place)
    return Image(place)


def _values(path: Path, under: str | None, by_line: bool) -> Iterator[tuple[str, Any]]:
    """Each value with its place."""
    if path.suffix == ".parquet":
        from llavakit.data.parquet import Rows

        yield from ((f"{path} [{number}]", values) for number, values in Rows(path))
    elif path.suffix == ".jsonl" or by_line:
        lines = enumerate(read_text(path).split("\n"), 1)
        yield from ((f"{path}:{number}", _json(line, path, number)) for number, line in lines if line.strip())
    else:
        found = content(path)
        listed = found if under is None else found.get(under) if isinstance(found, dict) else None
        if not isinstance(listed, list):
            raise bad("not a list" if under is None else f"no list {under!r}", path, "take the official file as it is")
        yield from ((f"{path} {under or ''}[{number}]", value) for number, value in enumerate(listed))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise bad("no such file", path, "check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise bad(f"cannot be read: {error}", path, "get the file again") from error


def _json(text: str, path: Path, line: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        raise DataError(
            f"not JSON: {error.msg} (column {error.colno})", code="bad_json", where=where, remedy="get the file again"
        ) from error
