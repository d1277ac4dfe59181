"""Intervals by drawing again: they hold the value, shrink with more rows, know pairs, and are the same every time."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.eval.resample import bootstrap, paired, paired_ratios, ratio_of_means, spread

POINTS = st.tuples(st.integers(1, 10).map(float), st.integers(1, 10).map(float))


def test_a_ratio_of_means_is_no_mean_of_ratios() -> None:
    assert ratio_of_means([(10, 5), (2, 4)]) == 9 / 12  # the mean of ratios would be 1.25
    assert math.isnan(ratio_of_means([(0, 5)]))
    assert math.isnan(ratio_of_means([]))


@given(st.lists(POINTS, min_size=2, max_size=30), st.integers(0, 5))
def test_an_interval_lies_within_what_can_be_drawn_and_repeats(pairs: list[tuple[float, float]], seed: int) -> None:
    found = bootstrap(pairs, ratio_of_means, draws=50, seed=seed)
    ratios = [b / a for a, b in pairs]
    assert min(ratios) - 1e-9 <= found.low <= found.high <= max(ratios) + 1e-9
    assert found == bootstrap(pairs, ratio_of_means, draws=50, seed=seed)


def test_one_row_tells_nothing_about_itself() -> None:
    found = bootstrap([3.0], statistics.fmean)
    assert found.value == 3
    assert found.half_width is None


def test_the_width_is_that_of_the_textbook() -> None:
    """The mean of n draws from a known distribution: 1.96 sd / sqrt(n), within what 2000 draws can tell."""
    rng = random.Random(7)
    rows = [rng.gauss(50, 10) for _ in range(400)]
    found = bootstrap(rows, statistics.fmean)
    assert found.half_width == pytest.approx(1.96 * statistics.pstdev(rows) / 20, rel=0.08)


def test_about_ninety_five_intervals_of_a_hundred_hold_the_truth() -> None:
    rng = random.Random(3)
    held = 0
    for number in range(200):
        pairs = [(rng.uniform(6, 10), rng.uniform(3, 9)) for _ in range(60)]
        found = bootstrap(pairs, ratio_of_means, draws=200, seed=number)
        held += found.low <= 6 / 8 <= found.high
    assert 178 <= held <= 199


def test_pairs_cancel_what_both_share() -> None:
    rng = random.Random(5)
    before = [rng.uniform(0, 100) for _ in range(100)]
    after = [value + rng.uniform(0.5, 1.5) for value in before]
    found = paired(before, after)
    assert 0.85 < found.low < found.value < found.high < 1.15  # 1.96 * 0.29 / 10 to both sides, where alone they differ by tens
    assert found.value == pytest.approx(statistics.fmean(after) - statistics.fmean(before))
    turned = paired(after, before)
    assert turned.value == pytest.approx(-found.value)


def test_paired_ratios_of_one_and_the_same_candidate_differ_by_nothing() -> None:
    pairs = [(8.0, 6.0), (9.0, 3.0), (7.0, 8.0)]
    found = paired_ratios(pairs, pairs)
    assert (found.value, found.low, found.high) == (0, 0, 0)
    better = paired_ratios(pairs, [(a, b + 1) for a, b in pairs])
    assert better.value == pytest.approx(3 / 24)
    assert better.low > 0


def test_draws_without_a_number_are_left_out() -> None:
    found = bootstrap([(0.0, 1.0), (2.0, 1.0)], ratio_of_means)
    assert found.value == 1
    assert found.low == 0.5
    assert found.high == 1  # 1 : 1 is drawn half of the time, 0 : 2 is no number
    assert bootstrap([(0.0, 1.0)] * 3, ratio_of_means).half_width is None


def test_repeated_runs() -> None:
    assert spread([66.0, 67.0, 68.0]) == spread([66.0, 67.0, 68.0])
    assert spread([66.0, 67.0, 68.0]).mean == 67
    assert spread([66.0, 67.0, 68.0]).sd == 1  # of n - 1
    assert spread([66.0]).sd is None


def test_lists_of_different_length_are_our_own_mistake() -> None:
    with pytest.raises(ValueError):
        paired([1.0], [1.0, 2.0])
