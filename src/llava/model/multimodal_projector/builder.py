"""A connector by its old name. Those that LLaVA released are also ``llavakit.model.projector``; this one has any depth."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from llavakit.errors import ConfigError


class IdentityMap(nn.Module):
    """Features as they are."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    @property
    def config(self) -> dict[str, str]:
        return {"mm_projector_type": "identity"}


def build_vision_projector(config: Any, delay_load: bool = False, **kwargs: Any) -> nn.Module:
    """``linear``, ``mlp{N}x_gelu`` or ``identity`` from ``mm_hidden_size`` to ``hidden_size``, randomly initialised (spec 1.5).

    ``delay_load`` and other words are accepted and mean nothing, as before. Raises ConfigError for other kinds.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "identity":
        return IdentityMap()
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    layered = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if not layered:
        raise ConfigError(f"'{kind}' is no projector", code="bad_projector", where="mm_projector_type", remedy="use linear or mlp2x_gelu")
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(1, int(layered[1])):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]  # exact GELU, not CLIP's quick one (trap 34)
    return nn.Sequential(*layers)
