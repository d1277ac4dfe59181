"""From an RGB picture to what the vision tower sees (spec 2.1 to 2.3). PIL and numpy; no torch.

``Preprocess`` equals transformers' PIL processors (``LlavaImageProcessor`` with ``do_pad``, ``CLIPImageProcessor``) bit for bit, without
building the padded square at full resolution. PIL resizes a square's columns first, then its rows, rounding to bytes in between, so:

     wide image       columns first: nothing of the        then pad the rows    and resize them
     +----------+     padding takes part                   +--+                 +--+
     |          | --> +--+                             --> |  |             --> |  | S
     +----------+     |  | h                               |  | w               +--+
          w           +--+                                 +--+                  S
                       S                                    S

A tall image needs padding left and right before its columns are resized, but only as far as the filter reaches.

With a canvas (``tiling.Tiling.canvas``) the image is also scaled to fit it, laid on black, and cut into tiles, row by row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image

from llavakit.errors import CheckpointError
from llavakit.tiling import Size, placed

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Aspect = Literal["square", "pad", "squash"]

_TILED = "LlavaNextImageProcessor"
_BICUBIC = PIL.Image.Resampling.BICUBIC
_LARGE = 1 << 19  # pixels from which a second thread pays
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From an RGB picture to the tower's input (spec 2.1 to 2.3).

    ``aspect``, how the base view becomes square. "pad": padded with the mean colour (LLaVA-1.5, 1.5-HD). "square": scaled to the shorter
    edge and cropped at the centre (LLaVA v1, stage 1 of 1.5, and llava-hf files that do not say ``do_pad``). "squash": both edges scaled
    (LLaVA-NeXT).
    """

    size: int = 336
    aspect: Aspect = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def views(self, image: PIL.Image.Image, canvas: Size | None = None, *, true_size: Size | None = None) -> Floats:
        """The normalised views, (1, 3, size, size) float32; with a canvas its tiles follow, row by row.

        ``true_size``: the picture's own size where ``image`` is a smaller draft of it, so that it is laid where the whole would be.
        """
        assert image.mode == "RGB", f"open_image gives RGB, this is {image.mode}"
        pictures = self._pictures(image, canvas, true_size or image.size)
        views = np.empty((len(pictures), 3, self.size, self.size), dtype=np.float32)
        for view, picture in zip(views, pictures, strict=True):
            for plane, channel, levels in zip(view, picture.transpose(2, 0, 1), self._levels(), strict=True):
                np.take(levels, channel, out=plane, mode="clip")  # every index is a byte; "clip" spares a copy
        return views

    def _pictures(self, image: PIL.Image.Image, canvas: Size | None, true_size: Size) -> list[Bytes]:
        """Base view and tiles, (size, size, 3) bytes each. Of large pictures the two resizings go side by side; PIL lets go of the lock."""
        if canvas is None:
            return [np.asarray(self.square(image))]
        if image.width * image.height < _LARGE:
            return [np.asarray(self.square(image)), *self._tiles(image, canvas, true_size)]
        with ThreadPoolExecutor(1) as beside:
            tiles = beside.submit(lambda: list(self._tiles(image, canvas, true_size)))
            return [np.asarray(self.square(image)), *tiles.result()]

    def least(self, size: Size, canvas: Size | None = None) -> Size:
        """The size to which a picture of ``size`` may be drafted: no view of it is scaled up that would be scaled down from the whole."""
        width, height = size
        edge = {"pad": max(size), "square": min(size)}.get(self.aspect)  # the edge that becomes a view's side
        base = (self.size, self.size) if edge is None else (math.ceil(width * self.size / edge), math.ceil(height * self.size / edge))
        _, _, across, down = placed(width, height, canvas) if canvas else (0, 0, 0, 0)
        return max(base[0], across), max(base[1], down)

    def _tiles(self, image: PIL.Image.Image, canvas: Size, true_size: Size) -> Iterator[Bytes]:
        """The canvas' tiles, (size, size, 3) bytes each."""
        left, top, width, height = placed(*true_size, canvas)
        board = np.zeros((canvas[1], canvas[0], 3), dtype=np.uint8)
        board[top : top + height, left : left + width] = np.asarray(image.resize((width, height), _BICUBIC))
        for y in range(0, canvas[1], self.size):
            for x in range(0, canvas[0], self.size):
                yield board[y : y + self.size, x : x + self.size]

    def square(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The picture the tower sees before normalisation: RGB, size x size."""
        width, height = image.size
        if self.aspect == "square":
            return _crop(image, self.size)
        if self.aspect == "squash":
            return image.resize((self.size, self.size), _BICUBIC)
        if width > height:
            return _pad_wide(image, self.size, self.colour)
        if height > width:
            return _pad_tall(image, self.size, self.colour)
        return image.resize((self.size, self.size), _BICUBIC)

    @property
    def colour(self) -> tuple[int, int, int]:
        """The colour of the padding: the mean, (122, 116, 104) for CLIP."""
        red, green, blue = (int(value * 255) for value in self.mean)
        return red, green, blue

    def _levels(self) -> Floats:
        """(3, 256): the normalised value of each byte in each channel, by the arithmetic and precision of the reference."""
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        levels: Floats = (scaled[None, :] - mean[:, None]) / std[:, None]
        return levels

    def to_hf(self, canvases: Sequence[Size] = ()) -> dict[str, Any]:
        """The contents of llava-hf's preprocessor_config.json. ``base_aspect`` is ours: transformers squashes the base of tiled models."""
        own: dict[str, Any] = {"image_processor_type": "LlavaImageProcessor", "do_pad": self.aspect == "pad"}
        if canvases:
            points = [[height, width] for width, height in canvases]
            own = {"image_processor_type": _TILED, "do_pad": True, "image_grid_pinpoints": points}
            own |= {} if self.aspect == "squash" else {"base_aspect": self.aspect}
        return own | {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.size},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @staticmethod
    def from_hf(values: Mapping[str, Any]) -> Preprocess:
        """From preprocessor_config.json. Padding is on only where it is asked for (spec 8, trap 2). Raises CheckpointError."""
        where = "preprocessor_config.json"
        size = _side(values.get("crop_size", 224))
        kind = str(values.get("image_processor_type", "LlavaImageProcessor"))
        tiled = kind.startswith(_TILED)  # its do_pad makes batches, not squares
        pads = bool(values.get("do_pad", False)) and kind.startswith("LlavaImageProcessor")
        resize = values.get("size", size)
        squashes = isinstance(resize, Mapping) and bool(resize.get("height")) and not pads  # both edges at once, nothing to crop
        unlike = [
            name
            for name, wanted in (
                ("size", _side(resize) == size and not squashes),
                ("crop_size", size > 0),
                ("resample", values.get("resample", 3) == 3),
                ("rescale_factor", abs(values.get("rescale_factor", 1 / 255) - 1 / 255) < 1e-9),
                *((flag, values.get(flag, True) is True) for flag in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")),
                ("image_processor_type", kind.startswith((_TILED, "LlavaImageProcessor", "CLIPImageProcessor", "CLIPFeatureExtractor"))),
                ("base_aspect", not tiled or values.get("base_aspect", "squash") in ("squash", "pad", "square")),
            )
            if not wanted
        ]
        if unlike:
            raise CheckpointError(
                f"{', '.join(unlike)} do not describe CLIP's preprocessing",
                code="preprocess_not_supported",
                where=where,
                remedy="LLaVA resizes bicubically to the shortest edge, crops a square of that size, rescales and normalises",
            )
        mean, std = tuple(values.get("image_mean", CLIP_MEAN)), tuple(values.get("image_std", CLIP_STD))
        aspect: Aspect = values.get("base_aspect", "squash") if tiled else "pad" if pads else "square"
        return Preprocess(size=size, aspect=aspect, mean=mean, std=std)


def _side(value: Any) -> int:
    """A size as llava-hf files write it: 336, {"shortest_edge": 336} or {"height": 336, "width": 336}; 0 for anything else."""
    if isinstance(value, int):
        return value
    sides = {name: side for name, side in value.items() if side is not None}
    known = set(sides) in ({"shortest_edge"}, {"height", "width"}) and len(set(sides.values())) == 1
    return int(next(iter(sides.values()))) if known else 0


def _pad_wide(image: PIL.Image.Image, size: int, colour: tuple[int, int, int]) -> PIL.Image.Image:
    """Columns, then padding, then rows: see the drawing above. Exact, because a row of padding resizes to itself."""
    width, height = image.size
    narrow = PIL.Image.new("RGB", (size, width), colour)
    narrow.paste(image.resize((size, height), _BICUBIC), (0, (width - height) // 2))
    return narrow.resize((size, size), _BICUBIC)


def _pad_tall(image: PIL.Image.Image, size: int, colour: tuple[int, int, int]) -> PIL.Image.Image:
    """Resize only the columns the image reaches; the others hold padding alone.

    The columns are bounded by multiples of ``step``, the odd part of ``size``, where the bounds in source pixels (column * height / size)
    have no digits that the filter's 32-bit bounds would lose: the result is exact. For very tall images that would widen
    the source too much, so there ``step`` is 1 and a level may differ by one.
    """
    width, height = image.size
    left = (height - width) // 2
    scale = height / size
    reach = 2 * max(scale, 1.0) + 1  # the filter's support, and one pixel for rounding
    step = size // (size & -size)
    step = step if step * scale <= width else 1
    first = max(0, math.floor((left - reach) / scale) // step * step)
    last = min(size, math.ceil(math.ceil((left + width + reach) / scale) / step) * step)
    start = max(0, math.floor(first * scale - reach))
    stop = min(height, math.ceil(last * scale + reach))
    canvas = PIL.Image.new("RGB", (stop - start, height), colour)
    canvas.paste(image, (left - start, 0))
    box = (first * height / size - start, 0, last * height / size - start, height)
    columns = canvas.resize((last - first, height), _BICUBIC, box=box)
    square = PIL.Image.new("RGB", (size, size), colour)
    square.paste(columns.resize((last - first, size), _BICUBIC), (first, 0))
    return square


def _crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """CLIP: the shorter edge to ``size``, the longer in proportion (rounded down), then the centre.

    Where the scaled image would be more than 64 squares long only its centre is computed; a level may then differ by one.
    """
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    start = (long - size) // 2
    if long > 64 * size:
        scale = max(width, height) / long
        low, high = start * scale, (start + size) * scale
        if width > height:
            return image.resize((size, height), _BICUBIC, box=(low, 0, high, height)).resize((size, size), _BICUBIC)
        return image.resize((size, height), _BICUBIC).resize((size, size), _BICUBIC, box=(0, low, size, high))
    if width > height:
        return image.resize((long, size), _BICUBIC).crop((start, 0, start + size, size))
    return image.resize((size, long), _BICUBIC).crop((0, start, size, start + size))
