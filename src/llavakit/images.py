"""Open a picture safely, and make from it what the vision tower sees. PIL and numpy; no torch.

    path | bytes | pixels --open_image--> RGB, upright, opaque --Preprocess.views--> float32 (V, 3, S, S)

``open_image`` looks at the content, never at names or stated types, and decides from the header before anything is decompressed.
One rule for every picture, in training, inference and serving alike:

* JPEG, PNG, WebP, GIF, BMP and TIFF; of an animation the first frame, with a warning (``Limits.strict_animation`` refuses instead).
* EXIF orientation is applied; an EXIF block that cannot be read is ignored. Colour profiles are ignored, as CLIP's training did.
* Transparency is laid over white. (LLaVA's loader drops alpha, which uncovers whatever colour the artist's tool left below.)
* 16-bit grey is divided by 257. Wider integers and floats name no range: integers within 0..65535 are read as 16 bit, floats within 0..1
  as fractions and within 0..255 as levels; anything else is stretched from its least to its greatest finite value.

``Preprocess`` equals transformers' PIL processors (``LlavaImageProcessor`` with ``do_pad``, ``CLIPImageProcessor``) bit for bit, without
building the padded square at full resolution. PIL resizes a square's columns first, then its rows, rounding to bytes in between, so:

     wide image       columns first: nothing of the        then pad the rows    and resize them
     +----------+     padding takes part                   +--+                 +--+
     |          | --> +--+                             --> |  |             --> |  | S
     +----------+     |  | h                               |  | w               +--+
          w           +--+                                 +--+                  S
                       S                                    S

A tall image needs padding left and right before its columns are resized, but only as far as the filter reaches.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import PIL.Image

from llavakit import types
from llavakit.errors import CheckpointError, ImageError

Floats = npt.NDArray[np.float32]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_BICUBIC = PIL.Image.Resampling.BICUBIC
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# First bytes of formats we know and do not open, so that the message can say more than "unreadable".
_REFUSED: Mapping[bytes, str] = {
    b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"8BPS": "PSD", b"icns": "ICNS", b"SIMPLE  =": "FITS", b"\xd7\xcd\xc6\x9a": "WMF",
    b"\x01\x00\x00\x00": "EMF or WMF", b"\x00\x00\x01\x00": "ICO", b"P5": "PPM", b"P6": "PPM", b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"qoif": "QOI", b"DDS ": "DDS", b"\xff\x0a": "JPEG XL",
}  # fmt: skip
_BRANDS: Mapping[bytes, str] = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF"}

_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture may cost. Checked against the file's size and the header, before pixels exist."""

    max_pixels: int = 1 << 26
    max_bytes: int = 1 << 26
    max_side: int = 65_535
    strict_animation: bool = False


LIMITS = Limits()


def open_image(image: types.Image, limits: Limits = LIMITS) -> PIL.Image.Image:
    """The picture in RGB, upright and opaque.

    Raises ImageError: image_not_found, image_unreadable, image_truncated, image_format_not_allowed, image_too_large (bytes),
    image_too_many_pixels, image_bad_aspect (a side over the limit), image_animated (only under ``strict_animation``).
    """
    source = image.source
    if isinstance(source, types.Pixels):
        _check_size((source.width, source.height), limits, "image")
        return PIL.Image.frombytes("RGB", (source.width, source.height), source.rgb)
    where = str(source) if isinstance(source, Path) else "image"
    data = read_bytes(image, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on sizes and broken metadata: each has a defined result here
        opened = _open_header(data, limits, where)
        animated = opened.format != "MPO" and bool(getattr(opened, "is_animated", False))
        picture = _decode(opened, where)
    if animated:
        _animation(limits, where)
    return picture


def read_bytes(image: types.Image, limits: Limits = LIMITS) -> bytes:
    """The encoded bytes of a picture given as file or bytes (for decoded pixels: those), never more than ``limits.max_bytes``."""
    source = image.source
    if isinstance(source, types.Pixels):
        return source.rgb
    if isinstance(source, bytes):
        if len(source) > limits.max_bytes:
            raise _too_large(len(source), limits, "image")
        return source
    try:
        if not source.is_file():
            missing = not source.exists()
            raise ImageError(
                "there is no such file" if missing else "this is not a file",
                code="image_not_found" if missing else "image_unreadable",
                where=str(source),
                remedy="check the path",
            )
        with source.open("rb") as stream:
            data = stream.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError("the file cannot be read", code="image_unreadable", where=str(source), remedy="check its permissions") from error
    if len(data) > limits.max_bytes:
        raise _too_large(source.stat().st_size, limits, str(source))
    return data


def _too_large(size: int, limits: Limits, where: str) -> ImageError:
    return ImageError(
        f"{size:,} bytes where {limits.max_bytes:,} are allowed", code="image_too_large", where=where, remedy="send a smaller file"
    )


def _check_size(size: tuple[int, int], limits: Limits, where: str) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{width}x{height} pixels where {limits.max_pixels:,} are allowed",
            code="image_too_many_pixels",
            where=where,
            remedy="scale it down",
        )
    if max(width, height) > limits.max_side or min(width, height) < 1:
        raise ImageError(
            f"{width}x{height} pixels where a side may have 1 to {limits.max_side:,}",
            code="image_bad_aspect",
            where=where,
            remedy="crop it or scale it down",
        )


