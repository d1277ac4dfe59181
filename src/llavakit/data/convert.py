"""From one way of writing training data down to another. What the file says is kept; only how it is said changes (``messages``).

    .json                a JSON list            LLaVA's, unless told otherwise
    .jsonl               one record a line      messages, unless told otherwise
    .json.gz .jsonl.gz   the same, packed
    .parquet             rows                   messages, with the pictures inside

Pictures that stand inside a parquet file become files in the folder ``NAME-images`` beside the new one. Commas too many are read over:
this is where a file that training refuses is repaired.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

from llavakit.data.formats import records
from llavakit.data.messages import is_messages, pictures, to_llava, to_messages
from llavakit.data.parquet import Writer
from llavakit.data.reading import Progress
from llavakit.data.rules import Report, examine
from llavakit.errors import ConfigError, LlavaError

Written = Literal["llava", "messages"]
Write = Callable[[Mapping[str, Any]], None]
_ENDINGS: dict[str, Written] = {".json": "llava", ".jsonl": "messages", ".parquet": "messages"}


def convert(
    source: Path,
    out: Path,
    *,
    written: Written | None = None,
    image_root: Path | None = None,
    skip: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the records of ``source`` to ``out``; complete or not at all. The report counts them and what was left out with ``skip``.

    Raises DataError for the first record that cannot be used or said (unless skipped), ConfigError for an ending that is none of these.
    """
    ending = _ending(out)
    written = written or _ENDINGS[ending]
    if ending == ".parquet" and written == "llava":
        raise ConfigError("parquet holds messages", code="bad_value", where=str(out), remedy="leave the way of writing to the ending")
    root = image_root if image_root is not None else source.parent
    report = Report()
    reader = records(source, tolerant=True, progress=progress)
    with _writer(out, ending, root) as write:
        for number, entry in reader:
            report.records += 1
            place = f"{source.name}:{reader.place(number)}"
            found = examine(entry, where=place, allow_outside=True)
            try:
                if found.fault is not None:
                    raise found.fault.error()
                record = entry if is_messages(entry) == (written == "messages") else _OTHER[written](entry)
                write(record if ending == ".parquet" else _with_files(record, out))
            except LlavaError as error:
                if not skip:
                    error = type(error)(error.what, code=error.code, where=_placed(error, place, found.id), remedy=error.remedy)
                    raise error from None
                report.fault(error)
    return report


def write_records(records: Iterable[Mapping[str, Any]], out: Path) -> None:
    """Write LLaVA records to a .json or .jsonl, plain or packed; complete or not at all. Raises ConfigError for another ending."""
    ending = _ending(out)
    if ending == ".parquet":
        raise ConfigError("parquet holds messages", code="bad_value", where=str(out), remedy="write .json, and llava data convert it")
    with _writer(out, ending, out.parent) as write:
        for record in records:
            write(record)


_OTHER: dict[Written, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"llava": to_llava, "messages": to_messages}


def _placed(error: LlavaError, place: str, sample_id: str) -> str:
    return error.where if error.where.startswith(place) else f"{place} (id {sample_id}) {error.where}".rstrip()


def _ending(out: Path) -> str:
    ending = Path(out.name.removesuffix(".gz")).suffix.lower()
    if ending not in _ENDINGS or (ending == ".parquet" and out.name.endswith(".gz")):
        remedy = f"use {', '.join(_ENDINGS)}, or .gz after the first two"
        raise ConfigError("the name does not end like a data file's", code="bad_value", where=str(out), remedy=remedy)
    return ending


@contextmanager
def _writer(out: Path, ending: str, root: Path) -> Iterator[Write]:
    """What writes one record, to a file that takes its name when all is written."""
    draft = out.with_name(f".{out.name}.tmp")
    try:
        if ending == ".parquet":
            with Writer(draft, image_root=root) as rows:
                yield rows.write
        else:
            with _text(draft, packed=out.name.endswith(".gz")) as file:
                yield from _lines(file) if ending == ".jsonl" else _list(file)
        os.replace(draft, out)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _text(path: Path, *, packed: bool) -> Iterator[TextIOWrapper]:
    with ExitStack() as stack:
        content: Any = stack.enter_context(path.open("wb"))
        if packed:  # without a name and a time: the same records give the same bytes
            content = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=content, mtime=0))
        yield stack.enter_context(TextIOWrapper(content, "utf-8", "surrogatepass", newline="\n"))


def _lines(file: TextIOWrapper) -> Iterator[Write]:
    yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file)


def _list(file: TextIOWrapper) -> Iterator[Write]:
    """One record a line, so that tools for lines can be used on it."""
    before = "[\n"

    def write(record: Mapping[str, Any]) -> None:
        nonlocal before
        file.write(before + json.dumps(record, ensure_ascii=False))
        before = ",\n"

    yield write
    file.write("[]\n" if before == "[\n" else "\n]\n")


def _with_files(record: Mapping[str, Any], out: Path) -> Mapping[str, Any]:
    """The record with the names of files where it held pictures."""
    if not any(isinstance(cell, Mapping) for cell in pictures(record)):
        return record
    names = [_file(cell, out) if isinstance(cell, Mapping) else cell for cell in pictures(record)]
    key = "image" if "image" in record else "images"
    return {**record, key: names if isinstance(record[key], list) else names[0]}


def _file(cell: Mapping[str, Any], out: Path) -> str:
    """The name, relative to the data's folder, of a picture by its content: the same picture is written once."""
    content = cell.get("bytes")
    if not isinstance(content, bytes):
        return str(cell.get("path"))
    folder = out.parent / f"{out.name.split('.')[0]}-images"
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(content).hexdigest()[:20] + (Path(str(cell.get("path") or "")).suffix.lower() or _suffix(content))
    if not (folder / name).exists():
        (folder / name).write_bytes(content)
    return f"{folder.name}/{name}"


def _suffix(content: bytes) -> str:
    return ".png" if content.startswith(b"\x89PNG") else ".webp" if content[8:12] == b"WEBP" else ".jpg"
