"""What one reply has read: its keys and values, all layers in one buffer that is its own.

    buffer    [ layers, 2, H, capacity, D ]        2: keys, values
                              |<-- length -->|<-- spare -->|

Nothing is shared, padded or moved when others come and go. A single row reads the spare room too (see ``model/cache.py``), whose positions
get no weight. On a CPU spare pages that were never written to take no memory and are read from the cache, so there is enough of it for a
reply and the next question: copying a memory into fresh pages takes longer than reading a question. On a GPU it is a sixteenth. What a
reply may become at most is known when it begins, and counted then (``most``), so growing never meets a full machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llavakit.model.heap import own_pages

_ROUND = 64  # positions
_SPARE_SHARE = {"cpu": 4}  # of what is needed; elsewhere a sixteenth
_SPARE_LEAST = {"cpu": 256}  # positions


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a position takes."""

    layers: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def position_bytes(self) -> int:
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize

    def bytes_for(self, positions: int) -> int:
        """Of a memory that holds so many."""
        return rounded(positions) * self.position_bytes

    def positions_in(self, nbytes: int) -> int:
        """How many fit."""
        fits = nbytes // self.position_bytes
        step = _step(fits)
        return fits // step * step


def rounded(positions: int) -> int:
    """Up to one of few sizes, a sixteenth to an eighth apart: for every shape that it meets oneDNN compiles a product and keeps it."""
    step = _step(positions)
    return -(-positions // step) * step


def _step(positions: int) -> int:
    return max(_ROUND, 1 << max(0, (positions - 1).bit_length() - 4))


class Memory:
    """``length`` positions read, room for ``most``."""

    def __init__(self, shape: Shape, *, most: int, now: int = 0) -> None:
        """now: positions that room is made for at once, a prompt's."""
        self.shape = shape
        self.length = 0
        self.most = rounded(most)
        self._reached = 0
        self._use(self._made(now))

    @property
    def nbytes(self) -> int:
        """Memory that it takes: on a CPU, pages that were written to."""
        return self.shape.bytes_for(self._reached) if self.shape.device.type == "cpu" else self._buffer.nbytes

    def make_room(self, positions: int) -> None:
        """Before a step: for so many positions in all."""
        assert positions <= self.most, f"{positions} positions where {self.most} were counted"
        if positions > self._buffer.shape[3]:
            older = self._buffer
            self._use(self._made(positions))
            self._buffer[:, :, :, : self.length] = older[:, :, :, : self.length]

    def write(self, layer: int, keys_hnd: Tensor, values_hnd: Tensor) -> None:
        """One layer's new positions, behind ``length``, which grows when all layers have written (``grow``)."""
        keys, values = self._layers[layer]
        keys[:, self.length : self.length + keys_hnd.shape[1]] = keys_hnd
        values[:, self.length : self.length + keys_hnd.shape[1]] = values_hnd

    def grow(self, positions: int) -> None:
        self.length += positions
        self._reached = max(self._reached, self.length)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values (H, capacity, D), contiguous, spare room included."""
        return self._layers[number]

    def crop(self, length: int) -> None:
        """Forget what stands behind the first ``length`` positions."""
        assert length <= self.length, f"{length} of {self.length} positions"
        self.length = length

    def lengthen(self, most: int) -> None:
        """Another reply goes on with this memory."""
        self.most = max(rounded(most), rounded(self._reached))

    def copy(self, length: int, *, most: int, now: int) -> Memory:
        """A memory that begins with the first ``length`` positions of this one."""
        assert length <= self.length, f"{length} of {self.length} positions"
        other = Memory(self.shape, most=most, now=max(now, length))
        other._buffer[:, :, :, :length] = self._buffer[:, :, :, :length]
        other.length = other._reached = length
        return other

    def _use(self, buffer: Tensor) -> None:
        self._buffer = buffer
        self._layers = [(layer[0], layer[1]) for layer in buffer]  # a step asks for each of them, of every reply

    def _made(self, positions: int) -> Tensor:
        """Zeros, because 0 * NaN would not be 0; pages of its own, because it outlives steps."""
        shape, kind = self.shape, self.shape.device.type
        spare = max(positions // _SPARE_SHARE.get(kind, 16), _SPARE_LEAST.get(kind, 1))
        capacity = rounded(positions + spare) if kind == "cpu" else min(rounded(positions + spare), self.most)
        return own_pages((shape.layers, 2, shape.heads, capacity, shape.width), shape.dtype, shape.device)
