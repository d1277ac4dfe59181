"""What a run is like on samples it never learns from: loss by source and kind, and a fixed panel of pictures and their replies.

    held-out samples --groups--> "coco, picture": 1.93   "chat, text": 2.41      evaluations.jsonl, one line a measurement
    the first of them with a picture: question, truth, reply now                  panel.json, once: with the pictures made small

Measuring draws no random number and changes no weight: a run that is watched gives the same bits as one that is not.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llavakit.config import TrainConfig
from llavakit.data.holdout import Part
from llavakit.data.loader import Loader
from llavakit.data.sources import Sample
from llavakit.images import open_image
from llavakit.model.generation import generate
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.train.compiled import uncompiled
from llavakit.train.progress import PANEL
from llavakit.train.ranks import Ranks
from llavakit.types import Conversation, Sampling

REPLY = Sampling(max_new_tokens=64)
THUMBNAIL = 160  # pixels


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The groups of held-out samples, and those of the panel with their first questions."""

    groups: Mapping[str, Part]
    panel: tuple[Sample, ...]

    @staticmethod
    def of(groups: Mapping[str, Part], panel: int) -> Watch:
        pictured = (sample for name, part in groups.items() if name.endswith("picture") for sample in part)
        return Watch(groups=groups, panel=tuple(sample for sample, _ in zip(pictured, range(panel), strict=False)))

    def write_panel(self, out: Path) -> None:
        """panel.json: id, question, true reply and a small picture of each."""
        rows = []
        for sample in self.panel:
            asked, truth = _first_question(sample)
            question = "".join(message.text for message in asked.turns).strip()
            rows.append({"id": sample.id, "question": question, "truth": truth, "picture": _thumbnail(sample)})
        (out / PANEL).write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, then each as it was."""
    were = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in were:
            module.training = training


def measure(
    watch: Watch,
    *,
    model: Llava,
    forward: nn.Module,
    processor: Processor,
    config: TrainConfig,
    ranks: Ranks,
    device: torch.device,
    narrow: bool,
) -> dict[str, Any]:
    """Mean loss over the learned tokens of each group, and the panel's replies (None where the model is cut into parts)."""
    with evaluating(model), uncompiled(config.compile), torch.autocast(device.type, torch.bfloat16, enabled=narrow):
        losses = {name: _loss(part, forward, processor, config, ranks, device) for name, part in watch.groups.items()}
        cut = any(isinstance(parameter, DTensor) for parameter in model.parameters())
        replies = None if cut or not ranks.main else [_reply(sample, model, processor, device) for sample in watch.panel]
    return {"losses": losses, "replies": replies}


def _loss(
    part: Part, forward: nn.Module, processor: Processor, config: TrainConfig, ranks: Ranks, device: torch.device
) -> dict[str, float]:
    loader = Loader(
        part, processor, batch_size=config.batch_size, accumulation=ranks.world, seed=0, lengths=part.lengths(), pack=config.pack,
        placement=config.placement, rank=ranks.rank, world=ranks.world, on_bad=config.on_bad_sample,
    )  # fmt: skip
    total, learned, samples = 0.0, 0, 0
    for _, window in zip(range(loader.steps_per_epoch), loader, strict=False):
        for batch in window.batches:
            total += float(forward(batch.to(device, torch.float32)).loss_sum)
        learned, samples = learned + window.learned, samples + window.samples
    total, learned, samples = (kind(value) for kind, value in zip((float, int, int), ranks.sums([total, learned, samples]), strict=True))
    return {"loss": total / max(1, learned), "learned": learned, "samples": samples}


def _reply(sample: Sample, model: Llava, processor: Processor, device: torch.device) -> str:
    inputs = processor.encode(_first_question(sample)[0], learn=False)
    batch = processor.collate([inputs], side="left").to(device, torch.float32)
    (ids,) = generate(model, batch, sampling=REPLY, stop_ids=processor.stop_ids)
    return processor.decode(ids).strip()


def _first_question(sample: Sample) -> tuple[Conversation, str]:
    """The conversation up to its first reply, and that reply."""
    messages = sample.conversation.messages
    first = next(number for number, message in enumerate(messages) if message.role == "assistant")
    return Conversation(messages=messages[:first]), messages[first].text.strip()


def _thumbnail(sample: Sample) -> str:
    picture = open_image(sample.conversation.images[0])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
