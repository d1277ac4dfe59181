"""What makes a language model a LLaVA, under its old names: features of pictures take the place of -200 (spec 1.8).

    images --tower, projector--> V.P.H --merge--> rows of each picture, one queue for the whole batch --+
    input_ids B.T  -->  per row: drop padding, embed the words, put in the next rows at each -200  <----+
                        cut at tokenizer_model_max_length, pad to the longest

Shapes: B rows, T ids, V views, P tokens of a view, H width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llavakit.errors import PromptError
from llavakit.model.llava import Llava
from llavakit.model.merge import merge
from llavakit.processor import Processor
from llavakit.tiling import Grid, Merge, Tiling, pinpoints

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "get_anyres_image_grid_shape", "unpad_image"]

_log = logging.getLogger(__name__)


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """A map (C, H, W) without the padding that a picture of ``original_size`` (width, height) leaves on its canvas (spec 2.5)."""
    rows, columns = tensor.shape[1:]
    whole = Tiling(side=1, patch=1, canvases=((columns, rows),), merge="spatial_unpad", arithmetic="original").grid(*original_size)
    return tensor[:, whole.trim_y : rows - whole.trim_y, whole.trim_x : columns - whole.trim_x]


class LlavaMetaModel:
    """``get_model()``: the parts by their old names; all others are those of the language model's body (``layers``, ``norm``)."""

    def __init__(self, llava: Llava, processor: Processor, config: Any) -> None:
        self.config = config
        self.vision_tower = CLIPVisionTower(llava, processor.preprocess)
        projector = llava.multi_modal_projector
        layers = [projector.linear_1, projector.act, projector.linear_2]
        self.mm_projector = projector.linear_1 if llava.config.projector == "linear" else nn.Sequential(*layers)
        self._llava = llava

    @property
    def image_newline(self) -> nn.Parameter | None:
        """The vector that ends a row."""
        return self._llava.image_newline

    @property
    def embed_tokens(self) -> nn.Embedding:
        return self._llava.language_model.get_input_embeddings()  # type: ignore[no-any-return]

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.vision_tower

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # what copy and pickle ask of an object that is not filled yet
        return getattr(self.__dict__["_llava"].language_model.base_model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._llava.language_model.base_model(*args, **kwargs)


class LlavaMetaForCausalLM:
    """Mixed into a module that has ``llava``, ``processor`` and ``config``."""

    llava: Llava
    processor: Processor
    config: Any

    @cached_property
    def _parts(self) -> LlavaMetaModel:
        return LlavaMetaModel(self.llava, self.processor, self.config)

    def get_model(self) -> LlavaMetaModel:
        return self._parts

    def get_vision_tower(self) -> CLIPVisionTower:
        return self.get_model().get_vision_tower()

    def encode_images(self, images: Tensor) -> Tensor:
        """Views (V, 3, S, S) as the language model reads them, (V, P, H)."""
        tower, linear = self.get_vision_tower(), self.llava.multi_modal_projector.linear_1
        features = tower(images.to(tower.dtype))
        return self.get_model().mm_projector(features.to(linear.weight.device, linear.weight.dtype))  # type: ignore[no-any-return]

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_key_values: Any,
        labels: Tensor | None,
        images: Tensor | list[Tensor] | None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Any, Tensor | None, Tensor | None]:
        """(None, positions, mask, past, embeddings B.T.H, labels); positions, mask and labels are None where they were.

        Without pictures, or with one id a row (a decoding step), everything as it was and no embeddings. Pictures are taken in order over
        the whole batch; a row without -200 takes one too and shows nothing of it. Raises PromptError where they do not suffice.
        """
        if images is None and bool((input_ids == IMAGE_TOKEN_INDEX).any()):
            raise PromptError("places for images but no images", code="image_count", where="images", remedy="pass one for each <image>")
        if images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        queue = iter(self._image_rows(images, image_sizes))
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        known = torch.full_like(input_ids, IGNORE_INDEX) if labels is None else labels
        rows = [self._assembled(ids[real], marks[real], queue) for ids, marks, real in zip(input_ids, known, kept, strict=True)]
        limit = getattr(self.config, "tokenizer_model_max_length", None)
        if limit is not None and any(len(embeddings) > limit for embeddings, _ in rows):
            _log.warning("cut at tokenizer_model_max_length %d; the end of the text is lost", limit)
            rows = [(embeddings[:limit], marks[:limit]) for embeddings, marks in rows]
        left = getattr(self.config, "tokenizer_padding_side", "right") == "left"
        embedded = padded([embeddings for embeddings, _ in rows], 0, left=left)
        mask = padded([torch.ones_like(marks) for _, marks in rows], 0, left=left)
        positions = padded([torch.arange(len(marks), device=marks.device) for _, marks in rows], 0, left=left)
        return (
            None,
            None if position_ids is None else positions.to(position_ids.dtype),
            None if attention_mask is None else mask.to(attention_mask.dtype),
            past_key_values,
            embedded,
            None if labels is None else padded([marks for _, marks in rows], IGNORE_INDEX, left=left),
        )

    def _assembled(self, ids: Tensor, labels: Tensor, queue: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """One row's embeddings T.H with its pictures in place, and its labels."""
        places = ids == IMAGE_TOKEN_INDEX
        count = int(places.sum())
        pictures = [_next(queue) for _ in range(count)] or [_next(queue)[:0]]  # nothing of it, but the projector stays in the graph
        words = self.get_model().embed_tokens(ids[~places])
        source = torch.cat([words, *(rows.to(words.device, words.dtype) for rows in pictures)])
        times = torch.ones_like(ids)
        times[places] = torch.tensor([len(rows) for rows in pictures[:count]], dtype=ids.dtype, device=ids.device)
        shown = places.repeat_interleave(times)
        order = torch.where(shown, len(words) + shown.cumsum(0), (~shown).cumsum(0)) - 1
        return source[order], labels.masked_fill(places, IGNORE_INDEX).repeat_interleave(times)

    def _image_rows(self, images: Tensor | list[Tensor], sizes: Sequence[tuple[int, int]] | None) -> Sequence[Tensor]:
        """The rows of each picture. A tensor (B, 3, S, S) holds one view a picture; a list, or one dimension more, the views of each."""
        if isinstance(images, Tensor) and images.ndim == 4:
            return self.encode_images(images)  # type: ignore[return-value]  # iterated like a list
        views = [image[None] if image.ndim == 3 else image for image in images]
        features = self.encode_images(torch.cat(views))
        newline = self.get_model().image_newline
        grids = [self._grid(len(view), sizes, index) for index, view in enumerate(views)]
        parts = features.split([len(view) for view in views])
        return [merge(part, [grid], newline) for part, grid in zip(parts, grids, strict=True)]

    @property
    def _merging(self) -> Merge:
        return getattr(self.config, "mm_patch_merge_type", "flat")  # type: ignore[no-any-return]

    def _grid(self, views: int, sizes: Sequence[tuple[int, int]] | None, index: int) -> Grid:
        """How the views of a picture are joined (spec 2.5)."""
        tiling, merging = self.llava.config.tiling, self._merging
        side = tiling.side // tiling.patch
        if merging == "flat" or views == 1:
            whole = {"columns": views - 1, "rows": 1} if views > 1 else {}
            return Grid(view=side, merge=merging, class_token=tiling.class_token, **whole)
        if sizes is None:
            raise PromptError("tiles without the picture's size", code="image_sizes", remedy="pass image_sizes, (width, height) of each")
        canvases = pinpoints(self.config.image_grid_pinpoints, side=tiling.side, height_first=False)
        rule = Tiling(side=tiling.side, patch=tiling.patch, canvases=canvases, merge=merging, arithmetic=tiling.arithmetic)
        grid = rule.grid(*sizes[index])
        if grid.views != views:
            raise PromptError(
                f"{views} views where a picture of {sizes[index]} has {grid.views}",
                code="image_sizes",
                where=f"images[{index}]",
                remedy="pass what process_images made, and the sizes in the same order",
            )
        return grid


def padded(rows: Sequence[Tensor], value: float, *, left: bool) -> Tensor:
    """Tensors of different lengths as one, (B, longest, ...)."""
    longest = max(len(row) for row in rows)
    spare = [(longest - len(row), 0) if left else (0, longest - len(row)) for row in rows]
    return torch.stack([F.pad(row, (0, 0) * (row.ndim - 1) + ends, value=value) for row, ends in zip(rows, spare, strict=True)])


def _next(queue: Iterator[Tensor]) -> Tensor:
    rows = next(queue, None)
    if rows is None:
        raise PromptError("fewer images than places for them", code="image_count", remedy="pass one image for each <image>")
    return rows
