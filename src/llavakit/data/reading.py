"""JSON lists and JSONL, plain or gzipped, read one record at a time: the memory is one record's and a chunk's, whatever the file's size.

    file -> chunks of bytes -> SHA-256, decoder -> a window of text -> values
                                                   [dropped | held, being read | not yet read]

UTF-8 with or without a BOM, UTF-16 with one. What is not JSON is told with its line and column, as if the file had been read whole
(D3, D4). With ``tolerant`` a comma before a closing bracket is read over: LLaVA's own documentation has one.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llavakit.errors import DataError

CHUNK = 1 << 20
Progress = Callable[[int, int], None]  # bytes read, bytes in all
Broken = Callable[[DataError], None]  # hears of a line that is no JSON, and the reading goes on
SECONDS_APART = 5.0  # between two lines about one reading
_BLANK = re.compile(r"[ \t\n\r]*")
_NEAR = 16  # a value that is cut off fails at its end, or, inside a word or an escape, a few characters before


def now_and_then(what: str, say: Callable[[str], object]) -> Progress:
    """Progress as a line every few seconds, for a terminal and a pipe alike; a short reading is silent."""
    last = time.monotonic()

    def tell(done: int, whole: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_APART:
            last = time.monotonic()
            say(f"{what}: {done / max(1, whole):.0%}")

    return tell


class Records:
    """Iterate once for ``(number, value)``: the position in a JSON list, the line in JSONL. ``fingerprint`` is complete afterwards."""

    def __init__(
        self, path: Path, *, tolerant: bool = False, broken: Broken | None = None, progress: Progress | None = None, chunk: int = CHUNK
    ) -> None:
        self._path, self._broken, self._progress, self._chunk = path, broken, progress, chunk
        self._hash = hashlib.sha256()
        self._text = _Window(self._characters(), path, tolerant)
        self.is_list = False

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the content: the same packed and unpacked, under any name."""
        return self._hash.hexdigest()

    def place(self, number: int) -> str:
        """How messages name a record: ``[3]`` in a list, ``4`` for a line."""
        return f"[{number}]" if self.is_list else str(number)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.is_list = self._text.next() == "["
        return self._text.entries() if self.is_list else self._text.lines(self._broken)

    def _characters(self) -> Iterator[str]:
        decoder: codecs.IncrementalDecoder | None = None
        read = line = 0
        for piece in self._bytes():
            self._hash.update(piece)
            if decoder is None:
                decoder = codecs.getincrementaldecoder("utf-16" if piece[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")()
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                start = error.start - waiting
                what = f"byte {read + start} (line {line + piece.count(10, 0, max(start, 0)) + 1}) is not UTF-8"
                raise DataError(what, code="bad_json", where=str(self._path), remedy="save the file as UTF-8") from error
            read, line = read + len(piece), line + piece.count(b"\n")
            yield text

    def _bytes(self) -> Iterator[bytes]:
        """The content in chunks, unpacked; the last one is empty."""
        try:
            with self._path.open("rb") as file:
                total = os.fstat(file.fileno()).st_size
                packed = file.read(2) == b"\x1f\x8b"
                file.seek(0)
                content: BinaryIO = gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[assignment]
                while piece := content.read(self._chunk):
                    if self._progress is not None:
                        self._progress(file.tell(), total)
                    yield piece
                yield b""
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise DataError(reason, code="bad_file", where=str(self._path), remedy="give a LLaVA JSON or JSONL file") from error


class _Window:
    """The part of the text that is being read. It grows at its end, is dropped at its start, and knows where it stands in the file."""

    def __init__(self, chunks: Iterator[str], path: Path, tolerant: bool) -> None:
        self._chunks, self._path, self._tolerant = chunks, path, tolerant
        self._held, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # of the first held character: lines from 1, characters of its line before it
        self._decode = json.JSONDecoder().raw_decode

    def entries(self) -> Iterator[tuple[int, Any]]:
        """The members of the list that begins here, and nothing after it."""
        self._at += 1
        number = 0
        closing = self.next()
        while closing != "]":
            yield number, self._value()
            number += 1
            closing = self.next()
            if closing not in (",", "]"):
                raise self._broken("Expecting ',' delimiter", self._at)
            if closing == ",":
                self._at += 1
                closing = self.next()
                if closing == "]" and not self._tolerant:
                    raise self._broken("Expecting value", self._at)
        self._at += 1
        if self.next():
            raise self._broken("Extra data", self._at)

    def lines(self, broken: Broken | None) -> Iterator[tuple[int, Any]]:
        """One value a line. Lines end with ``\\n`` alone: U+2028 and its like may stand inside a JSON string."""
        number, first = self._line + self._held.count("\n", 0, self._at) - 1, True
        while self._at < len(self._held) or self._grow():
            number += 1
            end = self._end_of_line()
            line = self._held[self._at : end]
            if line.strip():
                try:
                    yield number, self._line_value(line, first)
                except DataError as error:
                    if broken is None or error.code != "bad_json":
                        raise
                    broken(error)
                first, end = False, self._end_of_line()
            self._at = min(end + 1, len(self._held))

    def next(self) -> str:
        """The next character that is no blank; empty at the end."""
        while True:
            self._at = _BLANK.match(self._held, self._at).end()  # type: ignore[union-attr]  # it matches anywhere
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._grow():
                return ""

    def _value(self) -> Any:
        """The value that begins here; what is cut off by the window's end is read again when more is held."""
        while True:
            try:
                value, end = self._decode(self._held, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._held) - _NEAR or error.msg.startswith("Unterminated string")
                if cut and not self._ended:
                    self._grow()  # what was said of places before this is no longer true
                elif not (self._tolerant and self._forgive(error)):
                    raise self._broken(error.msg, error.pos) from error
                continue
            if end < len(self._held) - _NEAR or self._ended:  # "1" may go on as "1e+5"
                self._at = end
                return value
            self._grow()

    def _line_value(self, line: str, first: bool) -> Any:
        try:
            return json.loads(line)
        except json.JSONDecodeError as error:
            if first and self._one_object():
                raise DataError(
                    "one object, not a list of samples", code="bad_file", where=str(self._path), remedy="write a list, or one object a line"
                ) from error
            if self._tolerant and self._forgive(error, self._at):
                return self._line_value(self._held[self._at : self._end_of_line()], first=False)
            raise self._broken(error.msg, self._at + error.pos) from error

    def _one_object(self) -> bool:
        """Whether the whole file is one JSON value over several lines. Looking ahead leaves the place as it was."""
        ahead = _Window(iter(()), self._path, False)
        ahead._chunks, ahead._held = self._rest(), self._held[self._at :]
        try:
            value = ahead._value()
            return isinstance(value, dict) and not ahead.next()
        except DataError:
            return False

    def _rest(self) -> Iterator[str]:
        """The chunks to come, which stay to be read."""
        for chunk in self._chunks:
            self._held += chunk
            yield chunk
        self._ended = True

    def _end_of_line(self) -> int:
        while (end := self._held.find("\n", self._at)) < 0:
            if not self._grow():
                return len(self._held)
        return end

    def _grow(self) -> bool:
        """Hold at least twice as much of what is not yet read, so that a long record is read few times. False at the end."""
        dropped = self._held[: self._at]
        if lines := dropped.count("\n"):
            self._line, self._column = self._line + lines, len(dropped) - dropped.rfind("\n") - 1
        else:
            self._column += len(dropped)
        parts, self._at = [self._held[self._at :]], 0
        wanted = 2 * len(parts[0]) + 1
        while not self._ended and wanted > sum(map(len, parts)):
            chunk = next(self._chunks, None)
            self._ended = chunk is None
            parts.append(chunk or "")
        grown = any(parts[1:])
        self._held = "".join(parts)
        return grown

    def _forgive(self, error: json.JSONDecodeError, start: int = 0) -> bool:
        """Blank the comma before a closing bracket, if that is what is wrong."""
        comma = self._comma(start + error.pos)
        if comma is None:
            return False
        self._held = f"{self._held[:comma]} {self._held[comma + 1 :]}"
        return True

    def _comma(self, position: int) -> int | None:
        """The place of a comma before a closing bracket at ``position`` (where Python 3.13 reports the comma, older ones the bracket)."""
        comma = position if self._held[position : position + 1] == "," else len(self._held[:position].rstrip()) - 1
        closing = _BLANK.match(self._held, comma + 1).end() if comma >= 0 else 0  # type: ignore[union-attr]
        return comma if comma >= 0 and self._held[comma] == "," and self._held[closing : closing + 1] in ("]", "}") else None

    def _broken(self, message: str, position: int) -> DataError:
        before = self._held[:position]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") if lines else self._column + position + 1
        return DataError(
            f"not JSON: {message}",
            code="bad_json",
            where=f"{self._path}, line {self._line + lines}, column {column}",
            remedy="repair it there" if self._comma(position) is None else "remove the comma before the closing bracket",
        )
