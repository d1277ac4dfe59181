"""What a frozen tower made of pictures, on disk: read by the loader's workers in the place of views, written by training.

    FOLDER/KEY/about.json          from what KEY is made: tower, preprocessing, arithmetic
               3f/3fa2...          one picture: V x P x D numbers, then four bytes by which a whole file is known from a torn one
               drafts/             files being written; they get their names when they are whole

A picture's name is the digest of its content, so one that has changed is another picture, and one under two names is kept once. Another
tower or preparation is another KEY: nothing old is ever taken for something new. Any number of processes may write at once, because
what they write under one name is the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MARK = 4  # bytes of the check sum behind the numbers
FORGOTTEN = 3600  # seconds after which a draft is what a killed process left


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """The pictures of one KEY. ``tokens`` x ``width`` numbers of ``dtype`` a view; ``reserve``: bytes of the disk that it leaves free."""

    folder: Path
    tokens: int
    width: int
    dtype: torch.dtype
    reserve: int = 0

    @property
    def bytes_of_a_view(self) -> int:
        return self.tokens * self.width * self.dtype.itemsize

    def get(self, name: str) -> Tensor | None:
        """A picture's features (V, P, D); None where there are none, or where the file is not whole."""
        try:
            with self._path(name).open("rb") as file:
                held = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
                read = file.readinto(held.numpy().data)
        except OSError:
            return None
        count = (len(held) - MARK) // self.bytes_of_a_view
        if count < 1 or read != count * self.bytes_of_a_view + MARK or read != len(held):
            return None
        numbers, mark = held[:-MARK], held[-MARK:]
        if bytes(mark.numpy()) != _mark(numbers, name):
            return None
        return numbers.view(self.dtype).view(count, self.tokens, self.width)

    def put(self, name: str, features: Tensor) -> bool:
        """Keep a picture's features; False where the disk has no room for them, or cannot be written."""
        numbers = features.detach().cpu().contiguous().view(torch.uint8).flatten()
        path, drafts = self._path(name), self.folder / "drafts"
        draft = None
        try:
            if shutil.disk_usage(self.folder).free < numbers.nbytes + MARK + self.reserve:
                return False
            drafts.mkdir(exist_ok=True)
            path.parent.mkdir(exist_ok=True)
            handle, draft = tempfile.mkstemp(dir=drafts)
            with os.fdopen(handle, "wb") as file:
                file.write(numbers.numpy().data)
                file.write(_mark(numbers, name))
            os.replace(draft, path)
        except OSError:
            if draft is not None:
                Path(draft).unlink(missing_ok=True)
            return False
        return True

    def count(self) -> int:
        """How many pictures there are."""
        return sum(len(os.listdir(part)) for part in self.folder.glob("??") if part.is_dir())

    def sweep(self) -> None:
        """Remove what killed processes left half written."""
        for draft in self.folder.glob("drafts/*"):
            with suppress(OSError):
                if time.time() - draft.stat().st_mtime > FORGOTTEN:
                    draft.unlink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name


def _mark(numbers: Tensor, name: str) -> bytes:
    return zlib.crc32(numbers.numpy().data, zlib.crc32(name.encode())).to_bytes(MARK, "little")
