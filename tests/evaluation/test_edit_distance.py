"""The edit distance is that of the classic table, and a distance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llavakit.eval.edit_distance import distance

few = st.text(alphabet="abéß☃\U0001f600", max_size=70)


def table(first: str, second: str) -> int:
    """Row by row."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@given(few, few)
def test_it_is_that_of_the_classic_table(first: str, second: str) -> None:
    assert distance(first, second) == table(first, second)


@given(few, few, few)
def test_it_is_a_distance(a: str, b: str, c: str) -> None:
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c)
    assert abs(len(a) - len(b)) <= distance(a, b) <= max(len(a), len(b))
