"""Open a picture safely. PIL and numpy; no torch.

    path | bytes | pixels --open_image--> RGB, upright, opaque --Preprocess.views (preprocess.py)--> float32 (V, 3, S, S)

``open_image`` looks at the content, never at names or stated types, and decides from the header before anything is decompressed.
One rule for every picture, in training, inference and serving alike:

* JPEG, PNG, WebP, GIF, BMP and TIFF; of an animation the first frame, with a warning (``Limits.strict_animation`` refuses instead).
* EXIF orientation is applied; an EXIF block that cannot be read is ignored. Colour profiles are ignored, as CLIP's training did.
* Transparency is laid over white. (LLaVA's loader drops alpha, which uncovers whatever colour the artist's tool left below.)
* Text, profiles and other notes inside a PNG are left out unread: they may unpack to a thousand times their size.
* 16-bit grey is divided by 257. Wider integers and floats name no range: integers within 0..65535 are read as 16 bit, floats within 0..1
  as fractions and within 0..255 as levels; anything else is stretched from its least to its greatest finite value.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from llavakit import types
from llavakit.errors import ImageError
from llavakit.preprocess import Preprocess

__all__ = ["LIMITS", "Limits", "Preprocess", "image_size", "open_image", "read_bytes"]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_NOTES = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))

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
_SIDEWAYS = tuple(_TURNS[number] for number in (5, 6, 7, 8))  # width and height change places
_ORIENTATION = 0x0112


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture may cost. Checked against the file's size and the header, before pixels exist."""

    max_pixels: int = 1 << 26
    max_bytes: int = 1 << 26
    max_side: int = 65_535
    strict_animation: bool = False


LIMITS = Limits()


def open_image(image: types.Image, limits: Limits = LIMITS, *, least: tuple[int, int] | None = None) -> PIL.Image.Image:
    """The picture in RGB, upright and opaque.

    ``least`` (width, height): a JPEG may be decoded at a half, quarter or eighth of its size, but not below this: several times faster
    for large photographs, and not the same pixels.

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
        animated = _is_animated(opened)
        if least is not None:
            opened.draft(None, least[::-1] if _turn(opened) in _SIDEWAYS else least)  # other formats than JPEG ignore it
        picture = _decode(opened, where)
    if animated:
        _animation(limits, where)
    return picture


def image_size(image: types.Image, limits: Limits = LIMITS) -> tuple[int, int]:
    """(width, height) that ``open_image`` will give, from the header alone. Raises what it raises."""
    source = image.source
    if isinstance(source, types.Pixels):
        _check_size((source.width, source.height), limits, "image")
        return source.width, source.height
    where = str(source) if isinstance(source, Path) else "image"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = read_bytes(image, limits)
        opened = _open_header(data, limits, where)
        sideways = opened.format != "TIFF" and _turn(opened, data) in _SIDEWAYS  # Pillow tells the upright size of a TIFF itself
        return opened.size[::-1] if sideways else opened.size


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
        size = source.stat().st_size
        with source.open("rb") as stream:
            data = stream.read(limits.max_bytes + 1) if size <= limits.max_bytes else b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError("the file cannot be read", code="image_unreadable", where=str(source), remedy="check its permissions") from error
    if max(size, len(data)) > limits.max_bytes:
        raise _too_large(max(size, len(data)), limits, str(source))
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
    readable = _without_notes(data, where)
    try:
        opened = PIL.Image.open(io.BytesIO(readable), formats=FORMATS)
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"more than {limits.max_pixels:,} pixels", code="image_too_many_pixels", where=where, remedy="scale it down"
        ) from error
    except Exception as error:  # a decoder may raise anything at all on hostile bytes
        raise _unreadable(data, where) from error
    _check_size(opened.size, limits, where)
    return opened


def _without_notes(data: bytes, where: str) -> bytes:
    """A PNG without its texts and profiles (hardening I13); anything else as it is. Raises ImageError if it ends inside a chunk."""
    if not data.startswith(_PNG):
        return data
    kept, start, after = [], 0, len(_PNG)
    for name, at, after in _chunks(data):
        if name in _PNG_NOTES:
            kept.append(data[start:at])
            start = after
    if after > len(data):
        raise _truncated(where)
    return b"".join((*kept, data[start:])) if kept else data


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, first and last place of every chunk of a PNG; the last may end behind the data."""
    at = len(_PNG)
    while at + 8 <= len(data):
        after = at + 12 + int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at, after
        at = after


def _unreadable(data: bytes, where: str) -> ImageError:
    name = next((name for magic, name in _REFUSED.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        name = _BRANDS.get(data[8:12], name)
    if data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        return _truncated(where)
    allowed = f"use one of {', '.join(FORMATS)}"
    if name:
        return ImageError(f"{name} pictures are not opened", code="image_format_not_allowed", where=where, remedy=allowed)
    what = "the file is empty" if not data else "these bytes are no picture we can read"
    return ImageError(what, code="image_unreadable", where=where, remedy=allowed)


def _truncated(where: str) -> ImageError:
    return ImageError("the picture's data end too early", code="image_truncated", where=where, remedy="send the whole file")


def _decode(opened: PIL.Image.Image, where: str) -> PIL.Image.Image:
    try:
        opened.load()
        return _opaque(_upright(opened))
    except OSError as error:
        raise _truncated(where) from error
    except Exception as error:  # as above
        raise ImageError("the picture's data are broken", code="image_unreadable", where=where, remedy="save it anew") from error


def _is_animated(opened: PIL.Image.Image) -> bool:
    """Whether there is a second frame that can be read. The second picture of an MPO is a preview or a depth map."""
    try:
        return opened.format != "MPO" and bool(getattr(opened, "is_animated", False))
    except Exception:  # asking a GIF parses its second frame
        return False


def _animation(limits: Limits, where: str) -> None:
    if limits.strict_animation:
        raise ImageError("the picture has several frames", code="image_animated", where=where, remedy="send one frame")
    warnings.warn("a picture has several frames; only the first is seen", stacklevel=3)


def _turn(opened: PIL.Image.Image, data: bytes | None = None) -> PIL.Image.Transpose | None:
    """How the picture lies. With ``data``, the whole file, nothing is decoded for it: Pillow would look for a PNG's behind its pixels."""
    try:
        exif = _png_exif(data) if data is not None and opened.format == "PNG" else opened.getexif()
        return _TURNS.get(exif.get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing about orientation
        return None


def _png_exif(data: bytes) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    for name, at, after in _chunks(data):
        if name == b"eXIf":
            exif.load(b"Exif\0\0" + data[at + 8 : after - 4])
    return exif


def _upright(opened: PIL.Image.Image) -> PIL.Image.Image:
    turn = _turn(opened)
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
    values = np.asarray(picture)
    if values.dtype.itemsize == 2 or (picture.mode == "I" and values.min() >= 0 and values.max() <= 65535):
        levels = ((np.arange(65536) * 255 + 32767) // 65535).astype(np.uint8)
        return np.take(levels, values)
    values = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scaled = (values - low) / (high - low) * 255 if high > low else np.zeros_like(values)
    return np.floor(scaled + 0.5).astype(np.uint8)
