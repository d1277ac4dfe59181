"""How a picture is cut and how many tokens it takes: the tables of spec 2.6 to 2.9, and transformers' own arithmetic beside ours."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from llavakit.errors import CheckpointError
from llavakit.tiling import BLOG, HD, RELEASED, Grid, Tiling, pinpoints, placed, tiles_of

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
ORIGINAL = Tiling(side=336, canvases=pinpoints(PINPOINTS, side=336, height_first=False), merge="spatial_unpad", arithmetic="original")
HF = Tiling(side=336, canvases=pinpoints(PINPOINTS, side=336, height_first=True), merge="spatial_unpad")

sides = st.integers(1, 1400)


@pytest.mark.parametrize(("size", "patch", "tokens"), [(336, 14, 576), (224, 14, 256), (112, 14, 64), (56, 14, 16), (30, 14, 4)])
def test_known_counts(size: int, patch: int, tokens: int) -> None:
    assert Grid.single(size, patch).tokens == Tiling(side=size, patch=patch).grid(640, 480).tokens == tokens
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


@pytest.mark.parametrize(
    ("columns", "rows", "views", "flat", "whole"),
    [
        (1, 2, 3, 1728, 1776), (2, 1, 3, 1728, 1752), (2, 2, 5, 2880, 2928), (3, 1, 4, 2304, 2328), (1, 3, 4, 2304, 2376),
        (4, 1, 5, 2880, 2904), (1, 4, 5, 2880, 2976),
    ],
)  # fmt: skip
def test_counts_without_padding(columns: int, rows: int, views: int, flat: int, whole: int) -> None:
    """Spec 2.6."""
    grid = Grid(view=24, columns=columns, rows=rows, merge="spatial_unpad")
    assert (grid.views, grid.tokens) == (views, whole)
    for merge in ("flat", "spatial"):
        assert Grid(view=24, columns=columns, rows=rows, merge=merge).tokens == flat  # type: ignore[arg-type]


def test_a_view_alone_is_closed_by_one_row_end() -> None:
    """Spec 2.5: 577 under unpad, 576 otherwise."""
    assert [Grid(view=24, merge=merge).tokens for merge in ("flat", "spatial", "spatial_unpad")] == [576, 576, 577]


@pytest.mark.parametrize(
    ("size", "canvas", "kept", "original", "hf"),
    [
        ((336, 336), (336, 672), (24, 24), 1176, 1176), ((320, 240), (336, 672), (18, 24), 1026, 1368),
        ((240, 320), (336, 672), (32, 24), 1376, 1032), ((300, 200), (336, 672), (16, 24), 976, 1464),
        ((672, 336), (672, 336), (24, 48), 1752, 1752), ((336, 672), (336, 672), (48, 24), 1776, 1776),
        ((640, 480), (672, 672), (36, 48), 2340, 2340), ((4000, 3000), (672, 672), (36, 48), 2340, 2340),
        ((480, 640), (672, 672), (48, 36), 2352, 2352), ((1000, 667), (672, 672), (32, 48), 2144, 2144),
        ((667, 1000), (672, 672), (48, 32), 2160, 2160), ((1024, 899), (672, 672), (42, 48), 2634, 2634),
        ((1920, 1080), (672, 672), (28, 48), 1948, 1948), ((1080, 1920), (672, 672), (48, 28), 1968, 1968),
        ((1700, 2200), (672, 672), (48, 38), 2448, 2448), ((1000, 1000), (672, 672), (48, 48), 2928, 2928),
        ((1008, 336), (1008, 336), (24, 72), 2328, 2328), ((900, 330), (1008, 336), (24, 66), 2184, 2184),
        ((400, 1100), (336, 1008), (66, 24), 2226, 2226), ((1344, 336), (1008, 336), (18, 72), 1890, 1890),
        ((336, 1344), (336, 1008), (72, 18), 1944, 1944), ((100, 1000), (336, 1008), (72, 8), 1224, 1224),
        ((1000, 10), (1008, 336), (0, 72), 576, 576), ((10, 1000), (336, 1008), (72, 0), 648, 648),
    ],
)  # fmt: skip
def test_worked_examples(size: tuple[int, int], canvas: tuple[int, int], kept: tuple[int, int], original: int, hf: int) -> None:
    """Spec 2.7, both formats of a checkpoint, and the shapes that leave nothing of the map (I7)."""
    grid = ORIGINAL.grid(*size)
    assert ORIGINAL.canvas(*size) == canvas
    assert (grid.kept_rows, grid.kept_columns) == kept
    assert (grid.tokens, HF.grid(*size).tokens) == (original, hf)


@given(width=sides, height=sides)
@settings(max_examples=400)
def test_the_hf_rule_is_transformers(width: int, height: int) -> None:
    down, across = select_best_resolution((height, width), PINPOINTS)
    assert HF.canvas(width, height) == (across, down)
    counter: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
    counter.patch_size = 14
    newline_and_map = counter._get_unpadded_features(height, width, 24, 24, down // 336, across // 336)
    assert HF.grid(width, height).tokens == sum(newline_and_map) + 576


def written_anew(width: int, height: int, arithmetic: str) -> int:
    """The tokens of an image, from spec 2.3 and 2.5 line by line; ``dev/enumerate_grids.py`` does it for all sizes."""
    points = [(w, h) if arithmetic == "original" else (h, w) for w, h in PINPOINTS]

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return -shown, canvas[0] * canvas[1] - shown

    across, down = (side // 14 for side in min(points, key=merit))
    whole = int if arithmetic == "original" else lambda value: int(round(value, 7))
    if width / height > across / down:
        down -= 2 * ((down - whole(height * (across / width))) // 2)
    else:
        across -= 2 * ((across - whole(width * (down / height))) // 2)
    return 576 + down * (across + 1)


@given(width=sides, height=sides)
@settings(max_examples=400)
def test_both_arithmetics_are_the_specified_formulas(width: int, height: int) -> None:
    for tiling in (ORIGINAL, HF):
        assert tiling.grid(width, height).tokens == written_anew(width, height, tiling.arithmetic)


@pytest.mark.parametrize("size", [(1, 1), (1, 1400), (1400, 1), (52_800, 44), (44, 52_800), (1, 65_535), (65_535, 1), (8192, 8192)])
@pytest.mark.parametrize("tiling", [ORIGINAL, HF, Tiling(side=224, canvases=tiles_of(HD, 224), merge="spatial_unpad")])
def test_every_shape_has_a_grid(tiling: Tiling, size: tuple[int, int]) -> None:  # I7
    grid, canvas = tiling.grid(*size), tiling.canvas(*size)
    assert canvas is not None
    assert grid.view_tokens <= grid.tokens <= grid.views * grid.view_tokens + grid.rows * grid.view
    assert min(placed(*size, canvas)[2:]) >= 1


@given(width=st.integers(28, 1400), height=st.integers(28, 1400))
@settings(max_examples=400)
def test_the_two_arithmetics_differ_by_one_rule(width: int, height: int) -> None:
    """On one canvas they differ only where the features of the padding round across an odd number (spec 2.5, 36 of all sizes)."""
    assume(width > 336 or height > 336)
    one, other = ORIGINAL.grid(width, height), HF.grid(width, height)
    assert (one.columns, one.rows) == (other.columns, other.rows)
    assert abs(one.trim_x - other.trim_x) + abs(one.trim_y - other.trim_y) <= 1


def test_known_sizes_where_the_arithmetics_differ() -> None:
    for width, height in ((88, 55), (328, 205), (205, 656)):
        canvases = tiles_of(RELEASED, 336)
        counts = {
            Tiling(side=336, canvases=canvases, merge="spatial_unpad", arithmetic=kind).grid(width, height).tokens  # type: ignore[arg-type]
            for kind in ("original", "transformers")
        }
        assert len(counts) == 2, (width, height)


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), shapes=st.sampled_from([RELEASED, BLOG, HD]))
@settings(max_examples=300)
def test_what_is_kept_covers_the_image(width: int, height: int, shapes: tuple[tuple[int, int], ...]) -> None:
    """The trimmed features are those without a pixel of the image, but for what rounding up to an even count keeps."""
    tiling = Tiling(side=224, canvases=tiles_of(shapes, 224), merge="spatial_unpad")
    grid, canvas = tiling.grid(width, height), tiling.canvas(width, height)
    assert canvas is not None
    left, top, across, down = placed(width, height, canvas)
    assert 0 <= left <= canvas[0] - across
    assert 0 <= top <= canvas[1] - down
    assert (across == canvas[0]) or (down == canvas[1])
    assert abs(grid.kept_columns * 14 - across) <= 28
    assert abs(grid.kept_rows * 14 - down) <= 28
    assert grid.tokens == 256 + grid.kept_rows * (grid.kept_columns + 1)


def test_hd_has_up_to_six_tiles() -> None:
    """Spec 2.9: its grids, its counts, and no larger grid than the image needs."""
    assert set(HD) == {(1, n) for n in range(1, 7)} | {(n, 1) for n in range(1, 7)} | {(2, 2), (2, 3), (3, 2)}
    counts = {shape: Grid(view=16, columns=shape[0], rows=shape[1], merge="spatial_unpad").tokens for shape in HD}
    wanted = {(1, 1): 528, (2, 2): 1312, (3, 2): 1824, (2, 3): 1840, (6, 1): 1808, (1, 6): 1888}
    assert wanted.items() <= counts.items()
    hd = Tiling(side=224, canvases=tiles_of(HD, 224), merge="spatial_unpad")
    assert [hd.canvas(*size) for size in ((224, 224), (448, 448), (600, 400), (100, 100))] == [
        (224, 224),
        (448, 448),
        (672, 448),
        (224, 224),
    ]


def test_pinpoints_are_read_in_every_form() -> None:
    listed = ((336, 672), (672, 336))
    assert pinpoints([[336, 672], [672, 336]], side=336, height_first=False) == listed
    assert pinpoints("[(336, 672), (672, 336)]", side=336, height_first=False) == listed
    assert pinpoints([[336, 672]], side=336, height_first=True) == ((672, 336),)
    assert pinpoints("(1x1),...,(2x2)", side=384, height_first=False) == ((384, 384), (384, 768), (768, 384), (768, 768))


@pytest.mark.parametrize("value", ["", "[", "__import__('os')", [], [[336]], [["a", 1]], [336, 672], None, [[1.5, 2]], "(1x1)", {"a": 1}])
def test_what_is_no_list_of_canvases_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        pinpoints(value, side=336, height_first=False)
    assert caught.value.code == "bad_pinpoints"


@pytest.mark.parametrize("canvas", [(0, 336), (335, 336), (336, 337), (336 * 1000, 336 * 1000)])
def test_a_canvas_is_whole_tiles_of_a_bounded_number(canvas: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError):
        Tiling(side=336, canvases=(canvas,))