def _open_header(data: bytes, limits: Limits, where: str) -> PIL.Image.Image:
    """Parse the header alone. No message of Pillow's is passed on: they hold memory addresses (CVE-2026-22778)."""
    try:
        opened = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"more than {limits.max_pixels:,} pixels", code="image_too_many_pixels", where=where, remedy="scale it down"
        ) from error
    except Exception as error:  # a decoder may raise anything at all on hostile bytes
        raise _unreadable(data, where) from error
    _check_size(opened.size, limits, where)
    return opened


def _unreadable(data: bytes, where: str) -> ImageError:
    name = next((name for magic, name in _REFUSED.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        name = _BRANDS.get(data[8:12], name)
    allowed = f"use one of {', '.join(FORMATS)}"
    if name:
        return ImageError(f"{name} pictures are not opened", code="image_format_not_allowed", where=where, remedy=allowed)
    what = "the file is empty" if not data else "these bytes are no picture we can read"
    return ImageError(what, code="image_unreadable", where=where, remedy=allowed)


def _decode(opened: PIL.Image.Image, where: str) -> PIL.Image.Image:
    try:
        opened.load()
        return _opaque(_upright(opened))
    except OSError as error:
        raise ImageError("the picture's data end too early", code="image_truncated", where=where, remedy="send the whole file") from error
    except Exception as error:  # as above
        raise ImageError("the picture's data are broken", code="image_unreadable", where=where, remedy="save it anew") from error


def _animation(limits: Limits, where: str) -> None:
    if limits.strict_animation:
        raise ImageError("the picture has several frames", code="image_animated", where=where, remedy="send one frame")
    warnings.warn("a picture has several frames; only the first is seen", stacklevel=3)


def _upright(opened: PIL.Image.Image) -> PIL.Image.Image:
    try:
        turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about orientation
        turn = None
    return opened if turn is None else opened.transpose(turn)


def _opaque(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode to RGB by the rules in this module's docstring."""
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        return PIL.Image.fromarray(_eight_bit(picture)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = PIL.Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return picture.convert("RGB")


def _eight_bit(picture: PIL.Image.Image) -> npt.NDArray[np.uint8]:
    wide = picture.mode.startswith("I;16")
    values = np.asarray(picture).astype(np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    low, high = float(values.min()), float(values.max())
    if wide or (picture.mode == "I" and low >= 0 and high <= 65535):
        low, high = 0.0, 65535.0
    elif picture.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return np.floor(scaled + 0.5).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From an RGB picture to the tower's input (spec 2.1, 2.2).

    ``aspect`` "pad": padded to a square with the mean colour (LLaVA-1.5). "square": scaled to the shorter edge and cropped at the centre
    (LLaVA v1, stage 1 of 1.5, and llava-hf files that do not say ``do_pad``).
    """

    size: int = 336
    aspect: Literal["square", "pad"] = "pad"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def views(self, image: PIL.Image.Image) -> Floats:
        """The normalised views, (1, 3, size, size) float32."""
        assert image.mode == "RGB", f"open_image gives RGB, this is {image.mode}"
        square = self.square(image)
        pixels = np.asarray(square).transpose(2, 0, 1)
        views = np.empty((1, *pixels.shape), dtype=np.float32)
        for plane, channel, levels in zip(views[0], pixels, self._levels(), strict=True):
            np.take(levels, channel, out=plane, mode="clip")  # every index is a byte; "clip" spares a copy
        return views

    def square(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """The picture the tower sees before normalisation: RGB, size x size."""
        width, height = image.size
        if self.aspect == "square":
            return _crop(image, self.size)
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

    def to_hf(self) -> dict[str, Any]:
        """The contents of llava-hf's preprocessor_config.json."""
        return {
            "image_processor_type": "LlavaImageProcessor",
            "do_pad": self.aspect == "pad",
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
        unlike = [
            name
            for name, wanted in (
                ("size", _side(values.get("size", size)) == size),
                ("resample", values.get("resample", 3) == 3),
                ("rescale_factor", abs(values.get("rescale_factor", 1 / 255) - 1 / 255) < 1e-9),
                *((flag, values.get(flag, True) is True) for flag in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")),
                ("image_processor_type", kind.startswith(("LlavaImageProcessor", "CLIPImageProcessor", "CLIPFeatureExtractor"))),
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
        pads = bool(values.get("do_pad", False)) and kind.startswith("LlavaImageProcessor")
        mean, std = tuple(values.get("image_mean", CLIP_MEAN)), tuple(values.get("image_std", CLIP_STD))
        return Preprocess(size=size, aspect="pad" if pads else "square", mean=mean, std=std)


def _side(value: Any) -> int:
    """A size as llava-hf files write it: 336, {"shortest_edge": 336} or {"height": 336, "width": 336}; 0 for anything else."""
    if isinstance(value, int):
        return value
    sides = {side for side in (value.get("shortest_edge"), value.get("height"), value.get("width")) if side is not None}
    return int(sides.pop()) if len(sides) == 1 else 0


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

    Where the scaled image would be more than 8 squares long only its centre is computed; a level may then differ by one.
    """
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    start = (long - size) // 2
    if long > 8 * size:
        scale = max(width, height) / long
        low, high = start * scale, (start + size) * scale
        if width > height:
            return image.resize((size, height), _BICUBIC, box=(low, 0, high, height)).resize((size, size), _BICUBIC)
        return image.resize((size, height), _BICUBIC).resize((size, size), _BICUBIC, box=(0, low, size, high))
    if width > height:
        return image.resize((long, size), _BICUBIC).crop((start, 0, start + size, size))
    return image.resize((size, long), _BICUBIC).crop((0, start, size, start + size))
