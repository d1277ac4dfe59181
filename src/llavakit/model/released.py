"""The published systems as values (spec 1.2, 1.3): a shape, its prompt format, and how its base view becomes square.

    name                 tower        projector   views                        language model
    llava-v1-*           CLIP-L/14    linear      one, cropped                 Vicuna 7B, 13B (v0, v1.1, v1.3)
    llava-v1.5-*         CLIP-L/336   MLP         one, padded                  Vicuna v1.5 7B, 13B
    llava-v1.5-hd-*      CLIP-L/14    MLP         a padded one, up to 6 tiles  Vicuna v1.5 7B, 13B (never published)
    llava-v1.6-*         CLIP-L/336   MLP         a squashed one, 2 to 4 tiles Vicuna v1.5 7B, 13B; Mistral 7B; Yi 34B

The tables have llava-hf's rows: the language model's own, ``<image>`` and ``<pad>``, up to a multiple of 64 (spec 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llavakit.model.presets import CLIP_L_336, ModelConfig, clip, llama
from llavakit.preprocess import Aspect
from llavakit.tiling import HD, RELEASED, tiles_of


@dataclass(frozen=True, kw_only=True)
class System:
    """A published LLaVA: ``template`` names the format of its training (``prompts.TEMPLATES``), ``rows`` its own vocabulary."""

    config: ModelConfig
    template: str
    aspect: Aspect
    rows: int = 32000


_CLIP_L_224 = clip(size=224, width=1024, layers=24, heads=16)
_VICUNA_7B = llama(width=4096, layers=32, heads=32, feed_forward=11008, rows=32064, positions=4096, pad=32001)
_VICUNA_13B = llama(width=5120, layers=40, heads=40, feed_forward=13824, rows=32064, positions=4096, pad=32001)
_FIRST = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}  # Vicuna v0 to v1.3


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_MISTRAL_7B = (
    llama(width=4096, layers=32, heads=32, feed_forward=14336, rows=32064, positions=32768, pad=32001)
    | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None}
    | _rope(1e6)
)
_YI_34B = (
    llama(width=7168, layers=60, heads=56, feed_forward=20480, rows=64064, positions=4096, pad=64001)
    | {"num_key_value_heads": 8, "eos_token_id": 7}
    | _rope(5e6)
)
_V1_7B = ModelConfig(vision=_CLIP_L_224, text=_VICUNA_7B | _FIRST, projector="linear", image_token_id=32000)
_V1_13B = ModelConfig(vision=_CLIP_L_224, text=_VICUNA_13B | _FIRST, projector="linear", image_token_id=32000)
_V15_7B = ModelConfig(vision=CLIP_L_336, text=_VICUNA_7B, image_token_id=32000)
_V15_13B = ModelConfig(vision=CLIP_L_336, text=_VICUNA_13B, image_token_id=32000)


def _hd(config: ModelConfig) -> ModelConfig:
    return replace(config, vision=_CLIP_L_224, canvases=tiles_of(HD, 224), merge="spatial_unpad")


def _next(config: ModelConfig) -> ModelConfig:
    return replace(config, canvases=tiles_of(RELEASED, 336), merge="spatial_unpad")


SYSTEMS: Mapping[str, System] = {
    "llava-v1-7b": System(config=_V1_7B, template="llava_v0", aspect="square"),
    "llava-v1-13b": System(config=_V1_13B, template="llava_v0", aspect="square"),
    "llava-v1-13b-scienceqa": System(config=_V1_13B, template="llava_v0", aspect="square"),
    "llava-v1.5-7b": System(config=_V15_7B, template="vicuna_v1", aspect="pad"),
    "llava-v1.5-13b": System(config=_V15_13B, template="vicuna_v1", aspect="pad"),
    "llava-v1.5-hd-7b": System(config=_hd(_V15_7B), template="vicuna_v1", aspect="pad"),
    "llava-v1.5-hd-13b": System(config=_hd(_V15_13B), template="vicuna_v1", aspect="pad"),
    "llava-v1.6-vicuna-7b": System(config=_next(_V15_7B), template="vicuna_v1", aspect="squash"),
    "llava-v1.6-vicuna-13b": System(config=_next(_V15_13B), template="vicuna_v1", aspect="squash"),
    "llava-v1.6-mistral-7b": System(config=_next(replace(_V15_7B, text=_MISTRAL_7B)), template="mistral_instruct", aspect="squash"),
    "llava-v1.6-34b": System(
        config=_next(replace(_V15_7B, text=_YI_34B, image_token_id=64000)), template="chatml_direct", aspect="squash", rows=64000
    ),
}
