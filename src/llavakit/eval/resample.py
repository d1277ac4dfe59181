"""How sure a number is: draw the same questions again and again with replacement, and see how far the number moves.

    rows  r1 r2 r3 r4 r5        the number of these rows is the value
          r2 r2 r5 r1 r3        the numbers of many such draws, sorted, hold the interval:
          r4 r1 r1 r5 r5                 2.5 %  |----------------------|  97.5 %
          ...

Draws come from a seed, so an interval is the same on every machine. It tells what other questions of the same kind would do; it knows
nothing of another decoding or another judge, for which ``spread`` sums up repeated runs.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

DRAWS = 2000
Row = TypeVar("Row")
Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and the interval it lies in; ``low`` and ``high`` are NaN where the rows cannot tell (fewer than two)."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float | None:
        """Half of the interval's length, None where there is none."""
        return None if math.isnan(self.high - self.low) else (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated runs: their mean and standard deviation (n - 1; None of a single run)."""

    mean: float
    sd: float | None
    values: tuple[float, ...]


def bootstrap(
    rows: Sequence[Row], statistic: Callable[[Sequence[Row]], float], *, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """``statistic`` of the rows and its percentile interval. Draws where it is not a number (0 / 0) are left out."""
    assert rows
    assert 0 < level < 1
    rng, value = random.Random(seed), statistic(rows)
    if len(rows) < 2:
        return Interval(value=value, low=math.nan, high=math.nan)
    drawn = (statistic(rng.choices(rows, k=len(rows))) for _ in range(draws))
    found = sorted(number for number in drawn if math.isfinite(number))
    if not found:
        return Interval(value=value, low=math.nan, high=math.nan)
    return Interval(value=value, low=_quantile(found, (1 - level) / 2), high=_quantile(found, (1 + level) / 2))


def ratio_of_means(pairs: Sequence[Pair]) -> float:
    """Mean of the seconds over mean of the firsts; NaN where the firsts are nothing."""
    below = math.fsum(first for first, _ in pairs)
    return math.fsum(second for _, second in pairs) / below if below else math.nan


def paired(before: Sequence[float], after: Sequence[float], *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean difference ``after - before`` of the same questions, seeds or runs: pairs are drawn, so what both share cancels."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return bootstrap(differences, statistics.fmean, draws=draws, seed=seed, level=level)


def paired_ratios(before: Sequence[Pair], after: Sequence[Pair], *, draws: int = DRAWS, seed: int = 0, level: float = 0.95) -> Interval:
    """The difference of two ratios of means over the same questions."""
    rows = list(zip(before, after, strict=True))

    def difference(drawn: Sequence[tuple[Pair, Pair]]) -> float:
        return ratio_of_means([b for _, b in drawn]) - ratio_of_means([a for a, _ in drawn])

    return bootstrap(rows, difference, draws=draws, seed=seed, level=level)


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of repeated runs."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.fmean(values), sd=sd, values=tuple(values))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
