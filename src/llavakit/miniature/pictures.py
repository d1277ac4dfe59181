"""Scenes as pixels in memory: every picture is drawn, and prepared exactly as a photograph would be (padded, resized).

``Gallery`` holds scenes and their 8-bit pixels (37 KB a picture at 112 x 112); drawing is spread over processes.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavakit.scenes.draw import draw
from llavakit.scenes.world import Scene, Split, make_scene, scenes

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
FILL = (122, 116, 104)  # the mean colour (spec 2.2)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Scenes and their pixels: ``pixels`` is N.3.S.S uint8."""

    scenes: tuple[Scene, ...]
    pixels: NDArray[np.uint8]

    def views(self, indices: Any) -> NDArray[np.float32]:
        """Normalised views B.3.S.S float32 of some pictures."""
        batch = self.pixels[indices].astype(np.float32) / 255.0
        normal: NDArray[np.float32] = (batch - MEAN[:, None, None]) / STD[:, None, None]
        return normal


def gallery(split: Split, count: int, *, size: int, start: int = 0, workers: int = 2, squashed: bool = False) -> Gallery:
    """``count`` scenes of a split, drawn and prepared at ``size`` pixels: padded, or ``squashed`` every second one."""
    chosen = tuple(itertools.islice(scenes(split, start=start), count))
    seeds = [scene.seed for scene in chosen]
    chunks = [(seeds[at : at + 500], size, squashed) for at in range(0, count, 500)]
    if workers > 1 and len(chunks) > 1:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_prepare, chunks))
    else:
        parts = [_prepare(chunk) for chunk in chunks]
    return Gallery(scenes=chosen, pixels=np.concatenate(parts))


def _prepare(job: tuple[list[int], int, bool]) -> NDArray[np.uint8]:
    seeds, size, squashed = job
    out = np.empty((len(seeds), 3, size, size), dtype=np.uint8)
    for row, seed in enumerate(seeds):
        out[row] = _pixels(make_scene(seed), size, squash=squashed and row % 2 == 1)
    return out


def _pixels(scene: Scene, size: int, *, squash: bool) -> NDArray[np.uint8]:
    from PIL import Image

    picture = draw(scene)
    if squash:
        return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    side = max(picture.size)
    square = Image.new("RGB", (side, side), FILL)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(small).transpose(2, 0, 1)
