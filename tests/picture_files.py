"""Picture files for tests, made in memory: honest ones, and ones no encoder would write."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image


def encoded(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, seed: int = 0) -> PIL.Image.Image:
    """Random RGB: every resampling mistake shows."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> PIL.Image.Image:
    """Colours that change slowly, so that a lossy encoder changes them little."""
    across, down = np.meshgrid(np.linspace(40, 210, width), np.linspace(220, 30, height))
    return PIL.Image.fromarray(np.stack([across, down, (across + down) / 2], axis=-1).astype(np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, notes: bytes = b"") -> bytes:
    """A 1-bit black PNG of any stated size, whose data would fill only a small one; ``notes`` are chunks put before the data."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(height, 64) * (1 + (min(width, 64) + 7) // 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + notes + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def webp_header(width: int, height: int) -> bytes:
    """An extended WebP that states a large canvas."""
    inner = encoded(PIL.Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_header(width: int, height: int) -> bytes:
    frame = b"\x2c" + struct.pack("<HHHH", 0, 0, width, height) + b"\0\x02\x02\x4c\x01\0;"
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + frame


def bmp_header(width: int, height: int) -> bytes:
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + sizes + bytes(50)


def jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(encoded(PIL.Image.new("RGB", (8, 8)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)
