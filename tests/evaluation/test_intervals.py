"""Shares, means and sums with their intervals."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.eval.intervals import Z, all_and_groups, by_group, half_width, mean, of_sum, share, wilson

points = st.lists(st.floats(0, 1), min_size=1, max_size=30)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_for_right_and_wrong_it_is_wilsons_interval(right: list[bool]) -> None:
    """Its ends are the roots of (share - p)^2 = z^2 p (1 - p) / n."""
    n, share, z = len(right), sum(right) / len(right), Z
    a, b, c = 1 + z * z / n, -(2 * share + z * z / n), share * share
    assert half_width([float(one) for one in right]) == pytest.approx(math.sqrt(b * b - 4 * a * c) / a / 2)


@given(points)
def test_soft_points_scatter_less(soft: list[float]) -> None:
    n, share, z = len(soft), sum(soft) / len(soft), Z
    hard = z / (1 + z * z / n) * math.sqrt(max(0.0, share * (1 - share)) / n + z * z / (4 * n * n))
    assert 0 < half_width(soft) <= hard + 1e-9


def test_scores_are_percent_and_only_one_is_the_headline() -> None:
    assert (mean("x", [1, 0, 0.5, 0.5]).value, mean("x", [1.0]).count) == (50, 1)
    made = all_and_groups("accuracy", [1.0, 0.0, 1.0], ["b", "a", "b"])
    assert [(one.metric, one.value, one.count, one.headline) for one in made] == [
        ("accuracy", pytest.approx(200 / 3), 3, True),
        ("accuracy/a", 0, 1, False),
        ("accuracy/b", 100, 2, False),
    ]
    assert [one.metric for one in all_and_groups("accuracy", [1.0], ["only"])] == ["accuracy"]
    assert by_group([]) == []


@given(st.lists(st.booleans(), max_size=60))
def test_a_share_is_the_mean_of_right_and_wrong(right: list[bool]) -> None:
    counted, told = share("x", sum(right), len(right)), mean("x", right)
    assert (counted.value, counted.count) == (told.value, told.count)
    assert counted.half_width == (pytest.approx(told.half_width) if right else None)
    if right:
        low, high = wilson(sum(right), len(right))
        assert 0 <= low <= counted.value / 100 + 1e-9
        assert counted.value / 100 - 1e-9 <= high <= 1
        assert 50 * (high - low) == pytest.approx(counted.half_width)


def test_a_sum_is_as_sure_as_its_parts_together() -> None:
    assert of_sum([3.0, 4.0]) == 5
    assert of_sum([3.0, None]) is None
