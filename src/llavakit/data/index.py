"""A training file, checked once and kept so that opening it costs nothing and any number of processes share it.

One file, written in one pass and put in place whole:

    [ record | picture | record | ... ][ starts | sizes | places | image_starts | image_ids | names ][ header ][ its length ][ magic ]
      read at random, by pread           numpy, mapped                                                 JSON: report, fingerprint, ...

A record is JSON: ``[id, pictures, [[role, parts], ...]]``, where a part is a text or the number of a picture, and a picture is a name or
the place of its bytes in this file. The index stands beside the data, or in the user's cache where that folder cannot be written, and is
made anew when the data's size or time, the rules' version, or ``allow_outside`` differ. Small files leave nothing behind: they are indexed
in memory. Whether named pictures exist is not part of it: that is a property of the disk (``present``).
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import mmap
import os
import time
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from llavakit.data.formats import records
from llavakit.data.reading import Progress
from llavakit.data.rules import Examined, Finding, Report, examine
from llavakit.errors import DataError
from llavakit.types import Conversation, Image, Message, Text

VERSION = 1  # of the layout and of the rules: an index made under other rules is made anew
SMALL = 8 << 20  # bytes of a file that is indexed in memory, every time
DEAD = 3600.0  # seconds without a byte, after which a draft's writer is taken for killed
_MAGIC = b"llavaix\n"
_SUFFIX = ".llavakit-index"

Key = dict[str, Any]


class Index:
    """An index that is open. It crosses process borders by its path, and a fork shares it."""

    def __init__(self, held: Path | bytes, key: Key) -> None:
        """Raises ValueError for what is no index, or one of something else."""
        self._held, self._key = held, key
        self._memory = held if isinstance(held, bytes) else self._map(held)
        if len(self._memory) < 16 or self._memory[-8:] != _MAGIC:
            raise ValueError("not an index")
        end = len(self._memory) - 16
        header = json.loads(self._memory[end - int.from_bytes(self._memory[end:-8], "little") : end])
        if header["key"] != key:
            raise ValueError("an index of something else")
        self._sections: dict[str, tuple[str, int, int]] = header["sections"]
        self.fingerprint: str = header["fingerprint"]
        self.fault = None if header["fault"] is None else Finding(**header["fault"])  # the first one
        self._report, self._is_list = header["report"], header["is_list"]
        self.starts, self.sizes = self._array("starts"), self._array("sizes")
        self.places = self._array("places")
        self.image_starts, self.image_ids = self._array("image_starts"), self._array("image_ids")

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self._held, self._key)

    def __len__(self) -> int:
        return len(self.starts)

    def report(self) -> Report:
        """The report of the reading, as a value of its own."""
        found = self._report
        places = {code: list(shown) for code, shown in found["places"].items()}
        return Report(found["records"], Counter(found["faults"]), Counter(found["remarks"]), places)

    def place(self, number: int) -> str:
        place = int(self.places[number])
        return f"[{place}]" if self._is_list else str(place)

    def names(self) -> list[str]:
        """Every picture's name, once, in the order of ``image_ids``."""
        found: list[str] = json.loads(self._array("names").tobytes().decode("utf-8", "surrogatepass"))
        return found

    def sample(self, number: int, root: Path) -> tuple[str, Conversation]:
        """A record's id and conversation, its pictures under ``root``."""
        packed = self._read(int(self.starts[number]), int(self.sizes[number]))
        try:
            sample_id, pictures, turns = json.loads(packed.decode("utf-8", "surrogatepass"))
        except ValueError as error:
            what = f"record {self.place(number)} of the index is damaged"
            raise DataError(what, code="bad_index", where=str(self._held), remedy="delete the index: it is made anew") from error
        images = [Image(root / picture if isinstance(picture, str) else self._read(*picture)) for picture in pictures]
        messages = (Message(role, tuple(Text(p) if isinstance(p, str) else images[p] for p in parts)) for role, parts in turns)
        return sample_id, Conversation(tuple(messages))

    def _array(self, name: str) -> npt.NDArray[Any]:
        kind, offset, count = self._sections[name]
        return np.frombuffer(self._memory, kind, count, offset)

    def _map(self, path: Path) -> mmap.mmap:
        descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def _read(self, offset: int, size: int) -> bytes:
        """Bytes of the records. By pread from a file: pages that a process has mapped would count as its own memory, more and more."""
        if isinstance(self._held, bytes) or not hasattr(os, "pread"):
            return self._memory[offset : offset + size]
        return os.pread(self._descriptor, size, offset)


def open_index(path: Path, *, allow_outside: bool = False, progress: Progress | None = None) -> Index:
    """The index of a training file, made first where there is none that is true.

    Raises DataError: ``bad_file``, ``bad_json``, ``file_changed`` (while it was read) and ``cannot_write`` (nowhere a place for the index).
    """
    key = _key(path, allow_outside)
    if key["size"] <= SMALL:
        held = BytesIO()
        _build(path, held, key, progress)
        return Index(held.getvalue(), key)
    places = (path.with_name(path.name + _SUFFIX), _cache(path))
    return next(filter(None, (_opened(place, key) for place in places)), None) or _made(path, places, key, progress)


def _key(path: Path, allow_outside: bool) -> Key:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(error.strerror or str(error), code="bad_file", where=str(path), remedy="give a LLaVA JSON or JSONL file") from error
    return {"version": VERSION, "size": found.st_size, "time": found.st_mtime_ns, "name": path.name, "allow_outside": allow_outside}


