"""Every image size from 28 to 1400 squared: our grids against the specification's formulas, written here a second time, with numpy.

    python dev/enumerate_grids.py [--step 1]        (about two minutes; 1.9 million sizes, both arithmetics)

The formulas are those of spec 2.3 (selection), 2.5 (unpad) and 2.6 (counts); canvases are the released five. A sample of the same is
in tests/test_tiling.py. transformers' own count is asked for every 97th size.
"""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from llavakit.tiling import RELEASED, Arithmetic, Tiling, tiles_of

SIDE, VIEW = 336, 24
Ints = NDArray[np.int64]


def counts(widths: Ints, height: int, arithmetic: Arithmetic) -> tuple[Ints, Ints]:
    """(canvas' number, image tokens) for all widths at one height, as the specification says; transformers reads pairs as (h, w)."""
    canvases = tiles_of(RELEASED, SIDE)
    best_shown, best_waste = np.full(len(widths), -1), np.zeros(len(widths), dtype=np.int64)
    chosen = np.zeros(len(widths), dtype=np.int64)
    for number, (across, down) in enumerate(canvases):
        scale = np.minimum(across / widths, down / height)
        shown = np.minimum((widths * scale).astype(np.int64) * (height * scale).astype(np.int64), widths * height)
        waste = across * down - shown
        better = (shown > best_shown) | ((shown == best_shown) & (waste < best_waste))
        chosen = np.where(better, number, chosen)
        best_shown, best_waste = np.where(better, shown, best_shown), np.where(better, waste, best_waste)
    table = np.array(canvases)[chosen]
    across, down = table[:, 0] // SIDE * VIEW, table[:, 1] // SIDE * VIEW
    digits = (lambda x: x) if arithmetic == "original" else (lambda x: np.round(x, 7))
    wide = widths / height > across / down
    rows = digits(height * (across / widths)).astype(np.int64)
    columns = digits(widths * (down / height)).astype(np.int64)
    kept_rows = np.where(wide, down - 2 * ((down - rows) // 2), down)
    kept_columns = np.where(wide, across, across - 2 * ((across - columns) // 2))
    return chosen, VIEW * VIEW + kept_rows * (kept_columns + 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=1)
    sizes = np.arange(28, 1401, parser.parse_args().step)
    names: tuple[Arithmetic, ...] = ("original", "transformers")
    rules = {name: Tiling(side=SIDE, canvases=tiles_of(RELEASED, SIDE), merge="spatial_unpad", arithmetic=name) for name in names}
    wrong, differ, seen, asked, unlike = 0, 0, 0, 0, 0
    theirs = _transformers()
    for height in sizes.tolist():
        found = {}
        for name, rule in rules.items():
            chosen, tokens = counts(sizes, height, name)
            canvases = np.array(rule.canvases)[chosen]
            found[name] = tokens
            for width, canvas, expected in zip(sizes.tolist(), canvases.tolist(), tokens.tolist(), strict=True):
                grid = rule.grid(width, height)
                wrong += grid.tokens != expected or list(rule.canvas(width, height) or ()) != canvas
                seen += 1
        differ += int((found["original"] != found["transformers"]).sum())
        for width in sizes[height % 97 :: 97].tolist():
            asked += 1
            unlike += (
                theirs(width, height)
                != Tiling(side=SIDE, canvases=tuple((h, w) for w, h in tiles_of(RELEASED, SIDE)), merge="spatial_unpad")
                .grid(width, height)
                .tokens
            )
    print(f"{seen:,} grids, {wrong} unlike the specification; the two arithmetics differ at {differ} sizes")
    print(f"{asked:,} sizes asked of transformers, {unlike} unlike")
    return int(wrong or unlike)


def _transformers():  # type: ignore[no-untyped-def]
    """transformers' own count of an image's features, its canvases read as (height, width)."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[list(pair) for pair in tiles_of(RELEASED, SIDE)]),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=0,
    )  # fmt: skip
    for name in ("_get_unpadded_features",):
        setattr(processor, name, getattr(LlavaNextProcessor, name).__get__(processor))
    return lambda width, height: LlavaNextProcessor._get_number_of_features(processor, height, width, SIDE, SIDE)


if __name__ == "__main__":
    sys.exit(main())
