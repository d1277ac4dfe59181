"""Timing two sides fairly: they take turns, so that whatever else the machine does meets both; medians, and how far runs lie apart."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[int], float]  # number of the round -> seconds, measured inside so that preparation is not counted


@dataclass(frozen=True)
class Times:
    """Seconds of one side, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def most(self) -> float:
        return max(self.seconds)


def take_turns(sides: Mapping[str, Run], rounds: int, *, warm: int = 1, after: Callable[[], None] | None = None) -> dict[str, Times]:
    """Run every side once a round, each round in the opposite order; ``warm`` rounds are not counted. ``after`` looks at each round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warm + rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            gc.collect()
            spent = sides[name](number)
            if number >= warm:
                seconds[name].append(spent)
        if after is not None:
            after()
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def faster(theirs: Times, ours: Times) -> Times:
    """How many times faster we were, round by round."""
    return Times(tuple(a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine can do at best: bytes read a second, bfloat16 operations a second."""

    read: float
    multiply: float


def ceilings(megabytes: int = 1024, side: int = 2048) -> Ceilings:
    """Measured with torch on this machine: the maximum of a large buffer, and a square product whose weight is already re-laid."""
    buffer = torch.ones(megabytes << 17, dtype=torch.int64)
    left, right = torch.randn(side, side, dtype=torch.bfloat16), torch.randn(side, side, dtype=torch.bfloat16)
    relaid = torch.ops.mkldnn._reorder_linear_weight(right, side)

    def product() -> object:
        return torch.ops.mkldnn._linear_pointwise(left, relaid, None, "none", [], "")

    with torch.inference_mode():
        read = best(buffer.max)
        multiply = min(best(product), best(lambda: left @ right))
    return Ceilings(read=buffer.nbytes / read, multiply=2 * side**3 / multiply)


def best(run: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of some runs."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


class Peak(TorchDispatchMode):
    """The most bytes that live at a time in torch's tensors, of those made inside, and the seconds do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen.update(_storages((args, kwargs)))
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor) and not value.is_meta]
