"""Merging features: which feature stands where, and equality with transformers' own packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.model.merge import merge
from llavakit.tiling import BLOG, HD, RELEASED, Grid, Tiling, tiles_of

NEWLINE = torch.tensor([-1.0])


def numbered(grid: Grid) -> torch.Tensor:
    """Features that say where they are: view * 10000 + row * 100 + column."""
    place = torch.arange(grid.view)
    square = (100 * place[:, None] + place[None]).flatten()
    return (10_000 * torch.arange(grid.views)[:, None] + square)[..., None].float()


def test_by_hand() -> None:
    grid = Grid(view=2, columns=2, rows=1, merge="spatial_unpad", trim_x=1)
    base = [0, 1, 100, 101]
    first_row, second_row = [10001, 20000, -1], [10101, 20100, -1]  # the outer columns are padding
    assert merge(numbered(grid), [grid], NEWLINE).flatten().tolist() == [*base, *first_row, *second_row]
    spatial = Grid(view=2, columns=2, rows=1, merge="spatial")
    assert merge(numbered(spatial), [spatial], None).flatten().tolist() == [
        *base, 10000, 10001, 20000, 20001, 10100, 10101, 20100, 20101,
    ]  # fmt: skip
    flat = Grid(view=2, columns=2, rows=1, merge="flat")
    assert merge(numbered(flat), [flat], None).flatten().tolist() == numbered(flat).flatten().tolist()
    alone = Grid(view=2, merge="spatial_unpad")
    assert merge(numbered(alone), [alone], NEWLINE).flatten().tolist() == [*base, -1]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=4),
    shapes=st.sampled_from([RELEASED, BLOG, HD]),
    kind=st.sampled_from(["flat", "spatial", "spatial_unpad"]),
)
@settings(max_examples=80, deadline=None)
def test_a_grid_counts_what_merging_gives(sizes: list[tuple[int, int]], shapes: tuple[tuple[int, int], ...], kind: str) -> None:
    tiling = Tiling(side=56, canvases=tiles_of(shapes, 56), merge=kind)  # type: ignore[arg-type]
    grids = [tiling.grid(*size) for size in sizes]
    features = torch.cat([numbered(grid) for grid in grids])
    rows = merge(features, grids, NEWLINE)
    assert rows.shape == (sum(grid.tokens for grid in grids), 1)
    assert int((rows == -1).sum()) == sum(grid.row_ends for grid in grids)


@pytest.mark.parametrize("size", [(100, 67), (67, 100), (300, 40), (40, 300), (56, 56), (500, 5), (5, 500)])
def test_transformers_packs_the_same(size: tuple[int, int]) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel

    points = [[rows * 28, columns * 28] for columns, rows in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))]  # (height, width)
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14)
    text = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("meta"):
        model = LlavaNextModel(LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=points))
    tiling = Tiling(side=28, canvases=tuple((width, height) for height, width in points), merge="spatial_unpad")
    grid = tiling.grid(*size)
    features, newline = torch.randn(grid.views, 4, 8), torch.randn(8)
    packed, _ = model.pack_image_features([features], torch.tensor([[size[1], size[0]]]), "default", image_newline=newline)
    assert torch.equal(merge(features, [grid], newline), packed[0])
