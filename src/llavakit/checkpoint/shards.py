"""Weights into files: config first, then one safetensors file, or several and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llavakit.checkpoint import files

MAX_SHARD_BYTES = 5_000_000_000
Shards = list[dict[str, Tensor]]


def split(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, limit: int = MAX_SHARD_BYTES) -> Shards:
    """The weights in order, as many in a file as ``limit`` bytes allow; none is cut. Nothing is copied yet."""
    shards: Shards = [{}]
    size = 0
    for name, value in weights:
        more = value.numel() * (dtype or value.dtype).itemsize
        if shards[-1] and size + more > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += more
    return shards


def write(folder: Path, shards: Shards, dtype: torch.dtype | None) -> None:
    """One file for each shard, and an index where there are several. ``dtype`` None keeps each weight's own."""
    placed: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = files.SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        ready = {name: value.detach().to("cpu", dtype or value.dtype).contiguous() for name, value in shard.items()}
        save_file(ready, folder / file, metadata={"format": "pt"})
        (folder / file).chmod((folder / files.CONFIG).stat().st_mode)  # safetensors makes it private
        placed |= dict.fromkeys(ready, file)
        total += sum(value.nbytes for value in ready.values())
    if len(shards) > 1:
        write_json(folder / files.INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
