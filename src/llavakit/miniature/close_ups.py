"""Galleries of close-ups for the tiny CLIP. The released CLIP has seen print of every size on the web; a tower trained on whole scenes
alone has seen large print only, and tiles would show it nothing (``scenes/close_up.py`` has the drawing).
"""

from __future__ import annotations

import itertools
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from numpy.typing import NDArray

from llavakit.miniature.pictures import Gallery
from llavakit.scenes.close_up import close_up
from llavakit.scenes.world import Scene, Split, make_scene, scenes

SIGNS = 6  # tried on each picture


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
    seen = [close_up(make_scene(seed), size, signs=SIGNS) for seed in seeds]
    return [scene for scene, _ in seen], np.stack([np.asarray(picture).transpose(2, 0, 1) for _, picture in seen])
