"""Where memory lies: ``keep_memory()`` for what is made anew every step, ``own_pages()`` for what stays a while among such things.

A step frees gigabytes of activations that the next step asks for again. glibc gives every large block back to the kernel at once and gets
it back as pages of zeros, 4 KiB at a time, each by a fault: half of the time of a training step on two cores went there (dev/LOG.md).
Kept in the heap, the same bytes are used again. What a process holds at its fullest moment stays about the same; between steps it no
longer falls.

What lives longer than a step and shorter than the process (a server's memories of replies) must not lie in that heap: between blocks that
stay, the room of those that went is hardly ever of use, and the heap grows for hours. Such blocks get pages of their own from the kernel,
zero and untouched, and give them back exactly.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt's own numbers (malloc.h)
_NEVER, _GROWTH = -1, 64 * 2**20


def keep_memory() -> bool:
    """Tell glibc to keep what is freed, for the rest of the process; False where there is no glibc (macOS, Windows, musl)."""
    libc = _glibc()
    if libc is None:
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROWTH))
    return bool(min(libc.mallopt(name, value) for name, value in settings))


def give_back() -> bool:
    """Give all free memory back to the kernel, now; False where there is no glibc."""
    libc = _glibc()
    return libc is not None and libc.malloc_trim(0) == 1


def own_pages(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on a CPU in pages of its own, which take memory when they are first written to."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(*shape, dtype=dtype, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if sys.platform != "win32" else {}
    return torch.frombuffer(mmap.mmap(-1, size, **private), dtype=dtype).view(*shape)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
