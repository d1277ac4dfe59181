"""OpenMP's teams of threads: who computes with all cores must be the only one who gathers them, and wait awake only for moments.

    thread A --product--> its team: A + n - 1 others       as many threads as cores: they wait for the next product awake
    thread B --product--> another:  B + n - 1 others       more threads than cores: all of them sleep between two products

torch divides a product among a team, and every thread that ever asked for a large one keeps a team of its own. As soon as GNU's OpenMP
counts more threads than cores in all teams together it stops waiting awake. A decoding step is hundreds of short products; it takes twice
as long then, even while the other teams have nothing to do. So helpers compute alone, and who has loaded a model for others lets his team
go. Waiting awake has its price where another process wants the same cores: with GNU's 3 ms each of those products may cost so much, and a
step a hundred times as long; with 20 microseconds it is two times, as it should be (dev/LOG.md, 2026-11-21).
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

_SOFT = 1  # omp_pause_soft (omp.h)
_SPINS = 2000  # some 20 microseconds: longer than the way from one product of a layer to the next


def wait_briefly() -> None:
    """Before torch is loaded, for the whole process; who has set the variable himself knows better."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPINS))


def compute_alone() -> None:
    """From now on this thread computes without a team; others are as before. Does nothing where torch's OpenMP cannot be found."""
    import torch

    torch.get_num_threads()  # torch tells every new thread once how many it may use: before, not after
    openmp = _openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(1)


def disband() -> bool:
    """Let this thread's team go; its next large product gathers another. False where that cannot be done or is not needed."""
    openmp = _openmp()
    if openmp is None or hasattr(openmp, "kmp_set_blocktime"):  # LLVM's and Intel's do not count so
        return False
    return hasattr(openmp, "omp_pause_resource_all") and openmp.omp_pause_resource_all(_SOFT) == 0


@cache
def _openmp() -> ctypes.CDLL | None:
    """Torch's library and all that it was linked with, if OpenMP is there."""
    import torch

    try:
        found = ctypes.CDLL(torch._C.__file__)
    except OSError:
        return None
    return found if hasattr(found, "omp_set_num_threads") else None
