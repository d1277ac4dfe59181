"""Means of points with their 95 % interval.

Wilson's interval, with the variance of the points in the place of p(1 - p): for right and wrong it is Wilson's own; for points between
0 and 1 (soft accuracy, ANLS) it is narrower by as much as they scatter less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llavakit.eval.benchmark import Score

_Z = 1.96


def half_width(points: Sequence[float]) -> float:
    """Half of the interval of the mean, as a share."""
    count = len(points)
    middle = math.fsum(points) / count
    variance = math.fsum((value - middle) ** 2 for value in points) / count
    return _Z / (1 + _Z * _Z / count) * math.sqrt(variance / count + _Z * _Z / (4 * count * count))


def mean(metric: str, points: Sequence[float], *, headline: bool = False) -> Score:
    """The mean of points from 0 to 1, in percent."""
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
