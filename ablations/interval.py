"""How sure a difference is: paired over seeds and questions, without drawing random numbers.

                 question 1   question 2   ...
    seed 0          d             d                 d: points of one arm minus points of the other,
    seed 1          d             d                    same question, same seed
                                                    -> mean of all, and how it would move with other seeds and other questions

Seeds and questions are crossed: every seed is asked the same. The variance of the mean is that of the seeds' means over S plus that of the
questions' means over Q; the noise of single answers stands in both, so the interval is rather too wide than too narrow. The factor is
Student's, with the degrees of freedom of Welch and Satterthwaite: near S - 1 where seeds differ most, large where questions do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    half_width: float
    seeds: int
    questions: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def interval(rows: Sequence[Sequence[float]]) -> Interval:
    """Of differences ``rows[seed][question]``. One seed: other seeds are not spoken for."""
    seeds, questions = len(rows), len(rows[0])
    assert all(len(row) == questions for row in rows), "every seed is asked the same questions"
    by_seed = [statistics.fmean(row) for row in rows]
    by_question = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    parts = [_of_mean(means) for means in (by_seed, by_question)]
    variance = sum(parts)
    half = 0.0
    if variance > 0:
        shares = zip(parts, (by_seed, by_question), strict=True)
        spread = sum((part / variance) ** 2 / (len(means) - 1) for part, means in shares if len(means) > 1)
        half = student(1 / spread) * math.sqrt(variance)
    return Interval(mean=statistics.fmean(by_seed), half_width=half, seeds=seeds, questions=questions)


def _of_mean(values: Sequence[float]) -> float:
    """The variance of the mean of some values, 0 for a single one."""
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


def student(freedom: float, share: float = 0.95) -> float:
    """Between minus and plus this lies ``share`` of Student's distribution."""
    low, high = 0.0, 1000.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < share else (low, middle)
    return high


def _inside(x: float, freedom: float, steps: int = 400) -> float:
    """The share of Student's distribution between -x and x: Simpson's rule over the angle, where the density is a power of a cosine."""
    end = math.atan(x / math.sqrt(freedom))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    width = end / steps
    weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
    total = sum(weight * math.pow(math.cos(i * width), freedom - 1) for i, weight in enumerate(weights))
    return 2 * math.exp(log_scale) * total * width / 3
