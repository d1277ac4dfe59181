"""Which texts of a run are most alike: sketches of fixed size and the first words of each text, so that memory is known.

    text -> runs of RUN words -> a hash each -> of HASHES mixings of it, the smallest          (minhash)
    two texts share a part of their runs  ==  about the same part of their smallest values are equal
    texts that agree in all of one BAND's values are compared                                  (so not every pair is)

A pair of share s is met with 1 - (1 - s^ROWS)^BANDS: 0.97 at one half, 0.26 at a quarter. Shares are told to about a tenth.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

RUN, BANDS, ROWS = 3, 24, 3
HASHES = BANDS * ROWS
MOST = 200_000  # texts: 58 MB of sketches, and their first words
BEGINNING = 160  # characters of a text that are kept to be shown
CROWD = 32  # texts under one band that are compared with each other: what hundreds share is a phrase of the language
_WORD = re.compile(r"\w+")


class Said(NamedTuple):
    """A text by its name, and how it begins."""

    name: str
    beginning: str


class Pair(NamedTuple):
    """Two texts and about the share of runs that they have in common."""

    first: Said
    second: Said
    share: float


class Nearest:
    """Add texts, then ask for the pairs that are most alike. Texts beyond MOST, and those of fewer words than RUN, are not compared."""

    def __init__(self, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self._factors = draw.integers(1, 1 << 62, HASHES, dtype=np.uint64) | np.uint64(1)
        self._offsets = draw.integers(0, 1 << 62, HASHES, dtype=np.uint64)
        self._said: list[Said] = []
        self._sketches: list[bytes] = []
        self.left_out = 0

    def add(self, name: str, text: str) -> None:
        words = _WORD.findall(text.lower())
        if len(words) < RUN or len(self._said) >= MOST:
            self.left_out += 1
            return
        self._said.append(Said(name, text[:BEGINNING]))
        self._sketches.append(self._sketch(words).tobytes())

    def pairs(self, most: int = 20, *, least: float = 0.2) -> list[Pair]:
        """The pairs with the largest shares, largest first, each text at most once."""
        if not self._sketches:
            return []
        sketches = np.frombuffer(b"".join(self._sketches), dtype=np.uint32).reshape(len(self._sketches), HASHES)
        found = sorted(
            ((share, a, b) for (a, b), share in _compared(sketches).items() if share >= least), key=lambda row: (-row[0], row[1:])
        )
        taken, told = set[int](), list[Pair]()
        for share, a, b in found:
            if not taken & {a, b} and len(told) < most:
                taken |= {a, b}
                told.append(Pair(self._said[a], self._said[b], share))
        return told

    def _sketch(self, words: list[str]) -> NDArray[np.uint32]:
        runs = {crc32(" ".join(words[at : at + RUN]).encode("utf-8", "replace")) for at in range(len(words) - RUN + 1)}
        hashes = np.fromiter(runs, dtype=np.uint64, count=len(runs))
        mixed = hashes[:, None] * self._factors[None] + self._offsets[None]  # modulo 2^64; the upper half is well mixed
        smallest: NDArray[np.uint64] = (mixed >> np.uint64(32)).min(axis=0)
        return smallest.astype(np.uint32)


def _compared(sketches: NDArray[np.uint32]) -> dict[tuple[int, int], float]:
    """The share of equal values of every pair that agrees in a whole band."""
    shares: dict[tuple[int, int], float] = {}
    for band in range(BANDS):
        part = np.ascontiguousarray(sketches[:, band * ROWS : (band + 1) * ROWS]).view(np.dtype((np.void, 4 * ROWS))).ravel()
        order = np.argsort(part, kind="stable")
        edges = np.flatnonzero(part[order][1:] != part[order][:-1]) + 1
        for group in np.split(order, edges):
            if len(group) > 1:
                group = group[:CROWD].tolist()
                for number, a in enumerate(group):
                    for b in group[number + 1 :]:
                        if (a, b) not in shares:
                            shares[a, b] = float((sketches[a] == sketches[b]).mean())
    return shares
