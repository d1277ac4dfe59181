"""What the tower sees equals the reference: transformers' PIL processors, and the padded square built in full (spec 2.1, 2.2)."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from llavakit.errors import CheckpointError
from llavakit.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from llavakit.tiling import RELEASED as RELEASED_SHAPES
from llavakit.tiling import Tiling, tiles_of
from picture_files import noise, smooth

ONE_LEVEL = 1 / 255 / min(CLIP_STD) + 1e-6

sides = st.integers(1, 400)
sizes = st.sampled_from([56, 112, 224, 336, 50, 27])  # powers of two, odd parts, and an odd size


def reference(preprocess: Preprocess, picture: PIL.Image.Image) -> np.ndarray:
    shape = {"size": {"shortest_edge": preprocess.size}, "crop_size": {"height": preprocess.size, "width": preprocess.size}}
    maker = LlavaImageProcessorPil(do_pad=True, **shape) if preprocess.aspect == "pad" else CLIPImageProcessorPil(**shape)
    return np.asarray(maker(picture, return_tensors="np").pixel_values)


@given(width=sides, height=sides, size=sizes)
@settings(max_examples=60, deadline=None)
def test_padded_views_equal_the_reference(width: int, height: int, size: int) -> None:
    preprocess, picture = Preprocess(size=size), noise(width, height)
    made, wanted = preprocess.views(picture), reference(preprocess, picture)
    assert made.shape == (1, 3, size, size)
    assert made.dtype == np.float32
    odd_part = size // (size & -size)
    if height <= width or odd_part * height <= size * width:  # else the columns' bounds are no whole steps: see _pad_tall
        np.testing.assert_array_equal(made, wanted)
    else:
        np.testing.assert_allclose(made, wanted, rtol=0, atol=ONE_LEVEL)


@given(width=sides, height=sides, size=sizes)
@settings(max_examples=40, deadline=None)
def test_cropped_views_equal_the_reference(width: int, height: int, size: int) -> None:
    preprocess, picture = Preprocess(size=size, aspect="square"), noise(width, height)
    if max(width, height) <= 60 * min(width, height):
        np.testing.assert_array_equal(preprocess.views(picture), reference(preprocess, picture))
    else:
        assert preprocess.views(picture).shape == (1, 3, size, size)


@pytest.mark.parametrize("shape", [(1000, 667), (667, 1000), (640, 480), (336, 336), (1344, 336), (500, 2000)])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_the_released_size_equals_the_reference(shape: tuple[int, int], aspect: str) -> None:
    preprocess, picture = Preprocess(size=336, aspect=aspect), noise(*shape)  # type: ignore[arg-type]
    np.testing.assert_array_equal(preprocess.views(picture), reference(preprocess, picture))


RELEASED = Tiling(side=336, canvases=tiles_of(RELEASED_SHAPES, 336), merge="spatial_unpad")


@pytest.mark.parametrize(
    "shape", [(1000, 667), (667, 1000), (320, 240), (240, 320), (336, 336), (900, 330), (100, 1000), (1000, 10), (10, 1000)]
)
def test_tiles_equal_the_reference(shape: tuple[int, int]) -> None:
    """spec 2.3: the base squashed, the tiles of a black canvas row by row, exactly as transformers cuts them."""
    picture = noise(*shape)
    maker = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    width, height = RELEASED.canvas(*shape) or (0, 0)
    maker.image_grid_pinpoints = [[height, width]]  # the choice itself is tiling's law
    wanted = np.asarray(maker(picture, return_tensors="np").pixel_values)[0]
    made = Preprocess(size=336, aspect="squash").views(picture, (width, height))
    assert len(made) == RELEASED.grid(*shape).views
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (52_800, 44), (44, 52_800), (1, 65_535), (65_535, 1)])
@pytest.mark.parametrize("aspect", ["squash", "pad", "square"])
def test_every_shape_is_cut(shape: tuple[int, int], aspect: str) -> None:  # I7
    views = Preprocess(size=56, aspect=aspect).views(smooth(*shape), (112, 56))  # type: ignore[arg-type]
    assert views.shape == (3, 3, 56, 56)
    assert np.isfinite(views).all()


@given(width=st.integers(1, 120), height=st.integers(1, 120))
@settings(max_examples=40, deadline=None)
def test_padding_is_a_paste_on_the_mean_colour(width: int, height: int) -> None:
    side, picture = max(width, height), noise(width, height)
    canvas = PIL.Image.new("RGB", (side, side), (122, 116, 104))
    canvas.paste(picture, ((side - width) // 2, (side - height) // 2))
    made = np.asarray(Preprocess(size=56).square(picture), int)
    assert np.abs(made - np.asarray(canvas.resize((56, 56), PIL.Image.Resampling.BICUBIC), int)).max() <= 1


def test_the_numbers_by_hand() -> None:
    views = Preprocess(size=28).views(PIL.Image.new("RGB", (90, 30), (255, 0, 51)))
    for channel, level, padding in zip(range(3), (255, 0, 51), (122, 116, 104), strict=True):
        middle, edge = ((value / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel] for value in (level, padding))
        assert views[0, channel, 14, 14] == pytest.approx(middle, abs=1e-6)
        assert views[0, channel, 0, 14] == views[0, channel, 27, 14] == pytest.approx(edge, abs=1e-6)


def test_another_mean_pads_with_its_own_colour() -> None:
    grey = Preprocess(size=28, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert grey.colour == (127, 127, 127)
    assert np.abs(grey.views(noise(40, 10))[0, :, 0]).max() < 0.005


@pytest.mark.parametrize("shape", [(52_800, 44), (44, 52_800), (30_000, 1), (1, 30_000)])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_ribbons_cost_little(shape: tuple[int, int], aspect: str) -> None:  # I7
    """A square of 52800 pixels a side would take 8 GB."""
    views = Preprocess(size=336, aspect=aspect).views(smooth(*shape))  # type: ignore[arg-type]
    assert np.isfinite(views).all()
    if aspect == "pad":
        padding = (122 / 255 - CLIP_MEAN[0]) / CLIP_STD[0]
        assert (np.abs(views[0, 0] - padding) < 1e-6).mean() > 0.9


def test_files_say_what_we_mean() -> None:
    for preprocess in (Preprocess(), Preprocess(size=56, aspect="square", mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3))):
        assert Preprocess.from_hf(preprocess.to_hf()) == preprocess


SQUARE = {"height": 336, "width": 336}


@pytest.mark.parametrize(
    ("values", "aspect"),
    [
        ({"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": SQUARE}, "square"),
        ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336, "resample": 3}, "square"),
        ({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True, "size": SQUARE, "crop_size": SQUARE}, "pad"),
        ({"image_processor_type": "CLIPImageProcessor", "do_pad": True, "crop_size": 336}, "square"),  # transformers' CLIP never pads
    ],
)
def test_published_files_pad_only_where_they_say_so(values: dict[str, object], aspect: str) -> None:  # spec 8, trap 2
    assert Preprocess.from_hf(values) == Preprocess(size=336, aspect=aspect)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resample", 2),
        ("do_center_crop", False),
        ("do_normalize", False),
        ("size", {"shortest_edge": 300}),
        ("size", {"shortest_edge": 336, "longest_edge": 500}),
        ("rescale_factor", 1.0),
        ("image_processor_type", "SiglipImageProcessor"),
        ("size", SQUARE),  # squashes where it does not pad
        ("crop_size", {"height": 336, "width": 224}),
    ],
)
def test_other_preprocessing_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(CheckpointError) as caught:
        Preprocess.from_hf({**Preprocess(aspect="square").to_hf(), name: value})
    assert caught.value.code == "preprocess_not_supported"
    assert name in caught.value.what
