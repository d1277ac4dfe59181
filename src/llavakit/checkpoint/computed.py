"""Weights that stand in no file but follow from some: each is a ``Stored`` like any other, computed when it is read.

    grown      more rows, drawn close around the mean of the old ones: a token of the mean logit is never the likeliest
    replaced   some rows exchanged
    merged     W + scale * B A         one LoRA adapter
    summed     base + delta            rows that the base lacks come from the delta

All arithmetic is in fp32. The sum of two fp16 (or bf16) numbers, taken in fp32 and rounded, is their sum correctly rounded, just as tools
that add in fp16 have it, because fp32 has more than twice the digits and two more (24 >= 2 * 11 + 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llavakit.checkpoint.files import Stored, value_of

_SPREAD = 1e-5  # spec 1.6


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A tensor by what computes it. ``file`` is where its first part stands."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    compute: Callable[[], Tensor]

    def pieces(self, target: Tensor) -> Iterator[Tensor]:
        """As ``files.FileTensor.pieces``, in one piece."""
        yield target.copy_(self.compute()).view(-1)


def grown(table: Stored, rows: int) -> Stored:
    """A table of so many rows, the new ones drawn as llava-hf has them: around the mean, with 1e-5 of the old ones' covariance.

    Drawn as weighted sums of the old rows, which have that covariance without it ever being computed; with the same weights each time.
    """

    def compute() -> Tensor:
        count = table.shape[0]
        whole = torch.empty(rows, *table.shape[1:])
        for _ in table.pieces(whole[:count]):
            pass
        old, mean = whole[:count], whole[:count].mean(dim=0)
        drawn = torch.randn(rows - count, count, generator=torch.Generator().manual_seed(0))
        whole[count:] = mean + (_SPREAD / count) ** 0.5 * (drawn @ old - drawn.sum(dim=1, keepdim=True) * mean)
        return whole

    return _like(table, compute, shape=(rows, *table.shape[1:]))


def replaced(table: Stored, last: Stored, rows: Sequence[int]) -> Stored:
    """A table some of whose rows are the last ones of another."""

    def compute() -> Tensor:
        whole = value_of(table)
        whole[list(rows)] = value_of(last)[-len(rows) :]
        return whole

    return _like(table, compute)


def merged(weight: Stored, *, down: Stored, up: Stored, scale: float) -> Stored:
    """A matrix (out x in) with the change by ``up`` (B, out x rank) and ``down`` (A, rank x in)."""
    return _like(weight, lambda: value_of(weight).addmm_(value_of(up), value_of(down), alpha=scale))


def summed(base: Stored, delta: Stored, *, dtype: torch.dtype | None) -> Stored:
    """A weight from its difference to a base's, in the base's type unless ``dtype`` is given: the difference's own may be finer."""

    def compute() -> Tensor:
        whole, old = value_of(delta), value_of(base)
        shared = min(len(whole), len(old))
        whole[:shared] += old[:shared]
        return whole

    return replace(_like(base, compute, shape=delta.shape), dtype=dtype or base.dtype)


def _like(stored: Stored, compute: Callable[[], Tensor], *, shape: tuple[int, ...] | None = None) -> Computed:
    return Computed(name=stored.name, shape=shape or stored.shape, dtype=stored.dtype, file=stored.file, compute=compute)
