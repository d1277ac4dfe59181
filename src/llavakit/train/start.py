"""What a run starts from: a native checkpoint, or a CLIP tower and a language model joined by an untrained projector.

Also where it computes, in which arithmetic, and how each weight is held: learned ones in fp32, frozen ones as they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.errors import CheckpointError, ConfigError
from llavakit.images import Preprocess
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES, Template

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # spec 2.1
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ROWS_ROUNDED_TO = 64  # spec 1.6: the embedding grows to a multiple of 64


def settled(config: TrainConfig) -> TrainConfig:
    """The same run with absolute paths, so that its echo reruns from anywhere. Raises ConfigError ``missing_option``."""
    if config.data is None:
        raise ConfigError("no training data", code="missing_option", where="data", remedy="give data=<LLaVA JSON or JSONL file>")
    if config.start is None and (config.tower is None or config.decoder is None):
        raise ConfigError(
            "nothing to start from",
            code="missing_option",
            where="start",
            remedy="give start=<checkpoint>, or tower=<folder> decoder=<folder>",
        )
    if config.start is not None and (config.tower is not None or config.decoder is not None):
        raise ConfigError("both a checkpoint and parts", code="bad_value", where="start", remedy="give start, or tower and decoder")
    template(config.template)
    images = config.images if config.images is not None else config.data.parent
    resume = config.resume if config.resume in ("auto", "never") else str(Path(config.resume).absolute())
    paths = {
        name: path.absolute() if path is not None else None
        for name, path in {"start": config.start, "tower": config.tower, "decoder": config.decoder, "data": config.data}.items()
    }
    return replace(config, **paths, images=images.absolute(), out=config.out.absolute(), resume=resume)  # type: ignore[arg-type]


def template(name: str) -> Template:
    if name not in TEMPLATES:
        raise ConfigError(f"no prompt format '{name}'", code="bad_value", where="template", remedy=f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def device(config: TrainConfig) -> torch.device:
    """The device asked for; auto takes the first there is of cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = config.device if config.device != "auto" else next(kind for kind, present in there.items() if present)
    if not there[name]:
        raise ConfigError(f"this machine has no {name}", code="bad_value", where="device", remedy="use device=auto")
    return torch.device(name)


def forward_dtype(config: TrainConfig, where: torch.device) -> torch.dtype:
    """bf16 where asked for, or where it is auto and the hardware multiplies it natively; else fp32."""
    if config.dtype != "auto":
        return torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if where.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = where.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32
