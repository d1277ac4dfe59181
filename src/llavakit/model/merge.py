"""From the features of views to the rows that stand in the text (spec 2.5). One picture at a time, in reading order.

    flat             base, then tile after tile
    spatial          base, then the map: tiles joined as they lie on the canvas, row by row
    spatial_unpad    base, then the map without its padding, each row closed by the learned row-end vector (``image_newline``)

Shapes: V views, P patches of a view, H width, N = sum of the grids' tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llavakit.tiling import Grid


def merge(features_vph: Tensor, grids: Sequence[Grid], newline_h: Tensor | None) -> Tensor:
    """All pictures' rows N.H, in order. ``features_vph`` holds the views of all of them; ``newline_h`` is needed where rows end."""
    assert features_vph.shape[0] == sum(grid.views for grid in grids), f"{features_vph.shape[0]} views for {grids}"
    parts = features_vph.split([grid.views for grid in grids])
    return torch.cat([rows for part, grid in zip(parts, grids, strict=True) for rows in _rows(part, grid, newline_h)])


def _rows(features_vph: Tensor, grid: Grid, newline_h: Tensor | None) -> Iterator[Tensor]:
    if grid.merge == "flat":
        yield features_vph.flatten(0, 1)
        return
    yield features_vph[0]
    ends = grid.merge == "spatial_unpad"
    assert newline_h is not None or not ends, "rows end, but there is no row-end vector"
    if grid.rows:
        tiles = features_vph[1:].unflatten(0, (grid.rows, grid.columns)).unflatten(2, (grid.view, grid.view))
        whole = tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # rows.view.columns.view.H, joined to the map
        kept = whole[grid.trim_y : whole.shape[0] - grid.trim_y, grid.trim_x : whole.shape[1] - grid.trim_x]
        if ends and newline_h is not None:
            kept = torch.cat([kept, newline_h.to(kept).expand(kept.shape[0], 1, -1)], dim=1)
        yield kept.flatten(0, 1)
    elif ends and newline_h is not None:
        yield newline_h.to(features_vph)[None]
