"""How many tokens a picture takes (spec 2.7)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavakit.tiling import Grid


@pytest.mark.parametrize(("size", "patch", "tokens"), [(336, 14, 576), (224, 14, 256), (112, 14, 64), (56, 14, 16), (30, 14, 4)])
def test_known_counts(size: int, patch: int, tokens: int) -> None:
    assert Grid.single(size, patch).tokens == tokens
    assert Grid.single(size, patch, class_token=True).tokens == tokens + 1
    assert Grid.single(size, patch).views == 1


@given(size=st.integers(1, 2000), patch=st.integers(1, 32))
def test_tokens_are_the_whole_patches(size: int, patch: int) -> None:
    if size >= patch:
        assert Grid.single(size, patch).tokens == len(range(patch, size + 1, patch)) ** 2


def test_the_default_is_the_released_model() -> None:
    assert Grid.single() == Grid(view=24)


def test_equal_grids_are_one_key() -> None:
    assert len({Grid.single(336, 14), Grid(view=24), Grid(view=24, class_token=True)}) == 2
