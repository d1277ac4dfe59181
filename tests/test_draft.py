"""Drafts of large photographs: the same views and tokens, nearly the same pixels, and nothing is decoded too small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.images import image_size, open_image
from llavakit.preprocess import Aspect, Preprocess
from llavakit.tiling import RELEASED, Tiling, placed, tiles_of
from llavakit.types import Image
from picture_files import encoded, smooth

CANVASES = tiles_of(RELEASED, 56)
TILING = Tiling(side=56, canvases=CANVASES, merge="spatial_unpad")
ASPECTS: tuple[Aspect, ...] = ("square", "pad", "squash")


def views(image: Image, preprocess: Preprocess, *, tiled: bool, draft: bool) -> np.ndarray:
    size = image_size(image)
    canvas = TILING.canvas(*size) if tiled else None
    least = preprocess.least(size, canvas) if draft else None
    return preprocess.views(open_image(image, least=least), canvas, true_size=size)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_draft_gives_the_same_views_and_nearly_the_same_pixels(aspect: Aspect, turn: int, tiled: bool) -> None:
    exif = smooth(8, 8).getexif()
    exif[0x0112] = turn
    photograph = Image(encoded(smooth(1501, 1000), "JPEG", quality=95, exif=exif))
    preprocess = Preprocess(size=56, aspect=aspect)
    exact = views(photograph, preprocess, tiled=tiled, draft=False)
    quick = views(photograph, preprocess, tiled=tiled, draft=True)
    assert exact.shape == quick.shape
    levels = np.abs(exact - quick) * (255 * np.array(preprocess.std, dtype=np.float32)[:, None, None])
    assert 0 < levels.mean() < 1, "slow colours: less than one level of 255"


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8000), st.integers(1, 8000), st.sampled_from(ASPECTS), st.booleans())
def test_a_draft_is_never_smaller_than_what_the_views_show(width: int, height: int, aspect: Aspect, tiled: bool) -> None:
    canvas = TILING.canvas(width, height) if tiled else None
    across, down = Preprocess(size=56, aspect=aspect).least((width, height), canvas)
    if canvas:
        _, _, needed_across, needed_down = placed(width, height, canvas)
        assert across >= needed_across
        assert down >= needed_down
    if aspect != "pad":
        assert min(across, down) >= 56
    assert max(across, down) >= 56


def test_small_pictures_and_other_formats_are_decoded_whole() -> None:
    for picture in (encoded(smooth(100, 70), "JPEG"), encoded(smooth(1500, 1000), "PNG"), encoded(smooth(1500, 1000), "WEBP")):
        image = Image(picture)
        assert open_image(image, least=(56, 56)).size == image_size(image)
    small = Image(encoded(smooth(100, 70), "JPEG"))
    assert np.array_equal(np.asarray(open_image(small, least=(56, 56))), np.asarray(open_image(small)))


def test_a_large_photograph_is_decoded_smaller() -> None:
    assert open_image(Image(encoded(smooth(1600, 1200), "JPEG")), least=(112, 84)).size == (200, 150)
    assert open_image(Image(encoded(smooth(1600, 1200), "JPEG")), least=(300, 84)).size == (400, 300)


def test_the_processor_drafts_only_when_asked(tiny_model_dir: object) -> None:
    from llavakit.processor import Processor
    from llavakit.types import Conversation

    question = Conversation.ask("What is this?", Image(encoded(smooth(3000, 2000), "JPEG")))
    exact = Processor.load(tiny_model_dir)  # type: ignore[arg-type]
    quick = Processor.load(tiny_model_dir)  # type: ignore[arg-type]
    quick.draft = True
    a, b = (one.encode(question, learn=False) for one in (exact, quick))
    assert a.input_ids.tolist() == b.input_ids.tolist()
    assert a.views.shape == b.views.shape
    assert not a.views.equal(b.views)
    again = Processor.load(tiny_model_dir)  # type: ignore[arg-type]
    assert again.encode(question, learn=False).views.equal(a.views)
