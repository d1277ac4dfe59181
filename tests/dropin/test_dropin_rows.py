"""What the old model object makes of ids and pictures: the rows of specification 1.8 and 2.8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from asking import pixels_of
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llavakit.errors import PromptError


@pytest.mark.parametrize(
    ("size", "views", "rows"), [((1000, 667), 5, 2202), ((900, 330), 4, 2242), ((336, 336), 3, 58 + 1176), ((1000, 10), 4, 58 + 576)]
)
def test_rows_of_the_specification(tiny_next: LlavaLlamaForCausalLM, size: tuple[int, int], views: int, rows: int) -> None:
    model = tiny_next
    pixels = pixels_of(model, PIL.Image.new("RGB", size))
    assert pixels.shape == (1, views, 3, 336, 336)
    ids = torch.full((1, 59), 300)
    ids[0, 34] = IMAGE_TOKEN_INDEX
    with torch.no_grad():
        out = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels, image_sizes=[size])
    assert out[:4] == (None, None, None, None)
    assert out[4] is not None
    assert out[4].shape == (1, rows, 32)
    assert out[5] is None


def test_a_view_without_tiles_is_closed_by_one_row_end(tiny_next: LlavaLlamaForCausalLM) -> None:
    ids, view = torch.tensor([[9, IMAGE_TOKEN_INDEX]]), torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        listed, whole = (tiny_next.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, form)[4] for form in ([view], view))
    assert listed is not None and whole is not None  # noqa: PT018  for mypy
    assert (listed.shape[1], whole.shape[1]) == (1 + 577, 1 + 576)  # a tensor of four dimensions never had row ends
    assert torch.equal(listed[:, :-1], whole)
    assert torch.equal(listed[0, -1], torch.as_tensor(tiny_next.get_model().image_newline))


def test_features_have_the_published_shapes(tiny_next: LlavaLlamaForCausalLM) -> None:
    views = torch.randn(2, 3, 336, 336)
    with torch.no_grad():
        assert tiny_next.get_vision_tower()(views).shape == (2, 576, 16)
        assert [one.shape for one in tiny_next.get_vision_tower()(list(views))] == [(1, 576, 16)] * 2
        assert tiny_next.encode_images(views).shape == (2, 576, 32)
        assert torch.equal(tiny_next.encode_images(views), tiny_next.llava.encode_views(views))
        half = views.half()
        assert tiny_next.get_vision_tower()(half).dtype == torch.float16


def prepared(model: LlavaLlamaForCausalLM, ids: Tensor, images: Any, labels: Tensor, mask: Tensor | None = None) -> Any:
    places = torch.arange(ids.shape[1]).expand_as(ids)
    mask = torch.ones_like(ids) if mask is None else mask
    return model.prepare_inputs_labels_for_multimodal(ids, places, mask, "past", labels, images)


def test_rows_are_words_and_pictures_in_order(tiny: LlavaLlamaForCausalLM) -> None:
    ids = torch.tensor([[9, -200, 10, 11, -200], [12, 13, 14, 0, 0], [15, 16, -200, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    images = torch.randn(4, 3, 56, 56)
    with torch.no_grad():
        nothing, positions, known, past, rows, labels = prepared(tiny, ids, images, ids, mask)
        table, seen = tiny.get_input_embeddings().weight, tiny.encode_images(images)
    assert (nothing, past) == (None, "past")
    first = torch.cat([table[[9]], seen[0], table[[10, 11]], seen[1]])
    last = torch.cat([table[[15, 16]], seen[3]])  # the second row has no place for a picture and yet takes one
    for row, expected in zip(rows, (first, table[[12, 13, 14]], last), strict=True):
        count = len(expected)
        assert torch.equal(row[:count], expected)
        assert not row[count:].any()
    gone = [IGNORE_INDEX] * 16
    assert labels[0].tolist() == [9, *gone, 10, 11, *gone]
    assert labels[1].tolist() == [12, 13, 14] + [IGNORE_INDEX] * (len(first) - 3)
    assert known.sum(1).tolist() == [len(first), 3, 18]
    assert positions[1].tolist() == [0, 1, 2] + [0] * (len(first) - 3)
    assert known.dtype == mask.dtype


def test_padding_and_length_follow_the_config(tiny_model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, model, _, _ = load_pretrained_model(tiny_model_dir, None, "", torch_dtype=torch.float32)
    ids = torch.tensor([[9, 10, -200, 11], [12, 13, 14, 15]])
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        right = prepared(model, ids, images, ids)
        model.config.tokenizer_padding_side = "left"
        left = prepared(model, ids, images, ids)
        model.config.tokenizer_model_max_length = 3
        cut = prepared(model, ids, images, ids)
    assert torch.equal(right[4][1, :4], left[4][1, -4:])
    assert left[2][1].tolist() == [0] * 15 + [1] * 4
    assert left[5][1].tolist() == [IGNORE_INDEX] * 15 + [12, 13, 14, 15]
    assert torch.equal(cut[4], right[4][:, :3])
    assert cut[5].tolist() == [[9, 10, IGNORE_INDEX], [12, 13, 14]]
    assert "tokenizer_model_max_length" in caplog.text


def test_nothing_is_assembled_without_pictures_or_for_one_token(tiny: LlavaLlamaForCausalLM) -> None:
    for ids, images in ((torch.tensor([[9, 10]]), None), (torch.tensor([[9]]), torch.randn(1, 3, 56, 56))):
        given = (ids, "positions", "mask", "past", "labels")
        out = tiny.prepare_inputs_labels_for_multimodal(*given, images)  # type: ignore[arg-type]
        assert out == (ids, "positions", "mask", "past", None, "labels")


def test_images_must_suffice(tiny: LlavaLlamaForCausalLM, tiny_next: LlavaLlamaForCausalLM) -> None:
    ids = torch.tensor([[9, -200, -200]])
    with pytest.raises(PromptError, match="fewer images"):
        tiny.generate(ids, images=torch.randn(1, 3, 56, 56))
    for call in (tiny.generate, tiny):
        with pytest.raises(PromptError, match="no images"):
            call(ids)
    tiles = [torch.zeros(3, 3, 336, 336)] * 2
    with pytest.raises(PromptError, match="size"):
        tiny_next.generate(ids, images=tiles)
    with pytest.raises(PromptError, match="3 views where"):
        tiny_next.generate(ids, images=tiles, image_sizes=[(1000, 1000)] * 2)
