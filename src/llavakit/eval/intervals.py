"""Intervals where ``shares`` has none: of a share that another number follows from, of points without a bound, of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llavakit.eval.benchmark import Score

_Z = 1.96


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share, from 0 to 1."""
    share, n, z = right / total, total, _Z
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(metric: str, right: int, total: int, *, headline: bool = False) -> Score:
    """So many of so many, in percent. None of none is 0."""
    if not total:
        return Score(metric=metric, value=0.0, count=0, headline=headline)
    low, high = wilson(right, total)
    return Score(metric=metric, value=100 * right / total, count=total, half_width=50 * (high - low), headline=headline)


def of_mean(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by its standard error; None where fewer than two values stand."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return _Z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def of_sum(halves: Sequence[float | None]) -> float | None:
    """Of a sum of independent numbers; None where one of them has none."""
    known = [half for half in halves if half is not None]
    return math.hypot(*known) if len(known) == len(halves) else None
