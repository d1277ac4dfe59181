"""Close-ups: windows of drawn pictures at twice the size of a view, so that the tiny CLIP meets print at the scale of AnyRes tiles.

    picture, long side 2S        one window S x S
    +---------------------+      +----------+
    |   43     (o)        |      |   (o)    |   statements: only of the signs that lie wholly inside,
    |       +----------+  |  ->  |  [cat]   |   with their places in the window
    |  *    |  [cat]   |  |      +----------+
    +-------+----------+--+

The released CLIP has seen print of every size on the web; a tower trained on whole scenes alone has seen large print only.
"""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llavakit.miniature.pictures import Gallery
from llavakit.scenes.draw import draw
from llavakit.scenes.world import Scene, Sign, Split, make_scene, scenes, with_small_print

SIGNS = 6  # tried on each picture
ZOOM = 2  # the long side of the picture, in windows


def close_ups(split: Split, count: int, *, size: int, start: int = 0, workers: int = 2) -> Gallery:
    """``count`` windows of ``size`` pixels about the things of a split's scenes; signs in the scenes returned are those in the windows."""
    seeds = [scene.seed for scene in itertools.islice(scenes(split, start=start), count)]
    chunks = [(seeds[at : at + 500], size) for at in range(0, count, 500)]
    if workers > 1 and len(chunks) > 1:
        with ProcessPoolExecutor(workers) as pool:
            parts = list(pool.map(_prepare, chunks))
    else:
        parts = [_prepare(chunk) for chunk in chunks]
    kept = tuple(scene for seen, _ in parts for scene in seen)
    none = np.empty((0, 3, size, size), dtype=np.uint8)
    return Gallery(scenes=kept, pixels=np.concatenate([none, *(pixels for _, pixels in parts)]))


def _prepare(job: tuple[list[int], int]) -> tuple[list[Scene], NDArray[np.uint8]]:
    seeds, size = job
    seen = [close_up(make_scene(seed), size) for seed in seeds]
    return [scene for scene, _ in seen], np.stack([np.asarray(picture).transpose(2, 0, 1) for _, picture in seen])


def close_up(scene: Scene, size: int) -> tuple[Scene, Image.Image]:
    """A window of ``size`` pixels around some small print among the scene's things, and the scene that it shows (signs alone)."""
    rng = random.Random(scene.seed + 7)
    whole = with_small_print(scene, rng, SIGNS)
    picture = draw(whole)
    scale = ZOOM * size / max(picture.size)
    width, height = (max(size, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    aim = rng.choice(whole.signs) if whole.signs else None
    left, top = (
        _offset(rng, at * edge, edge, size) if at is not None else rng.randint(0, edge - size)
        for at, edge in ((aim.x if aim else None, width), (aim.y if aim else None, height))
    )
    signs = (_inside(sign, left, top, width, height, size) for sign in whole.signs)
    shown = replace(scene, width=size, height=size, things=(), overlaps=(), signs=tuple(s for s in signs if s is not None))
    return shown, picture.crop((left, top, left + size, top + size))


def _offset(rng: random.Random, centre: float, edge: int, size: int) -> int:
    """Where a window may begin along an edge so that what stands at ``centre`` lies well inside."""
    margin = size // 6
    low, high = max(0, round(centre) + margin - size), min(edge - size, round(centre) - margin)
    return rng.randint(low, high) if low <= high else min(max(0, low), edge - size)


def _inside(sign: Sign, left: int, top: int, width: int, height: int, size: int) -> Sign | None:
    """The sign in the window's own measures, or None where the edge cuts it. It reads as any print does: its type is 'large'."""
    x, y = sign.x * width - left, sign.y * height - top
    half_w, half_h = (half * ZOOM * size for half in sign.half_extent())
    if x - half_w < 0 or y - half_h < 0 or x + half_w > size or y + half_h > size:
        return None
    return Sign(text=sign.text, type="large", x=x / size, y=y / size)
