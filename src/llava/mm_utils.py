"""Pictures and ids as the old scripts hand them over. Sizes are (width, height), canvases too.

images --process_images--> tensor, or a list where the shapes differ --+
prompt --tokenizer_image_token--> ids with -200 for each picture ------+--> model.generate
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import StoppingCriteria

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llavakit.tiling import Size, Tiling, pinpoints, placed


def select_best_resolution(original_size: Size, possible_resolutions: Sequence[Sequence[int]]) -> Size | None:
    """The canvas that suits a picture (spec 2.3); of equal ones the first."""
    return Tiling(side=1, patch=1, canvases=tuple((width, height) for width, height in possible_resolutions)).canvas(*original_size)


def resize_and_pad_image(image: PIL.Image.Image, target_resolution: Size) -> PIL.Image.Image:
    """The picture scaled to fit a canvas, in the middle of black."""
    left, top, width, height = placed(*image.size, target_resolution)
    canvas = PIL.Image.new("RGB", (target_resolution[0], target_resolution[1]))
    canvas.paste(image.resize((width, height)), (left, top))
    return canvas


def divide_to_patches(image: PIL.Image.Image, patch_size: int) -> list[PIL.Image.Image]:
    """Square tiles, row by row."""
    corners = [(x, y) for y in range(0, image.height, patch_size) for x in range(0, image.width, patch_size)]
    return [image.crop((x, y, x + patch_size, y + patch_size)) for x, y in corners]


def get_anyres_image_grid_shape(image_size: Size, grid_pinpoints: object, patch_size: int) -> Size:
    """(columns, rows) of the tiles of a picture."""
    width, height = _canvas(image_size, grid_pinpoints, patch_size)
    return width // patch_size, height // patch_size


def process_anyres_image(image: PIL.Image.Image, processor: Any, grid_pinpoints: object) -> Tensor:
    """The base view and the tiles of a picture, (1 + tiles, 3, side, side).

    The base view is squeezed, as in LLaVA-NeXT, unless the processor says ``base_aspect`` "pad" (LLaVA-1.5-HD) or "square".
    """
    side = processor.crop_size["height"]
    tiles = divide_to_patches(resize_and_pad_image(image, _canvas(image.size, grid_pinpoints, side)), side)
    aspect, edge = getattr(processor, "base_aspect", "squash"), processor.size["shortest_edge"]
    base = image.resize((edge, edge)) if aspect == "squash" else _squared(image, processor) if aspect == "pad" else image
    return torch.stack([_pixels(view, processor) for view in (base, *tiles)])


def process_images(images: Sequence[PIL.Image.Image], image_processor: Any, model_cfg: Any) -> Tensor | list[Tensor]:
    """Every picture, in RGB, by the config's ``image_aspect_ratio`` (spec 2.2): one tensor, or a list where the shapes differ."""
    images = [image.convert("RGB") for image in images]  # a palette cannot be padded or resized (trap 36)
    mode = getattr(model_cfg, "image_aspect_ratio", None)
    if mode == "pad":
        made = [_pixels(_squared(image, image_processor), image_processor) for image in images]
    elif mode == "anyres":
        made = [process_anyres_image(image, image_processor, model_cfg.image_grid_pinpoints) for image in images]
    else:
        return image_processor(images, return_tensors="pt")["pixel_values"]  # type: ignore[no-any-return]
    return torch.stack(made) if len({one.shape for one in made}) == 1 else made


def expand2square(pil_img: PIL.Image.Image, background_color: Any) -> PIL.Image.Image:
    """The picture in the middle of a square of one colour; a square picture as it is."""
    side = max(pil_img.size)
    if pil_img.size == (side, side):
        return pil_img
    square = PIL.Image.new(pil_img.mode, (side, side), background_color)
    square.paste(pil_img, ((side - pil_img.width) // 2, (side - pil_img.height) // 2))
    return square


def load_image_from_base64(image: str | bytes) -> PIL.Image.Image:
    """The picture in the base64 text of a file."""
    return PIL.Image.open(io.BytesIO(base64.b64decode(image)))


def tokenizer_image_token(
    prompt: str, tokenizer: Any, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors: str | None = None
) -> list[int] | Tensor:
    """The ids of a prompt, each ``<image>`` as one ``image_token_index``.

    The texts between pictures are tokenised each on its own, so each has the blank that the tokenizer puts in front (spec 3.3).
    """
    pieces: list[list[int]] = [tokenizer(piece).input_ids for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
    begun = int(bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id)  # a beginning token stands before every piece, or none
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [image_token_index, *piece[begun:]]
    if return_tensors not in (None, "pt"):
        raise ValueError(f"Unsupported tensor type: {return_tensors}")
    return ids if return_tensors is None else torch.tensor(ids, dtype=torch.long)


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path; of a training checkpoint, its run's name too: ``run_checkpoint-100``."""
    parts = model_path.strip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):  # type: ignore[misc]
    """True once every row has written a keyword: as its last tokens, or within the text of the last few.

    keywords: strings that end a reply. input_ids: the prompt, (1, T). The rows judged may hold the prompt and the new tokens, or, as
    ``generate`` of a LLaVA gives them, the new tokens alone.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: Any, input_ids: Tensor) -> None:
        self.keywords = list(keywords)
        self.tokenizer = tokenizer
        self.keyword_ids = [torch.tensor(self._without_bos(tokenizer(keyword).input_ids)) for keyword in keywords]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)
        self.prompt = input_ids[0]
        self.start_len = input_ids.shape[1]

    def _without_bos(self, ids: list[int]) -> list[int]:
        return ids[1:] if len(ids) > 1 and ids[0] == self.tokenizer.bos_token_id else ids

    def call_for_batch(self, output_ids: Tensor, scores: Any = None, **_: Any) -> bool:
        """Whether one row, (1, T), has ended."""
        row = output_ids[0]
        prompted = torch.equal(row[: self.start_len], self.prompt.to(row.device))
        new = row[self.start_len :] if prompted else row
        if any(0 < len(ids) <= len(new) and torch.equal(new[-len(ids) :], ids.to(row.device)) for ids in self.keyword_ids):
            return True
        tail = self.tokenizer.decode(new[-self.max_keyword_len :], skip_special_tokens=True) if self.max_keyword_len else ""
        return any(keyword in tail for keyword in self.keywords)

    def __call__(self, output_ids: Tensor, scores: Any = None, **_: Any) -> bool:
        return all(self.call_for_batch(row[None], scores) for row in output_ids)


def _canvas(size: Size, grid_pinpoints: object, side: int) -> Size:
    best = select_best_resolution(size, pinpoints(grid_pinpoints, side=side, height_first=False))
    assert best is not None, "pinpoints give at least one canvas"
    return best


def _squared(image: PIL.Image.Image, processor: Any) -> PIL.Image.Image:
    return expand2square(image, tuple(int(value * 255) for value in processor.image_mean))


def _pixels(image: PIL.Image.Image, processor: Any) -> Tensor:
    return processor.preprocess(image, return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]
