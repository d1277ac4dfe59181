"""Files of captions, read one row at a time, and the stage-1 samples made of them (spec 5.3, naive expansion).

    TSV         caption <tab> url            CC3M's own: no header, no quotes; a plain list of captions too
    JSON, JSONL {"id", "image", "caption"}   or LLaVA's {"id", "image", "conversations"}, whose first reply is the caption

How JSON is read is handed in (``Records``): its reader is a room that this one does not know. A row of a TSV has no picture's name, so it
gets one from its number, counted from 0: CC3M's is ``GCC_train_000000123.jpg``.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO

from llavakit.errors import ConfigError, DataError, PromptError
from llavakit.types import Conversation, Image, assistant, user

IMAGE_NAME = "GCC_train_{:09d}.jpg"
LONGEST = 1 << 20  # bytes of a line: beyond that the file is no list of captions
BRIEF = "brief.txt"
ReadProgress = Callable[[int, int], None]  # bytes read, bytes in all
Records = Callable[[Path, ReadProgress | None], Iterable[tuple[int, Any]]]
Write = Callable[[str], None]
_JSON = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:\[\s*[{\]]|\{\s*[\"}])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One row. ``line`` is the record as it stands; ``image`` is empty where the row names none."""

    text: str
    id: str
    image: str
    line: str


class Captions:
    """The usable captions of a file; iterate as often as you like. ``left_out`` counts the others of the last time, ``first`` is one."""

    def __init__(
        self, path: Path, *, records: Records | None = None, image_name: str = IMAGE_NAME, progress: ReadProgress | None = None
    ) -> None:
        self._path, self._records, self._progress = path, records, progress
        self._image_name = _checked(image_name)
        with _opened(path) as (_, content):
            start = content.read(4096)
        self.is_table = not (_JSON.match(start) or start[:2] in (b"\xff\xfe", b"\xfe\xff") or start[:4] == b"PAR1")
        self.left_out, self.first = 0, ""

    @property
    def path(self) -> Path:
        return self._path

    def __iter__(self) -> Iterator[Caption]:
        self.left_out, self.first = 0, ""
        for number, caption in self._rows() if self.is_table else self._entries():
            if caption is not None and _is_usable(caption.text):
                yield caption
            else:
                self.left_out += 1
                self.first = self.first or f"{self._path.name}:{number}"

    def _rows(self) -> Iterator[tuple[int, Caption]]:
        """Rows of a TSV, with their lines counted from 1."""
        for number, line in enumerate(_lines(self._path, self._progress), 1):
            if line:
                image = self._image_name.format(number - 1)
                yield number, Caption(text=line.partition("\t")[0].strip(), id=Path(image).stem, image=image, line=line)

    def _entries(self) -> Iterator[tuple[int, Caption | None]]:
        if self._records is None:
            raise DataError("a JSON file, and no reader of JSON was given", code="bad_file", where=str(self._path))
        for number, record in self._records(self._path, self._progress):
            yield number, _of_record(record, number)


def _checked(image_name: str) -> str:
    """A pattern that names pictures apart."""
    try:
        if image_name.format(1) != image_name.format(2):
            return image_name
    except (LookupError, ValueError):
        pass
    remedy = "write {} or {:09d} where the row's number goes"
    raise ConfigError(f"{image_name!r} does not name pictures by number", code="bad_value", where="--image-name", remedy=remedy)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file as it lies on the disk, and its content, which may be packed in it."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield file, gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(reason, code="bad_file", where=str(path), remedy="give a TSV, JSON or JSONL file of captions") from error


def _lines(path: Path, progress: ReadProgress | None) -> Iterator[str]:
    """Lines without their ends; a line ends with ``\\n`` alone or ``\\r\\n``."""
    with _opened(path) as (file, content):
        total, number = os.fstat(file.fileno()).st_size, 0
        while line := content.readline(LONGEST):
            number += 1
            if len(line) == LONGEST:
                raise _bad(path, number, "the line is too long for a caption")
            if progress is not None and not number % 10_000:
                progress(file.tell(), total)
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise _bad(path, number, "the line is not UTF-8") from error


def _bad(path: Path, number: int, what: str) -> DataError:
    return DataError(what, code="bad_file", where=f"{path}, line {number}", remedy="give a TSV in UTF-8: caption, tab, address")


def _of_record(record: object, number: int) -> Caption | None:
    """None for what holds no caption."""
    if not isinstance(record, Mapping):
        return None
    text, image = record.get("caption"), record.get("image", "")
    turns = record.get("conversations")
    if text is None and isinstance(turns, list):
        text = next((turn.get("value") for turn in turns if isinstance(turn, Mapping) and turn.get("from") == "gpt"), None)
    if not isinstance(text, str) or not isinstance(image, str):
        return None
    sample_id = str(record.get("id", "") or Path(image).stem or number)
    return Caption(text=text.strip(), id=sample_id, image=image, line=json.dumps(record, ensure_ascii=False))


def _is_usable(text: str) -> bool:
    """Whether a caption can be trained on: not empty, and text."""
    if not text or text.isprintable():
        return bool(text)
    try:
        return bool(Conversation((user(text),)))  # the type refuses what is no character
    except PromptError:
        return False


# --- what is written ------------------------------------------------------------------------------------------------------------------


def instructions() -> tuple[str, ...]:
    """The eleven ways to ask for a short description."""
    text = (files("llavakit.datagen") / "prompts" / BRIEF).read_text(encoding="utf-8")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def expand(caption: Caption, asked: Sequence[str], *, seed: int) -> dict[str, Any]:
    """A caption as a stage-1 sample: one of the instructions, with the picture before or after it; both depend on seed and id alone."""
    if not caption.image:
        remedy = "keep the records as they stand (--records), or name the pictures"
        raise DataError("a sample needs a picture", code="no_image", where=f"id {caption.id}", remedy=remedy)
    draw = random.Random(f"{seed}:{caption.id}")
    words, first, picture = draw.choice(asked), draw.random() < 0.5, Image(Path(caption.image))
    question = user(picture, "\n" + words) if first else user(words + "\n", picture)
    return {"id": caption.id, **Conversation((question, assistant(caption.text))).to_llava(image_names=[caption.image])}


@contextmanager
def lines_to(out: Path, *, as_list: bool) -> Iterator[Write]:
    """What writes one line, or one member of a JSON list, to a file that takes its name when all is written."""
    draft, before = out.with_name(f".{out.name}.tmp"), "[\n" if as_list else ""

    def write(line: str) -> None:
        nonlocal before
        file.write(before + line + ("" if as_list else "\n"))
        before = ",\n" if as_list else ""

    try:
        with draft.open("w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
            yield write
            if as_list:
                file.write("[]\n" if before == "[\n" else "\n]\n")
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)
