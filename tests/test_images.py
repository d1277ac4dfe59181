"""Opening pictures: what is accepted, what each mode becomes, and what is refused before it costs anything (hardening I1-I16)."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit import types
from llavakit.errors import ImageError
from llavakit.images import LIMITS, Limits, image_size, open_image
from llavakit.types import Image, Pixels
from picture_files import bmp_header, chunk, encoded, gif_header, jpeg_header, noise, png, smooth, webp_header

ALLOWED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def opened(data: bytes, **limits: object) -> PIL.Image.Image:
    return open_image(Image(data), Limits(**limits))  # type: ignore[arg-type]


def refused(data: bytes, **limits: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        opened(data, **limits)
    assert not re.search(r"0x[0-9a-f]{6,}|BytesIO|object at", str(caught.value))
    assert caught.value.remedy
    return caught.value


def close(one: PIL.Image.Image, other: PIL.Image.Image, within: float) -> bool:
    return one.size == other.size and float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()) <= within


CODES = (
    "image_unreadable",
    "image_truncated",
    "image_format_not_allowed",
    "image_too_many_pixels",
    "image_bad_aspect",
)


def outcome(data: bytes) -> str:
    """The mode of the picture opened, or the code of the error, which tells nothing of our memory."""
    try:
        return opened(data, max_pixels=100_000).mode
    except ImageError as error:
        return "leak" if "object at" in str(error) else error.code


# What is accepted


@pytest.mark.parametrize("kind", ALLOWED)
def test_every_allowed_format_opens(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(encoded(smooth(48, 32), kind))
    for source in (file, file.read_bytes()):
        picture = open_image(Image(source))
        assert picture.mode == "RGB"
        assert close(picture, smooth(48, 32), within=6)


def test_decoded_pixels_open_as_they_are() -> None:
    picture = noise(7, 5)
    again = open_image(Image(Pixels(width=7, height=5, rgb=picture.tobytes())))
    assert again.tobytes() == picture.tobytes()


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:  # I3
    file = tmp_path / "photo.jpg"
    file.write_bytes(encoded(noise(9, 9), "PNG"))
    assert open_image(Image(file)).tobytes() == noise(9, 9).tobytes()


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (1, 1), (3000, 3), (3, 3000)])
def test_thin_pictures_open(size: tuple[int, int]) -> None:  # I7
    assert opened(encoded(noise(*size), "PNG")).size == size


# What each mode becomes


def test_cmyk_keeps_its_colours() -> None:  # I8
    cmyk = smooth(64, 64).convert("CMYK")
    assert close(opened(encoded(cmyk, "JPEG", quality=95)), cmyk.convert("RGB"), within=3)
    assert close(opened(encoded(cmyk, "TIFF")), smooth(64, 64), within=1)


def test_ycck_keeps_its_colours() -> None:  # I8; no encoder at hand writes YCCK, so its planes are stored as CMYK and the marker is changed
    inks = np.asarray(smooth(64, 64).convert("CMYK")).copy()
    inks[..., :3], inks[..., 3] = inks[..., :3] // 2, np.linspace(0, 120, 64).astype(np.uint8)
    luma = np.asarray(PIL.Image.fromarray(inks[..., :3].copy()).convert("YCbCr"))
    planes = PIL.Image.fromarray(np.concatenate([255 - luma, inks[..., 3:]], axis=-1), "CMYK")
    data = bytearray(encoded(planes, "JPEG", quality=98, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    assert close(opened(bytes(data)), PIL.Image.fromarray(inks, "CMYK").convert("RGB"), within=3)


def test_sixteen_bits_are_scaled_not_saturated() -> None:  # I9
    levels = np.array([[0, 128, 129, 300, 32768, 65535]], dtype=np.uint16)
    picture = opened(encoded(PIL.Image.fromarray(levels), "PNG"))
    assert [picture.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 0, 1, 1, 128, 255)]


@given(values=st.lists(st.integers(0, 65535), min_size=2, max_size=20))
@settings(max_examples=30, deadline=None)
def test_sixteen_bits_follow_the_formula(values: list[int]) -> None:
    picture = opened(encoded(PIL.Image.fromarray(np.array([values], dtype=np.uint16)), "TIFF"))
    assert np.asarray(picture)[0, :, 0].tolist() == [int(value * 255 / 65535 + 0.5) for value in values]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.0, 255.0]], dtype=np.float32), [0, 100, 255]),
        (np.array([[-1.0, 0.0, 1.0]], dtype=np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.25, np.inf]], dtype=np.float32), [0, 64, 0]),
        (np.array([[0, 300, 65535]], dtype=np.int32), [0, 1, 255]),
        (np.array([[-100, 0, 100]], dtype=np.int32), [0, 128, 255]),
        (np.array([[0, 1_000_000, 2_000_000]], dtype=np.int32), [0, 128, 255]),
        (np.array([[-5, -5, -5]], dtype=np.int32), [0, 0, 0]),
    ],
)
def test_wide_modes_are_scaled_not_saturated(values: np.ndarray, expected: list[int]) -> None:  # I9
    picture = opened(encoded(PIL.Image.fromarray(values), "TIFF"))
    assert np.asarray(picture)[0, :, 1].tolist() == expected


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["PNG", "TIFF", "WEBP"]))
@settings(max_examples=20, deadline=None)
def test_transparency_lies_over_white(seed: int, kind: str) -> None:  # I10
    rgba = np.random.default_rng(seed).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    picture = opened(encoded(PIL.Image.fromarray(rgba), kind, **options))
    assert np.abs(np.asarray(picture) - over_white(rgba)).max() <= 1


def test_transparent_grey_palette_and_key_lie_over_white_too() -> None:  # I10
    grey = PIL.Image.fromarray(np.array([[[10, 0], [10, 255]]], dtype=np.uint8), "LA")
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    key = PIL.Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], dtype=np.uint8))
    assert list(opened(encoded(grey, "PNG")).get_flattened_data()) == [(255, 255, 255), (10, 10, 10)]
    assert list(opened(encoded(palette, "PNG", transparency=0)).get_flattened_data()) == [(255, 255, 255), (0, 0, 200)]
    assert list(opened(encoded(palette, "PNG", transparency=bytes([255, 0]))).get_flattened_data()) == [(200, 0, 0), (255, 255, 255)]
    assert list(opened(encoded(palette, "GIF", transparency=1)).get_flattened_data()) == [(200, 0, 0), (255, 255, 255)]
    assert list(opened(encoded(key, "PNG", transparency=(9, 9, 9))).get_flattened_data()) == [(255, 255, 255), (1, 2, 3)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_opaque_modes_become_rgb(mode: str) -> None:
    picture = smooth(20, 10).convert(mode)
    assert opened(encoded(picture, "PNG")).tobytes() == picture.convert("RGB").tobytes()


# Orientation, frames, notes


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_turned_upright(kind: str, turn: int) -> None:  # I11
    upright = smooth(64, 32)
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    lying = upright if turn == 1 else upright.transpose(PIL.Image.Transpose(stored[turn]))
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    data = encoded(lying, kind, exif=exif)
    assert close(opened(data), upright, within=4)
    assert image_size(types.Image(data)) == upright.size


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
@pytest.mark.parametrize("late", [False, True])
def test_a_pngs_size_is_known_without_decoding_it(turn: int, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # A5, I11
    exif = PIL.Image.Exif()
    exif[0x0112] = turn
    data = encoded(smooth(40, 20), "PNG", exif=exif)
    if late:  # the chunk behind the pixels
        at = data.index(b"eXIf") - 4
        after = at + 12 + int.from_bytes(data[at : at + 4], "big")
        end = data.index(b"IEND") - 4
        data = data[:at] + data[after:end] + data[at:after] + data[end:]
    size = opened(data).size
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # whoever decodes fails
    assert image_size(types.Image(data)) == size == ((20, 40) if turn in (6, 8) else (40, 20))


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(20)])
def test_broken_exif_is_ignored(block: bytes) -> None:  # I11, I14
    assert close(opened(encoded(smooth(40, 20), "JPEG", exif=block)), smooth(40, 20), within=4)


def test_a_missing_end_and_a_broken_profile_change_nothing() -> None:  # I14
    data = encoded(noise(8, 8), "PNG")
    ended = data[: data.index(b"IEND") - 4]
    profiled = data[:33] + chunk(b"iCCP", b"icc\0\0broken") + data[33:]
    for broken in (ended, profiled):
        assert opened(broken).tobytes() == noise(8, 8).tobytes()
    assert close(opened(encoded(smooth(16, 16), "JPEG", icc_profile=b"no profile")), smooth(16, 16), within=4)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_seen_with_one_warning(kind: str) -> None:  # I12
    frames = [PIL.Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="several frames") as caught:
        picture = opened(data)
    assert len(caught) == 1
    assert close(picture, frames[0], within=3)
    assert refused(data, strict_animation=True).code == "image_animated"


def test_one_frame_and_a_photo_with_a_preview_do_not_warn() -> None:
    opened(encoded(smooth(6, 6), "GIF"))
    opened(encoded(smooth(6, 6), "MPO", save_all=True, append_images=[smooth(6, 6)]), strict_animation=True)


# What is refused


@pytest.mark.parametrize("kind", ALLOWED)
def test_truncated_files(kind: str) -> None:  # I1
    data = encoded(noise(64, 64), kind)
    assert refused(data[: len(data) // 2]).code == "image_truncated"
    if kind != "GIF":  # whose decoder fills in a last pixel
        assert refused(data[:-2]).code == "image_truncated"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        bytes(range(256)) * 4,
        b"<!DOCTYPE html><html></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n%",
    ],
    ids=["empty", "zeros", "bytes", "html", "svg", "pdf"],
)
def test_no_picture_at_all(data: bytes) -> None:  # I2
    assert refused(data).code == "image_unreadable"


@given(
    data=st.binary(max_size=300), head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"BM", b"II*\0", b"RIFF"])
)
@settings(max_examples=150, deadline=None)
def test_hostile_bytes_give_a_picture_or_our_error(data: bytes, head: bytes) -> None:  # I2
    assert outcome(head + data) in ("RGB", *CODES)


@given(where=st.integers(0, 10**6), value=st.integers(0, 255), kind=st.sampled_from(ALLOWED), frames=st.integers(1, 2))
@settings(max_examples=150, deadline=None)
def test_one_wrong_byte_gives_a_picture_or_our_error(where: int, value: int, kind: str, frames: int) -> None:
    several = {"save_all": True, "append_images": [noise(16, 16)]} if frames == 2 and kind not in ("JPEG", "BMP") else {}
    data = bytearray(encoded(smooth(16, 16), kind, **several))
    data[where % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of several frames
        assert outcome(bytes(data)) in ("RGB", *CODES)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "DDS", "ICNS", "AVIF", "JPEG2000"])
def test_formats_that_are_not_allowed(kind: str) -> None:  # I4
    error = refused(encoded(PIL.Image.new("RGB", (32, 32)), kind))
    assert error.code == "image_format_not_allowed"
    assert "JPEG" in error.remedy


@pytest.mark.parametrize(("size", "limit"), [((12_000, 12_000), 0), ((100_000, 100_000), 0), ((101, 100), 10_000)])
def test_too_many_pixels(size: tuple[int, int], limit: int) -> None:  # I5, I6
    limits = {"max_pixels": limit} if limit else {}
    assert refused(png(*size), **limits).code == "image_too_many_pixels"


@pytest.mark.parametrize("header", [webp_header, gif_header, bmp_header, jpeg_header])
def test_bombs_of_every_format(header: object) -> None:  # I6
    assert refused(header(16_000, 16_000)).code == "image_too_many_pixels"  # type: ignore[operator]
    assert refused(header(9_000, 9_000)).code in ("image_too_many_pixels", "image_unreadable")  # type: ignore[operator]


def test_a_bomb_is_refused_without_warning_or_memory() -> None:  # I5
    program = (
        "import resource, sys, warnings; warnings.simplefilter('error')\n"
        "from llavakit.errors import ImageError\nfrom llavakit.images import open_image\nfrom llavakit.types import Image\n"
        "import PIL.PngImagePlugin, PIL.Image; PIL.Image.preinit()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: open_image(Image(bytes.fromhex(sys.argv[1])))\n"
        "except ImageError as error: print(error.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, png(12_000, 12_000).hex()], capture_output=True, text=True, check=True)
    code, grown = run.stdout.split()
    assert code == "image_too_many_pixels"
    assert int(grown) < 20_000 * (1 if sys.platform != "darwin" else 1024)


@pytest.mark.parametrize("size", [(70_000, 2), (2, 70_000)])
def test_a_side_too_long(size: tuple[int, int]) -> None:  # I7
    assert refused(png(*size)).code == "image_bad_aspect"


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_notes_that_unpack_to_much_are_not_unpacked(kind: bytes) -> None:  # I13
    packed = zlib.compress(bytes(30_000_000))
    head = b"key\0\x01\0\0\0" if kind == b"iTXt" else b"key\0\0"
    assert opened(png(8, 8, notes=chunk(kind, head + packed) * 20)).size == (8, 8)


def test_too_many_bytes(tmp_path: Path) -> None:  # I13
    data = png(8, 8, notes=chunk(b"tEXt", b"key\0" + b"x" * 3000))
    assert refused(data, max_bytes=2000).code == "image_too_large"
    assert refused(bytes(LIMITS.max_bytes + 1)).code == "image_too_large"
    file = tmp_path / "sparse.png"
    with file.open("wb") as stream:
        stream.truncate(100_000_000)
    with pytest.raises(ImageError) as caught:
        open_image(Image(file))
    assert caught.value.code == "image_too_large"
    assert "100,000,000" in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none.png", "image_not_found"), (tmp_path, "image_unreadable"), (Path("a\0b"), "image_")):
        with pytest.raises(ImageError) as caught:
            open_image(Image(path))
        assert caught.value.code.startswith(code)


def test_pixels_are_bounded_too() -> None:
    with pytest.raises(ImageError) as caught:
        open_image(Image(Pixels(width=20, height=20, rgb=bytes(1200))), Limits(max_pixels=399))
    assert caught.value.code == "image_too_many_pixels"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64,aGVsbG8\n=", "image_bad_base64"),
        ("data:image/png;base64,aGVs-_8=", "image_bad_base64"),
        ("data:image/png;base64,aGVsbG8", "image_bad_base64"),
        ("data:image/png;base64,*", "image_bad_base64"),
        ("data:image/png;base64", "image_bad_data_url"),
        ("data:image/png,aGVsbG8=", "image_bad_data_url"),
        ("https://example.com/a.png", "image_bad_data_url"),
        ("data:;base64," + "A" * types.MAX_DATA_URL, "image_too_large"),
    ],
)
def test_data_urls_are_read_strictly(url: str, code: str) -> None:  # I15, I16
    with pytest.raises(ImageError) as caught:
        types.decode_data_url(url)
    assert caught.value.code == code


def test_a_data_url_may_lie_about_its_type() -> None:  # I3
    url = types.encode_data_url(Image(encoded(noise(5, 5), "PNG"))).replace("image/png", "image/jpeg")
    assert opened(types.decode_data_url(url)).tobytes() == noise(5, 5).tobytes()


def test_opening_leaves_no_file_open(tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(encoded(noise(5, 5), "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        open_image(Image(file))
        file.unlink()


def test_a_picture_is_a_stream_elsewhere_too() -> None:
    assert open_image(Image.of(PIL.Image.open(io.BytesIO(encoded(noise(5, 5), "PNG"))))).tobytes() == noise(5, 5).tobytes()
