"""Replies that say what an earlier one of the run has said: word for word, or nearly.

Texts are compared by sketches: the smallest hashes of their runs of words. Two texts with much in common have the same smallest hashes.

    text -> words -> all runs of RUN words -> crc32 -> the KEPT smallest          the share of the two sketches' union that both
    earlier texts stand under their FEW smallest hashes: only these are compared  hold estimates the share of runs in common

One pass, in the order of the plan: the first of two stays. Short texts are compared word for word alone: two pictures may well both hold
three boats.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from zlib import crc32

RUN, KEPT, FEW = 4, 32, 4
SHORT = 40  # words
MOST = 64  # texts looked at under one hash: phrases that everybody uses would make this slow and tell nothing
_WORD = re.compile(r"\w+")


class Seen:
    """The texts so far. ``near`` is the share of runs in common from which on a text counts as a duplicate."""

    def __init__(self, near: float) -> None:
        self._near = near
        self._whole: dict[bytes, str] = {}
        self._sketches: list[tuple[str, frozenset[int]]] = []
        self._under: dict[int, list[int]] = {}

    def add(self, name: str, text: str) -> tuple[str, float] | None:
        """The earlier text that this one repeats, and how much of it (1.0: all); None, and kept, if it is new."""
        words = _WORD.findall(text.lower())
        whole = " ".join(words).encode()
        earlier = self._whole.setdefault(_digest(whole), name)
        if earlier != name:
            return earlier, 1.0
        if len(words) < SHORT:
            return None
        sketch = sorted({crc32(" ".join(words[at : at + RUN]).encode()) for at in range(len(words) - RUN + 1)})[:KEPT]
        nearest = self._nearest(frozenset(sketch), sketch[:FEW])
        if nearest is not None and nearest[1] >= self._near:
            return nearest
        for hashed in sketch[:FEW]:
            self._under.setdefault(hashed, []).append(len(self._sketches))
        self._sketches.append((name, frozenset(sketch)))
        return None

    def _nearest(self, sketch: frozenset[int], few: list[int]) -> tuple[str, float] | None:
        numbers = {number for hashed in few for number in self._under.get(hashed, [])[-MOST:]}
        found = ((self._sketches[number][0], _common(sketch, self._sketches[number][1])) for number in numbers)
        return max(found, key=lambda pair: pair[1], default=None)


def _common(a: frozenset[int], b: frozenset[int]) -> float:
    smallest = sorted(a | b)[:KEPT]
    return sum(value in a and value in b for value in smallest) / len(smallest)


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=12).digest()
