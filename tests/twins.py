"""A tiny model of transformers and ours from the same folder, and what both make of a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.types import Conversation

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "sliding_window": 24},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
}
NEW = 32


@dataclass(frozen=True, kw_only=True, repr=False)
class Twin:
    """A folder written by transformers, its model there, and ours from the same folder."""

    folder: Path
    theirs: Any
    reader: Any  # transformers' processor
    ours: Llava
    processor: Processor


def picture(seed: int, width: int = 90, height: int = 60) -> PIL.Image.Image:
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return PIL.Image.fromarray(pixels.numpy())


def messages(talk: Conversation) -> list[dict[str, Any]]:
    """As a user of transformers writes them."""
    return [
        {"role": m.role, "content": [{"type": "image"}] * len(m.images) + [{"type": "text", "text": m.text.lstrip("\n")}]}
        for m in talk.turns
    ]


def their_inputs(twin: Twin, talks: list[Conversation]) -> dict[str, Tensor]:
    texts = twin.reader.apply_chat_template([messages(talk) for talk in talks], add_generation_prompt=True, tokenize=False)
    pictures = [PIL.Image.frombytes("RGB", (p.source.width, p.source.height), p.source.rgb) for talk in talks for p in talk.images]  # type: ignore[union-attr]
    return dict(twin.reader(text=texts, images=pictures or None, padding=True, return_tensors="pt"))


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())
