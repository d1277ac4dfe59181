"""What a request may cost, found out before it is paid: bytes before they are read, pixels before they are decoded (A4, A5).

Content-Length --> body limit --> all bodies in memory together --> pictures a request --> their bytes --> their pixels (headers only)
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llavakit import images, types
from llavakit.errors import ImageError
from llavakit.serve.faults import refuse

MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``pixels`` and ``bytes`` are those of all pictures of a request together; ``bodies`` is what all requests may hold in memory."""

    body: int = 32 * MIB
    bodies: int = 256 * MIB
    images: int = 16
    bytes: int = 24 * MIB
    pixels: int = 100_000_000
    seconds_to_send: float = 60.0
    "For the whole body to arrive."
    seconds_to_read: float = 30.0
    "For a full buffer to be emptied by its reader: who is slower has gone."


def check_count(count: int, limits: Limits) -> None:
    if count > limits.images:
        what = f"{count} pictures where {limits.images} are allowed"
        raise refuse(what, code="too_many_images", where="messages", remedy="send fewer")


def check_bytes(sizes: Iterable[int], limits: Limits) -> None:
    if (total := sum(sizes)) > limits.bytes:
        what = f"pictures of {total:,} bytes together where {limits.bytes:,} are allowed"
        raise refuse(what, code="media_budget_exceeded", where="messages", remedy="send fewer or smaller ones")


def check_pixels(pictures: Sequence[tuple[str, bytes]], limits: Limits) -> None:
    """(where, encoded bytes) of every picture: headers are read, nothing is decoded. Raises ImageError with its ``where``."""
    total = 0
    for where, data in pictures:
        try:
            width, height = images.image_size(types.Image(data))
        except ImageError as error:
            raise ImageError(error.what, code=error.code, where=where, remedy=error.remedy) from error
        total += width * height
    if total > limits.pixels:
        what = f"pictures of {total:,} pixels together where {limits.pixels:,} are allowed"
        raise refuse(what, code="media_budget_exceeded", where="messages", remedy="scale them down")


async def within_budget(pictures: Sequence[tuple[str, bytes]], limits: Limits) -> None:
    """All of it for pictures that are there."""
    check_count(len(pictures), limits)
    check_bytes((len(data) for _, data in pictures), limits)
    if pictures:
        await asyncio.to_thread(check_pixels, pictures, limits)


def data_url_bytes(url: str) -> int:
    """How many bytes a data URL unpacks to, at most, without unpacking it."""
    return (len(url) - url.find(",") - 1) * 3 // 4


def bare_base64(text: str, where: str) -> bytes:
    """The bytes of base64 without a URL around it (the old workers' way of sending pictures)."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(
            "the data is not valid base64", code="image_bad_base64", where=where, remedy="use the standard alphabet"
        ) from error
