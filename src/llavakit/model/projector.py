"""The connector between the towers' words: features of width D become embeddings of width H (spec 1.5).

linear       D -> H                               LLaVA v1
mlp2x_gelu   D -> H -> GELU (exact erf) -> H      LLaVA-1.5; not CLIP's quick GELU (trap 34)
"""

from __future__ import annotations

from torch import Tensor, nn

from llavakit.model.presets import ProjectorKind


class Projector(nn.Module):
    """One linear layer, or two with an exact GELU between them."""

    def __init__(self, kind: ProjectorKind, *, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_width, text_width)
        self.act = nn.GELU() if kind == "mlp2x_gelu" else nn.Identity()
        self.linear_2 = nn.Linear(text_width, text_width) if kind == "mlp2x_gelu" else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(..., D) to (..., H)."""
        return self.linear_2(self.act(self.linear_1(features)))  # type: ignore[no-any-return]
