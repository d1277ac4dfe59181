"""The vision tower under its old name and with its old properties; the walk through CLIP is llavakit's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil

from llavakit.model.llava import Llava
from llavakit.preprocess import Preprocess

_NAMES = {
    (1024, 24, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 24, 14, 224): "openai/clip-vit-large-patch14",
}


class CLIPVisionTower(nn.Module):
    """Pictures in, features of one layer out. The weights are those of the ``Llava`` it is made from."""

    is_loaded = True

    def __init__(self, llava: Llava, preprocess: Preprocess) -> None:
        super().__init__()
        self.vision_tower = llava.vision_tower
        self.vision_tower_name = tower_name(llava)
        self.select_layer = llava.config.select_layer
        self.select_feature = llava.config.select_feature
        self.image_processor = _image_processor(preprocess, tiled=bool(llava.config.canvases))

    def load_model(self, device_map: Any = None) -> None:
        """Nothing to do: the tower comes with the model."""

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (V, P, D) of views (V, 3, S, S), in the type of the views; of a list of pictures (3, S, S), a list."""
        if isinstance(images, list):
            return [self.vision_tower(image[None]).to(image.dtype) for image in images]
        return self.vision_tower(images).to(images.dtype)  # type: ignore[no-any-return]

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> Any:
        """transformers' CLIPVisionConfig."""
        return self.vision_tower.vision_model.config

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def num_patches_per_side(self) -> int:
        return int(self.config.image_size) // int(self.config.patch_size)

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def tower_name(llava: Llava) -> str:
    """The published tower of this shape; "clip" where there is none."""
    vision = llava.config.vision
    shape = vision["hidden_size"], vision["num_hidden_layers"], vision["patch_size"], vision["image_size"]
    return _NAMES.get(shape, "clip")


def _image_processor(preprocess: Preprocess, *, tiled: bool) -> Any:
    """CLIP's own: padding and tiles are ``process_images``' affair, which asks ``base_aspect`` about the base view."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": preprocess.size},
        crop_size={"height": preprocess.size, "width": preprocess.size},
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
        base_aspect=preprocess.aspect if tiled else "squash",
    )
