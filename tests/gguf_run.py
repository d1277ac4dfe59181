"""A decoder and a picture reader that know only a GGUF file: the graphs llama.cpp runs, written down in torch.

This is our reading of llama.cpp, not llama.cpp: dev/llama_cpp_check.py runs the real one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class File:
    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.weights = {t.name: torch.from_numpy(np.array(t.data)).reshape([int(n) for n in reversed(t.shape)]) for t in reader.tensors}

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)


def turned(x_htd: Tensor, base: float) -> Tensor:
    """Neighbouring numbers 2i, 2i + 1 are one plane, turned by position * base^(-2i/d)."""
    _, steps, width = x_htd.shape
    angle = torch.arange(steps)[:, None] * base ** (-torch.arange(0, width, 2) / width)
    plane = torch.view_as_complex(x_htd.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(plane * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def logits(path: Path, ids: list[int]) -> Tensor:
    file = File(path)
    key = {name.removeprefix("llama."): value for name, value in file.keys.items()}
    heads, groups, eps = (key[f"attention.{name}"] for name in ("head_count", "head_count_kv", "layer_norm_rms_epsilon"))

    def rms(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], file.weights[f"{name}.weight"], eps)

    x = file.weights["token_embd.weight"][ids]
    for block in (f"blk.{number}" for number in range(key["block_count"])):
        inside = rms(x, f"{block}.attn_norm")
        q, k, v = (
            file.linear(inside, f"{block}.attn_{name}").unflatten(-1, (many, -1)).transpose(0, 1)
            for name, many in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k = turned(q, key["rope.freq_base"]), turned(k, key["rope.freq_base"])
        k, v = (part.repeat_interleave(heads // groups, 0) for part in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
        x = x + file.linear(seen, f"{block}.attn_output")
        inside = rms(x, f"{block}.ffn_norm")
        x = x + file.linear(F.silu(file.linear(inside, f"{block}.ffn_gate")) * file.linear(inside, f"{block}.ffn_up"), f"{block}.ffn_down")
    head = file.weights.get("output.weight", file.weights["token_embd.weight"])
    return rms(x, "output_norm") @ head.T


def embeddings(path: Path, views: Tensor, *, gelu: str) -> Tensor:
    """V.P.H; ``gelu``: "none" for the exact one, "tanh" as llama.cpp does in the projector."""
    file = File(path)
    key = {name.removeprefix("clip.vision."): value for name, value in file.keys.items()}
    heads, eps = key["attention.head_count"], key["attention.layer_norm_epsilon"]
    assert "v.post_ln.weight" not in file.weights  # it would be run
    patches = F.conv2d(views, file.weights["v.patch_embd.weight"], stride=key["patch_size"]).flatten(2).transpose(1, 2)
    first = file.weights["v.class_embd"].expand(len(views), 1, -1)
    x = file.norm(torch.cat([first, patches], 1) + file.weights["v.position_embd.weight"], "v.pre_ln", eps)
    for block in (f"v.blk.{number}" for number in range(key["feature_layer"][0])):
        inside = file.norm(x, f"{block}.ln1", eps)
        q, k, v = (file.linear(inside, f"{block}.attn_{name}").unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
        x = x + file.linear(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), f"{block}.attn_out")
        wide = file.linear(file.norm(x, f"{block}.ln2", eps), f"{block}.ffn_up")
        x = x + file.linear(wide * torch.sigmoid(1.702 * wide), f"{block}.ffn_down")
    return file.linear(F.gelu(file.linear(x[:, 1:], "mm.0"), approximate=gelu), "mm.2")
