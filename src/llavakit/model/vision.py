"""The vision tower: views in, patch features out.

transformers' CLIP model holds the weights; the walk through it stops at the layer that LLaVA reads (spec 1.4):

    views V.3.S.S -> patch embeddings + CLS + positions -> pre-LN -> layer 1 -> ... -> layer L-1 -> layer L -> post-LN
    hidden state                                             0          1                L-1   |      L
                                                                            select_layer -2 ---+  the rest is stored, not run

Shapes: V views, P patches of a view, D width of the tower, S side of a view.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModel

from llavakit.model.presets import SelectFeature


class VisionTower(nn.Module):
    """CLIP up to one hidden state. Equal, bit for bit, to that entry of transformers' ``hidden_states``."""

    def __init__(self, fields: Mapping[str, Any], *, select_layer: int, select_feature: SelectFeature) -> None:
        super().__init__()
        self.vision_model = CLIPVisionModel._from_config(AutoConfig.for_model(**fields))
        self.run_layers = range(int(fields["num_hidden_layers"]) + 1)[select_layer]
        self.first_row = 1 if select_feature == "patch" else 0

    @property
    def dtype(self) -> torch.dtype:
        """The type the tower computes in."""
        return self.vision_model.embeddings.patch_embedding.weight.dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        return self.vision_model.embeddings.patch_embedding.weight.device  # type: ignore[no-any-return]

    def never_run(self) -> list[str]:
        """Names, within LLaVA, of the weights behind the layer that is read: they are stored, and no gradient ever reaches them."""
        model = self.vision_model
        unread = [*model.encoder.layers[self.run_layers :], model.post_layernorm]
        ids = {id(parameter) for part in unread for parameter in part.parameters()}
        return [f"vision_tower.vision_model.{name}" for name, parameter in model.named_parameters() if id(parameter) in ids]

    def forward(self, views_v3ss: Tensor) -> Tensor:
        """Features V.P.D of the selected layer, the CLS row left out unless it was asked for."""
        hidden = self._entered(views_v3ss)
        for layer in self.vision_model.encoder.layers[: self.run_layers]:
            hidden = layer(hidden, None)
        return hidden[:, self.first_row :]

    def in_slices(self, views_v3ss: Tensor) -> Generator[None, None, Tensor]:
        """``forward``, stopping after every layer: a server has others to attend to in between."""
        hidden = self._entered(views_v3ss)
        for layer in self.vision_model.encoder.layers[: self.run_layers]:
            hidden = layer(hidden, None)
            yield
        return hidden[:, self.first_row :]

    def _entered(self, views_v3ss: Tensor) -> Tensor:
        hidden = self.vision_model.embeddings(views_v3ss.to(self.device, self.dtype))
        return self.vision_model.pre_layrnorm(hidden)  # type: ignore[no-any-return]
