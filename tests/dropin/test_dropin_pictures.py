"""The helpers of the old ``mm_utils``: the same pixels, canvases and ids as llavakit's own rooms."""

from __future__ import annotations

import base64
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from llava import mm_utils
from llava.conversation import conv_templates
from llava.model.llava_arch import unpad_image
from llava.model.multimodal_projector.builder import build_vision_projector
from llavakit.errors import ConfigError
from llavakit.preprocess import Aspect, Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.tiling import RELEASED, Tiling, tiles_of
from llavakit.types import Conversation, assistant, user
from twins import picture

SIDE = 56
SIZES = [(90, 60), (60, 90), (50, 50), (200, 37), (31, 190), (7, 300)]
CANVASES = tiles_of(RELEASED, 336)


def clip_processor(aspect: Aspect = "squash") -> Any:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, base_aspect=aspect)


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_process_images_equals_preprocess(aspect: Aspect) -> None:
    images = [picture(index, *size) for index, size in enumerate(SIZES)]
    made = mm_utils.process_images(images, clip_processor(), SimpleNamespace(image_aspect_ratio=aspect))
    expected = np.concatenate([Preprocess(size=SIDE, aspect=aspect).views(image) for image in images])
    assert isinstance(made, Tensor)
    assert np.array_equal(made.numpy(), expected)


@pytest.mark.parametrize("aspect", ["pad", "anyres", None])
def test_pictures_of_all_colours_become_rgb(aspect: str | None) -> None:
    canvases = [list(canvas) for canvas in tiles_of(RELEASED, SIDE)]
    config = SimpleNamespace(image_aspect_ratio=aspect, image_grid_pinpoints=canvases)
    for mode in ("L", "LA", "RGBA", "P", "1"):
        image = picture(2).convert(mode)
        made, expected = (mm_utils.process_images([one], clip_processor(), config) for one in (image, image.convert("RGB")))
        assert np.array_equal(np.asarray(made), np.asarray(expected))


def test_without_a_mode_pictures_are_cropped() -> None:
    made = mm_utils.process_images([picture(0)], clip_processor(), SimpleNamespace())
    assert np.array_equal(np.asarray(made), Preprocess(size=SIDE, aspect="square").views(picture(0)))


@pytest.mark.parametrize("aspect", ["squash", "pad", "square"])
def test_process_images_cuts_tiles_as_we_do(aspect: Aspect) -> None:
    canvases = tiles_of(RELEASED, SIDE)
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[list(canvas) for canvas in canvases])
    images = [picture(index, *size) for index, size in enumerate(SIZES)]
    made = mm_utils.process_images(images, clip_processor(aspect), config)
    assert isinstance(made, list)
    rule, preprocess = Tiling(side=SIDE, canvases=canvases), Preprocess(size=SIDE, aspect=aspect)
    for image, views in zip(images, made, strict=True):
        assert np.array_equal(views.numpy(), preprocess.views(image, rule.canvas(*image.size)))
    assert isinstance(mm_utils.process_images([images[0]] * 2, clip_processor(aspect), config), Tensor)


@given(width=st.integers(1, 1400), height=st.integers(1, 1400))
def test_canvas_and_grid_shape_are_those_of_tiling(width: int, height: int) -> None:
    grid = Tiling(side=336, canvases=CANVASES, merge="spatial_unpad", arithmetic="original").grid(width, height)
    canvas = mm_utils.select_best_resolution((width, height), [list(canvas) for canvas in CANVASES])
    assert canvas == (grid.columns * 336, grid.rows * 336)
    for points in ([list(canvas) for canvas in CANVASES], str(CANVASES)):
        assert mm_utils.get_anyres_image_grid_shape((width, height), points, 336) == (grid.columns, grid.rows)
    whole = torch.zeros(2, grid.rows * 24, grid.columns * 24)
    assert unpad_image(whole, (width, height)).shape == (2, grid.kept_rows, grid.kept_columns)


def test_tiles_go_row_by_row() -> None:
    image = picture(3, 2 * SIDE, 3 * SIDE)
    tiles = mm_utils.divide_to_patches(image, SIDE)
    rows = [np.concatenate([np.asarray(tile) for tile in tiles[start : start + 2]], axis=1) for start in (0, 2, 4)]
    assert np.array_equal(np.concatenate(rows), np.asarray(image))


@pytest.mark.parametrize("size", SIZES)
def test_a_square_holds_the_picture_in_its_middle(size: tuple[int, int]) -> None:
    image = picture(1, *size)
    square = mm_utils.expand2square(image, (1, 2, 3))
    side = max(size)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    assert square.size == (side, side)
    assert square.crop((left, top, left + size[0], top + size[1])).tobytes() == image.tobytes()
    assert size[0] == size[1] or square.getpixel((0, 0)) == (1, 2, 3)


