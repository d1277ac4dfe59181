"""How sure a number is, in closed form: half of its 95 % interval.

    points from 0 to 1   Wilson's interval, with the variance of the points in the place of p (1 - p): for right and wrong it is Wilson's
                         own; for points between (soft accuracy, ANLS) it is narrower by as much as they scatter less
    points of any size   the standard error of their mean (MME: 0 to 200 a picture)
    sums                 of independent numbers: the root of the sum of squares

Ratios of means and whatever else has no such form: ``resample``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llavakit.eval.benchmark import Score

Z = 1.96


def half_width(points: Sequence[float]) -> float:
    """Half of the interval of the mean of points from 0 to 1."""
    count = len(points)
    middle = math.fsum(points) / count
    return _half(math.fsum((value - middle) ** 2 for value in points) / count, count)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The ends of the interval of a share, from 0 to 1."""
    share = right / total
    middle, half = (share + Z * Z / (2 * total)) / (1 + Z * Z / total), _half(share * (1 - share), total)
    return max(0.0, middle - half), min(1.0, middle + half)


def _half(variance: float, count: int) -> float:
    return Z / (1 + Z * Z / count) * math.sqrt(variance / count + Z * Z / (4 * count * count))


def of_mean(values: Sequence[float]) -> float | None:
    """Of a mean of points of any size; None where fewer than two stand."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return Z * math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def of_sum(halves: Sequence[float | None]) -> float | None:
    """Of a sum of independent numbers; None where one of them has none."""
    known = [half for half in halves if half is not None]
    return math.hypot(*known) if len(known) == len(halves) else None


# --- scores with their interval -------------------------------------------------------------------------------------------------------


def percent(right: int, total: int) -> float:
    """None of none is 0."""
    return 100 * right / total if total else 0.0


def share(metric: str, right: int, total: int, *, headline: bool = False) -> Score:
    """So many of so many, in percent."""
    half = 100 * _half(right / total * (1 - right / total), total) if total else None
    return Score(metric=metric, value=percent(right, total), count=total, half_width=half, headline=headline)


def mean(metric: str, points: Sequence[float], *, headline: bool = False) -> Score:
    """The mean of points from 0 to 1, in percent; of none it is 0."""
    if not points:
        return Score(metric=metric, value=0.0, count=0, headline=headline)
    value = 100 * math.fsum(points) / len(points)
    return Score(metric=metric, value=value, count=len(points), half_width=100 * half_width(points), headline=headline)


def by_group(named: Iterable[tuple[str, float]], *, prefix: str = "") -> list[Score]:
    """One mean for each name, in the order of the names."""
    groups: dict[str, list[float]] = {}
    for name, value in named:
        groups.setdefault(name, []).append(value)
    return [mean(prefix + name, groups[name]) for name in sorted(groups)]


def all_and_groups(metric: str, points: Sequence[float], groups: Sequence[str]) -> list[Score]:
    """The headline, and the same by group where there is more than one."""
    scores = [mean(metric, points, headline=True)]
    if len(set(groups)) > 1:
        scores += by_group(zip(groups, points, strict=True), prefix=f"{metric}/")
    return scores
