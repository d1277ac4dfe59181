"""A run's options as ``train.plan`` computes with them: what learns of which model, and how much there is to learn from.

TrainConfig (recipes.py, key=value)  +  Llava, with memory or without  +  Samples (published, measured, or given)  ->  plan.Run
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from llavakit.config import TrainConfig
from llavakit.errors import ConfigError
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.train import lora, start
from llavakit.train.plan import Held, Lengths, Part, Run
from llavakit.train.stages import LORA, STAGES

PARTS: Mapping[str, Part] = {"vision_tower.": "tower", "multi_modal_projector.": "projector", "language_model.": "language_model"}
PACKED: Mapping[int, Held] = {8: "8bit", 4: "4bit"}


@dataclass(frozen=True, kw_only=True)
class Samples(Lengths):
    """The samples of an epoch."""

    samples: int | None = None
    "How many; none where the recipe brings no data of its own."


def outline(
    config: TrainConfig, shape: ModelConfig, *, device: str = "meta", dtype: torch.dtype = torch.float32
) -> tuple[Llava, dict[str, float]]:
    """A model of the run's kind, its adapters attached, and what of it learns at which rate: without memory, or of random weights."""
    stage, adapters = STAGES[config.stage], config.lora
    with torch.device(device):
        model = Llava(shape)
        if adapters is not None:
            layers, stage = lora.targets(model, adapters), LORA
            if adapters.bits < 16 and device != "meta":
                lora.pack(model, adapters.bits, device=start.device(config), forward=dtype)
            lora.attach(model, adapters, layers)
    return model, stage.with_rows(config.rates).apply(model)


def described(config: TrainConfig, model: Llava, learning: Iterable[str], data: Samples, *, stored: torch.dtype = torch.bfloat16) -> Run:
    """The run as a value. ``learning``: names of parameters; ``stored``: how frozen weights are held. Raises ConfigError."""
    if data.samples is None and config.steps is None:
        raise ConfigError("nobody said how many samples there are", code="missing_option", where="samples", remedy="give samples=N")
    counts = {name: model.get_parameter(name).numel() for name in learning}
    matrices = sum(count for name, count in counts.items() if lora.is_matrix(name))
    learns = tuple(part for start, part in PARTS.items() if any(name.startswith(start) and not lora.is_matrix(name) for name in counts))
    idle = set(model.vision_tower.never_run())
    bits = config.lora.bits if config.lora is not None else 16
    batch = min(config.batch_size * config.accumulation, data.samples or sys.maxsize)  # a step sees no sample twice
    held: Held = "fp32" if stored == torch.float32 and config.frozen_dtype == "keep" else "bf16"
    return Run(
        config=model.config, samples=data.samples or 1, epochs=config.epochs, batch=batch, views=data.views,
        image_tokens=data.image_tokens, text_tokens=data.text_tokens, learned_tokens=data.learned_tokens, padding=data.padding,
        learns=learns, rank=config.lora.r if config.lora is not None else 0, matrices=matrices if config.lora is not None else None,
        numbers=sum(count for name, count in counts.items() if name not in idle), weights=PACKED.get(bits, held),
        checkpointing=config.gradient_checkpointing,
    ).cut_to(config.steps)  # fmt: skip


def planned(config: TrainConfig, shape: ModelConfig, data: Samples) -> Run:
    """A run that has no files yet."""
    shape = shape if config.aspect == "anyres" else replace(shape, canvases=(), merge="flat")
    return described(config, *outline(config, shape), data)
