"""Memories of replies that have ended, for those who begin alike: the same system text, the same picture, the same conversation further on.

    stored     | system | picture | question | reply |
    new        | system | picture | question | reply | </s> | next question |       taken over: reads only what is new
    new        | system | picture | another question |                             copied up to where they part

Least recently used out first, bounded in bytes; replies under way come before those that have ended. What stands at a position is a token
or the digest of a picture (``assistant.position_keys``), so another picture of equal size is another text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

from llavakit.assistant import common_prefix
from llavakit.serve.memory import Memory

Keys = Sequence[int | bytes]
_WORTH = 8  # positions; fewer are read as fast as they are copied


@dataclass(frozen=True)
class Found:
    """The longest beginning that is known. ``name``: of the stored memory; None: of a reply under way, or nothing at all."""

    length: int = 0
    memory: Memory | None = None
    name: int | None = None


class Prefixes:
    """What ended replies had read."""

    def __init__(self) -> None:
        self.held = 0
        self._names = count()
        self._kept: OrderedDict[int, tuple[list[int | bytes], Memory]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, keys: Keys, live: Iterable[tuple[Keys, Memory]] = ()) -> Found:
        """The longest common beginning of ``keys`` with what is stored or being read."""
        best = Found()
        for name, (old, memory) in self._kept.items():
            if (length := common_prefix(old, keys)) > best.length:
                best = Found(length, memory, name)
        for under_way, memory in live:
            if (length := common_prefix(under_way[: memory.length], keys)) > best.length:
                best = Found(length, memory)
        return best if best.length >= _WORTH else Found()

    def begin(self, found: Found, *, prompt: int, most: int) -> Memory:
        """A memory that begins with what was found: taken over if it holds nothing else, otherwise copied."""
        assert found.memory is not None
        if found.name is not None:
            if found.length == found.memory.length:
                self._remove(found.name)
                found.memory.lengthen(most)
                return found.memory
            self._kept.move_to_end(found.name)
        return found.memory.copy(found.length, most=most, now=prompt)

    def put(self, keys: Keys, memory: Memory) -> None:
        """Keep what a reply has read. What it continues is not kept twice."""
        read = list(keys[: memory.length])
        if memory.length < _WORTH or any(old[: len(read)] == read for old, _ in self._kept.values()):
            return
        for name, (old, _) in list(self._kept.items()):
            if read[: len(old)] == old:
                self._remove(name)
        self._kept[next(self._names)] = read, memory
        self.held += memory.nbytes

    def spare(self, found: Found) -> int:
        """Forget this one last; how many bytes it holds."""
        if found.name is None or found.memory is None:
            return 0
        self._kept.move_to_end(found.name)
        return found.memory.nbytes

    def shrink(self, max_bytes: int) -> None:
        """Forget until no more is held than that."""
        while self.held > max(0, max_bytes) and self._kept:
            self._remove(next(iter(self._kept)))

    def _remove(self, name: int) -> None:
        self.held -= self._kept.pop(name)[1].nbytes