def test_base64_text_is_a_picture() -> None:
    held = io.BytesIO()
    picture(5).save(held, "PNG")
    assert mm_utils.load_image_from_base64(base64.b64encode(held.getvalue()).decode()).tobytes() == picture(5).tobytes()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/data/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("/data/llava-lora/checkpoint-100", "llava-lora_checkpoint-100"),
        ("tiny", "tiny"),
    ],
)
def test_the_name_of_a_model(path: str, name: str) -> None:
    assert mm_utils.get_model_name_from_path(path) == name


PIECES = st.lists(st.sampled_from(["What", " is\n", "\n", "", "a red ", "circle", "</s>", "ÄÖ", "."]), max_size=6).map("".join)


@given(pieces=st.lists(PIECES, min_size=1, max_size=4))
def test_ids_are_the_pieces_between_pictures(tokenizer: Any, pieces: list[str]) -> None:
    ids = mm_utils.tokenizer_image_token("<image>".join(pieces), tokenizer)
    expected = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    joined = [1, *expected[0]]
    for piece in expected[1:]:
        joined += [-200, *piece]
    assert ids == joined
    assert torch.equal(
        torch.tensor(ids), torch.as_tensor(mm_utils.tokenizer_image_token("<image>".join(pieces), tokenizer, return_tensors="pt"))
    )


def test_only_torch_tensors_are_known(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="np"):
        mm_utils.tokenizer_image_token("a", tokenizer, return_tensors="np")


def test_ids_equal_the_processors(tokenizer: Any) -> None:
    processor = Processor(
        tokenizer=tokenizer, template=TEMPLATES["llava_v1"], preprocess=Preprocess(size=SIDE), tiling=Tiling(side=SIDE, patch=SIDE),
        max_length=1000, image_pieces="original",
    )  # fmt: skip
    talk = Conversation.ask("What is in the picture?", picture(0)).then(assistant("A red circle.")).then(user("Is there a star?"))
    old = conv_templates["llava_v1"].copy()
    for role, said in zip("0101", ("<image>\nWhat is in the picture?", "A red circle.", "Is there a star?", None), strict=True):
        old.append_message(old.roles[int(role)], said)
    ids = [-200 if token == processor.image_token_id else token for token in processor.encode(talk, learn=False).input_ids.tolist()]
    assert mm_utils.tokenizer_image_token(old.get_prompt(), tokenizer) == ids  # one token a picture here, so nothing is repeated


@pytest.mark.parametrize("name", sorted(conv_templates))
def test_a_prompt_begins_once_and_shows_its_picture_once(tokenizer: Any, name: str) -> None:
    conversation = conv_templates[name].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is in the picture?")
    conversation.append_message(conversation.roles[1], None)
    ids = mm_utils.tokenizer_image_token(conversation.get_prompt(), tokenizer)
    assert isinstance(ids, list)
    assert (ids[0], ids.count(1), ids.count(-200)) == (1, 1, 1)


def test_keywords_end_a_reply(tokenizer: Any) -> None:
    asked = torch.tensor([tokenizer("Is there a star? No.").input_ids])
    criterion = mm_utils.KeywordsStoppingCriteria(["No.", "###"], tokenizer, asked)

    def new(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

    for text, over in (("Yes", False), ("Yes. No.", True), ("No", False), ("a ###", True)):
        assert criterion(new(text), None) is over
        assert criterion(torch.cat([asked, new(text)], 1), None) is over, "the prompt's own words do not count"
    assert criterion(asked, None) is False
    assert criterion(torch.cat([new("No."), new("No.")]), None) is True
    assert criterion(torch.cat([new("No."), new("No.").flip(1)]), None) is False, "all rows must have ended"


@pytest.mark.parametrize(
    ("kind", "width", "numbers"),
    [("linear", 4096, 4_198_400), ("linear", 5120, 5_248_000), ("mlp2x_gelu", 4096, 20_979_712), ("mlp2x_gelu", 5120, 31_467_520),
     ("mlp2x_gelu", 7168, 58_734_592), ("identity", 4096, 0)],
)  # fmt: skip
def test_projectors_have_the_published_sizes(kind: str, width: int, numbers: int) -> None:
    with torch.device("meta"):
        made = build_vision_projector(SimpleNamespace(mm_projector_type=kind, mm_hidden_size=1024, hidden_size=width))
    assert sum(parameter.numel() for parameter in made.parameters()) == numbers


def test_a_deeper_projector_alternates_and_an_unknown_one_is_refused() -> None:
    deep = build_vision_projector(SimpleNamespace(mm_projector_type="mlp3x_gelu", mm_hidden_size=4, hidden_size=2))
    assert [type(layer) for layer in deep.children()] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert isinstance(build_vision_projector(SimpleNamespace(mm_hidden_size=4, hidden_size=2)), nn.Linear)
    with pytest.raises(ConfigError, match="resampler"):
        build_vision_projector(SimpleNamespace(mm_projector_type="resampler", mm_hidden_size=4, hidden_size=2))
