"""Close-ups: windows of drawn pictures at twice the size of a view, so that small print is met at the scale of AnyRes tiles.

picture, long side 2S        one window S x S
+---------------------+      +----------+
|   43     (o)        |      |   (o)    |   told: only the signs that lie wholly inside,
|       +----------+  |  ->  |  [cat]   |   with their places in the window
|  *    |  [cat]   |  |      +----------+
+-------+----------+--+
"""

from __future__ import annotations

import random
from dataclasses import replace

from PIL import Image

from llavakit.scenes.draw import draw
from llavakit.scenes.world import Scene, Sign, with_small_print

ZOOM = 2  # the long side of the picture, in windows


def close_up(scene: Scene, size: int, *, signs: int) -> tuple[Scene, Image.Image]:
    """A window of ``size`` pixels around one of up to ``signs`` signs among the scene's things, and what it shows: the signs alone."""
    rng = random.Random(scene.seed + 7)
    whole = with_small_print(scene, rng, signs)
    picture = draw(whole)
    scale = ZOOM * size / max(picture.size)
    width, height = (max(size, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    aim = rng.choice(whole.signs) if whole.signs else None
    left, top = (
        _offset(rng, at * edge, edge, size) if at is not None else rng.randint(0, edge - size)
        for at, edge in ((aim.x if aim else None, width), (aim.y if aim else None, height))
    )
    inside = (_inside(sign, left, top, width, height, size) for sign in whole.signs)
    shown = replace(scene, width=size, height=size, things=(), overlaps=(), signs=tuple(sign for sign in inside if sign is not None))
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
