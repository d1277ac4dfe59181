"""Tiny models as the old loader gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llavakit.model.llava import Llava
from llavakit.model.presets import clip, llama
from llavakit.preprocess import Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.tiling import RELEASED, tiles_of
from tiny import tiny_config


@pytest.fixture(scope="session")
def tiny(tiny_model_dir: Path) -> LlavaLlamaForCausalLM:
    """Views of 56 pixels, 16 tokens each, one a picture; tests do not change it."""
    _, model, _, _ = load_pretrained_model(str(tiny_model_dir), None, "tiny", torch_dtype=torch.float32)
    return model


@pytest.fixture(scope="session")
def tiny_next(tokenizer: Any) -> LlavaLlamaForCausalLM:
    """Tiles, counts and grids of LLaVA-NeXT at their real size, 24 x 24 patches of 336 pixels; only the widths are small."""
    text = llama(width=32, layers=2, heads=4, feed_forward=64, rows=len(tokenizer), positions=4096, pad=tokenizer.pad_token_id)
    vision = clip(size=336, width=16, layers=2, heads=2, projection=16)
    canvases = tiles_of(RELEASED, 336)
    fields: dict[str, Any] = {"text": text, "vision": vision, "canvases": canvases, "merge": "spatial_unpad", "arithmetic": "original"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(tiny_config(tokenizer, **fields)).eval()
    processor = Processor(
        tokenizer=tokenizer, template=TEMPLATES["llava_v1"], preprocess=Preprocess(size=336, aspect="squash"), tiling=model.config.tiling,
        max_length=4096, image_pieces="original",
    )  # fmt: skip
    return LlavaLlamaForCausalLM(model, processor).eval()
