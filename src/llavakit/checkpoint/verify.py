"""The same files through this package and through transformers, stage by stage; the first stage that differs is named.

    picture --> pixels --> features --+
                                      +--> logits --> greedy reply        each stage is given the other side's outcome of the one
    words ----> token ids ------------+                                   before, so that a difference is told where it arises

transformers is the oracle, with its PIL processor. A checkpoint in the original layout is written as llava-hf in a temporary folder
first (``llava convert`` proves that step); what transformers cannot represent is said instead of compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from llavakit.checkpoint import store
from llavakit.checkpoint.layouts import describe
from llavakit.errors import CheckpointError
from llavakit.images import open_image
from llavakit.model.generation import generate
from llavakit.model.llava import Llava
from llavakit.model.merge import merge
from llavakit.processor import Batch, Processor
from llavakit.types import Conversation, Image, Pixels, Sampling

PIXELS, LOGITS = 1 / 255, 1e-5  # one level of a picture; relative to the largest
NEW_TOKENS = 32
QUESTION = "What is in the picture?"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One comparison. ``difference`` is infinite where the shapes differ."""

    name: str
    difference: float
    allowed: float
    what: str

    @property
    def same(self) -> bool:
        return self.difference <= self.allowed


def verify(
    folder: Path,
    image: Image | None = None,
    question: str = QUESTION,
    *,
    allow_pickle: bool = False,
    base: Path | None = None,
    tower: Path | None = None,
) -> list[Stage]:
    """All stages in order, in fp32 on the CPU; base and tower as for ``store.load``.

    Raises CheckpointError ``not_comparable`` for what transformers cannot represent.
    """
    layout = describe(folder, allow_pickle=allow_pickle)
    config, reader = store.outline(folder, allow_pickle=allow_pickle, base=base, tower=tower)
    tiled, view = bool(config.canvases), reader.preprocess.aspect
    if config.projector != "mlp2x_gelu" or config.merge != ("spatial_unpad" if tiled else "flat") or (tiled and view != "squash"):
        tiles = f"{len(config.canvases)} canvases, merge {config.merge} and a base made by '{view}'"
        what = f"transformers has no LLaVA with a {config.projector} projector, {tiles}"
        raise CheckpointError(what, code="not_comparable", where=str(folder), remedy="there is nothing to compare it with")
    model, processor = store.load(folder, dtype="fp32", allow_pickle=allow_pickle, base=base, tower=tower)
    asked = Conversation.ask(question, image or _picture())
    if layout.kind == "hf":
        return list(_stages(layout.folder, model, processor, asked))
    with TemporaryDirectory() as room:
        written = Path(room) / "hf"
        store.save(model, processor, written)
        return list(_stages(written, *store.load(written, dtype="fp32"), asked))


def _stages(folder: Path, model: Llava, processor: Processor, asked: Conversation) -> Iterator[Stage]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    reader = AutoProcessor.from_pretrained(folder, use_fast=False)
    pictures: list[PIL.Image.Image] = [open_image(image) for image in asked.images]
    text = reader.apply_chat_template(_messages(asked), add_generation_prompt=True)
    given: Any = reader(images=pictures or None, text=text, return_tensors="pt")
    batch = processor.collate([processor.encode(asked, learn=False)], side="left")
    yield _pixels(batch, given["pixel_values"], processor.preprocess.std)
    yield _ids(batch.input_ids[0].tolist(), given["input_ids"][0].tolist())
    given["pixel_values"] = batch.views[None] if given["pixel_values"].dim() == 5 else batch.views  # the same pixels from here on
    if batch.input_ids.shape != given["input_ids"].shape:
        return  # other places for the picture: nothing after this can be compared
    given |= {"input_ids": batch.input_ids}
    with torch.inference_mode():
        sizes = {"image_sizes": given["image_sizes"]} if "image_sizes" in given else {}
        found: Any = theirs.model.get_image_features(pixel_values=given["pixel_values"], **sizes)
        features = getattr(found, "pooler_output", found)
        expected = torch.cat(list(features)) if not isinstance(features, Tensor) else features
        yield _apart("features", merge(model.encode_views(batch.views), batch.grids, model.image_newline), expected.flatten(0, -2))
        yield _apart("logits", model(batch, full_logits=True).logits, theirs(**given).logits)
    theirs.generation_config.eos_token_id = None  # both go on to the same length
    written = theirs.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[0, batch.input_ids.shape[1] :].tolist()
    (ours,) = generate(model, batch, sampling=Sampling(max_new_tokens=NEW_TOKENS), stop_ids=frozenset())
    yield _greedy(ours, written)


def _messages(asked: Conversation) -> list[dict[str, Any]]:
    """As a user of transformers writes them."""
    return [
        {"role": one.role, "content": [{"type": "image"}] * len(one.images) + [{"type": "text", "text": one.text.lstrip("\n")}]}
        for one in asked.messages
    ]


def _pixels(batch: Batch, theirs: Tensor, std: Sequence[float]) -> Stage:
    theirs = theirs.flatten(0, 1) if theirs.dim() == 5 else theirs
    if theirs.shape != batch.views.shape:
        return Stage(
            name="pixels", difference=math.inf, allowed=PIXELS, what=f"{tuple(batch.views.shape)} here, {tuple(theirs.shape)} there"
        )
    levels = ((batch.views - theirs) * torch.tensor(std)[:, None, None]).abs()
    return Stage(name="pixels", difference=float(levels.max()), allowed=PIXELS, what=f"{len(batch.views)} views")


def _ids(ours: list[int], theirs: list[int]) -> Stage:
    unlike = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if ours == theirs:
        return Stage(name="token ids", difference=0, allowed=0, what=f"{len(ours)} tokens")
    what = f"{len(ours)} here, {len(theirs)} there; unlike from position {unlike} on"
    return Stage(name="token ids", difference=math.inf, allowed=0, what=what)


def _apart(name: str, ours: Tensor, theirs: Tensor) -> Stage:
    if ours.shape != theirs.shape:
        return Stage(name=name, difference=math.inf, allowed=LOGITS, what=f"{tuple(ours.shape)} here, {tuple(theirs.shape)} there")
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    return Stage(name=name, difference=difference, allowed=LOGITS, what=" x ".join(map(str, ours.shape)))


def _greedy(ours: list[int], theirs: list[int]) -> Stage:
    alike = int(np.cumprod([a == b for a, b in zip(ours, theirs, strict=True)]).sum())
    return Stage(name="greedy reply", difference=len(theirs) - alike, allowed=0, what=f"{alike} of {len(theirs)} tokens alike")


def _picture() -> Image:
    """Neither square nor plain: a gradient with noise, larger than a view in both directions."""
    width, height = 500, 333
    rng = np.random.default_rng(0)
    across, down = np.meshgrid(np.linspace(30, 220, width), np.linspace(220, 40, height))
    levels = np.stack([across, down, (across + down) / 2], axis=-1) + rng.normal(0, 12, (height, width, 3))
    return Image(Pixels(width=width, height=height, rgb=levels.clip(0, 255).astype(np.uint8).tobytes()))