def _cache(path: Path) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "llavakit" / f"{hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]}-{path.name}{_SUFFIX}"


def _opened(place: Path, key: Key) -> Index | None:
    try:
        return Index(place, key)
    except (OSError, ValueError, KeyError, TypeError):  # absent, not whole, of something else, or no index at all
        return None


def _made(path: Path, places: tuple[Path, ...], key: Key, progress: Progress | None) -> Index:
    failed = ""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _alone(place):
                if (made := _opened(place, key)) is not None:  # by another process, while this one waited
                    return made
                with _draft(place) as file:
                    _build(path, file, key, progress)
                return Index(place, key)
        except OSError as error:  # reading fails as DataError: this is about writing
            failed = f"{place}: {error.strerror or error}"
    raise DataError(f"no place for its index ({failed})", code="cannot_write", where=str(path), remedy="set XDG_CACHE_HOME to a folder")


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Keep other processes waiting, so that the work is done once.

    Nothing but time depends on it: on a file system without locks (ENOLCK, ENOSYS), or whose locks hold on one machine only, each
    process makes its own draft, and the last one's is taken.
    """
    path = place.with_name(f".{place.name}.lock")
    while True:
        file = path.open("ab")
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                break
        file.close()  # who held it has finished and removed it
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _draft(place: Path) -> Iterator[BinaryIO]:
    """A file that no other process writes, put in place whole, or gone. What a killed process left is removed when it is old."""
    for old in place.parent.glob(f".{glob.escape(place.name)}.*tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > DEAD:
                old.unlink()
    draft = place.with_name(f".{place.name}.{uuid4().hex}.tmp")
    with draft.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(draft, place)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


class _Writer:
    """Records to the layout above."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at = file, 0
        self._starts, self._sizes, self._places, self._image_starts = array("q"), array("q"), array("q"), array("q", [0])
        self._image_ids, self._names = array("i"), dict[str, int]()

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, sample_id: str, conversation: Conversation, number: int) -> None:
        pictures: list[Any] = []
        turns = []
        for message in conversation.messages:
            parts: list[str | int] = []
            for part in message.parts:
                parts.append(part.text if isinstance(part, Text) else len(pictures))
                if isinstance(part, Image):
                    pictures.append(self._picture(part))
            turns.append([message.role, parts])
        packed = json.dumps([sample_id, pictures, turns], ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        self._sizes.append(len(packed))
        self._starts.append(self._put(packed))
        self._places.append(number)
        self._image_starts.append(len(self._image_ids))

    def finish(self, header: dict[str, Any]) -> None:
        names = json.dumps(list(self._names), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        sections = {}
        for name, kind, values in (
            ("starts", "<i8", self._starts),
            ("sizes", "<i8", self._sizes),
            ("places", "<i8", self._places),
            ("image_starts", "<i8", self._image_starts),
            ("image_ids", "<i4", self._image_ids),
            ("names", "u1", names),
        ):
            self._put(bytes(-self._at % 8))
            content = values if isinstance(values, bytes) else np.asarray(values, kind).tobytes()
            sections[name] = (kind, self._put(content), len(values))
        text = json.dumps(header | {"sections": sections}).encode()
        self._put(text + len(text).to_bytes(8, "little") + _MAGIC)

    def _picture(self, image: Image) -> str | tuple[int, int]:
        """A name as it stands, or where the bytes are. Every picture has a row in ``image_ids``, -1 if it has no name."""
        if isinstance(image.source, bytes):
            self._image_ids.append(-1)
            return self._put(image.source), len(image.source)
        name = str(image.source)
        self._image_ids.append(self._names.setdefault(name, len(self._names)))
        return name

    def _put(self, content: bytes) -> int:
        """Write, and say where it begins."""
        start, self._at = self._at, self._at + len(content)
        self._file.write(content)
        return start


def _build(path: Path, file: BinaryIO, key: Key, progress: Progress | None) -> None:
    source, report, writer = records(path, progress=progress), Report(), _Writer(file)
    first: Finding | None = None
    seen: set[bytes] = set()
    for number, entry in source:
        report.records += 1
        found = examine(entry, where=f"{path.name}:{source.place(number)}", allow_outside=key["allow_outside"])
        if found.fault is not None:
            first = first or found.fault
            report.fault(found.fault.error())
            continue
        _remark(found, f"{path.name}:{source.place(number)}", seen, report)
        assert found.conversation is not None
        writer.add(found.id, found.conversation, number)
    if _key(path, key["allow_outside"]) != key:
        raise DataError("the file changed while it was read", code="file_changed", where=str(path), remedy="start again")
    fault = None if first is None else dataclasses.asdict(first)
    known = {"key": key, "report": vars(report), "fault": fault, "fingerprint": source.fingerprint, "is_list": source.is_list}
    writer.finish(known)


def _remark(found: Examined, where: str, seen: set[bytes], report: Report) -> None:
    for finding in found.findings:
        report.remark(finding.code, finding.where)
    mark = hashlib.blake2b(found.id.encode("utf-8", "surrogatepass"), digest_size=8).digest()  # ids may be long, and there are many
    if mark in seen:
        report.remark("id_repeated", f"{where} (id {found.id})")
    seen.add(mark)
