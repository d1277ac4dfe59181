"""What a training run computes, holds and costs: closed formulas over a plain value, before anything is downloaded.

    hours  = samples x epochs x FLOPs of a sample / (devices x peak x utilisation)
    memory = weights + bf16 copies + gradients + moments + activations of the rows read at a time + logits

    passes over                      forward   again   gradient of what goes in   gradient of the weights
      a tower that is frozen            1        -               -                           -
      a tower that learns               1        c               1                           1       c: gradient checkpointing
      a language model that is frozen   1        c               1                           -       (the projector stands below it)
      a language model that learns      1        c               1                           1

A matrix product of m x k and k x n counts 2mkn, attention its whole square (kernels that skip the future do half of that), nothing else
counts. Only learned positions reach the head. Computing a layer again stops before its last product, which nothing keeps. The numbers of
parameters are those of ``model.sizes``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from llavakit.errors import ConfigError
from llavakit.model.cards import Card
from llavakit.model.presets import ModelConfig

if TYPE_CHECKING:
    from llavakit.model.sizes import Sizes

Part = Literal["tower", "projector", "language_model"]
Sharding = Literal["none", "ddp", "fsdp"]
Held = Literal["fp32", "bf16", "8bit", "4bit"]
GIB = 2**30
SPARE = 0.06  # of a card: the driver, fragmentation, work space
UTILISATION = 0.43  # of the peak: what the four published runs of LLaVA-1.5 reached, 0.40 to 0.49 (train/published.py)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What a sample holds; tokens and views are means."""

    views: float
    "Views of a sample; text-only samples have none."
    image_tokens: float
    "Image tokens of a sample."
    text_tokens: float
    "All other tokens of a sample."
    learned_tokens: float
    "Tokens of a sample that carry loss."
    padding: float = 1.0
    "Positions computed for each token: 1 when samples are packed, more where rows are filled up to the longest."


@dataclass(frozen=True, kw_only=True)
class Run(Lengths):
    """A stage of training."""

    config: ModelConfig = field(repr=False)
    "The model."
    samples: int
    "Samples of an epoch."
    epochs: int = 1
    "Times through them."
    batch: int
    "Samples in one optimizer step, on all devices."
    learns: tuple[Part, ...] = ("projector",)
    "The parts whose own weights learn."
    rank: int = 0
    "Rank of LoRA adapters on the linear layers of the language model; 0 is none."
    matrices: int | None = None
    "Parameters of the adapters, where it is not the rank on all of these layers."
    numbers: int | None = None
    "How many numbers learn, where it is not all of these parts and adapters."
    weights: Held = "bf16"
    "How frozen weights are held; 8bit and 4bit mean the linear layers of the language model."
    checkpointing: bool = True
    "Gradient checkpointing."

    def __post_init__(self) -> None:
        if min(self.samples, self.epochs, self.batch, self.padding) < 1:
            raise ConfigError("samples, epochs, batch and padding are at least 1", code="bad_value", where="plan")
        if not self.learns and not self.rank:
            raise ConfigError("nothing learns", code="bad_value", where="learns", remedy="name a part, or give a rank")
        if "language_model" in self.learns and (self.rank or self.weights in ("8bit", "4bit")):
            raise ConfigError("a language model that learns has no adapters and is not packed", code="bad_value", where="learns")

    def cut_to(self, steps: int | None) -> Run:
        """The same run ended after so many steps; None is as it is."""
        return self if steps is None else replace(self, samples=steps * self.batch, epochs=1)

    @property
    def tokens(self) -> float:
        """Tokens of a sample."""
        return self.image_tokens + self.text_tokens

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(self.samples / self.batch) * self.epochs

    @cached_property
    def sizes(self) -> Sizes:
        """Parameters, counted on a model without memory."""
        from llavakit.model import sizes

        return sizes.sizes(sizes.empty(self.config))

    @property
    def attention_width(self) -> int:
        """All heads of a layer together."""
        text = self.config.text
        heads = int(text["num_attention_heads"])
        return heads * int(text.get("head_dim") or self.sizes.width // heads)

    @property
    def adapters(self) -> int:
        """Parameters of the LoRA adapters: rank x (in + out) of every linear layer inside the language model, unless given."""
        if self.matrices is not None:
            return self.matrices
        made, wide = self.sizes, self.attention_width
        ends = 2 * (made.width + wide) + 2 * (made.width + made.kv_width) + 3 * (made.width + made.feed_forward)
        return self.rank * ends * made.layers

    @property
    def learned(self) -> int:
        """Parameters that learn and get a gradient."""
        return self._of_parts if self.numbers is None else self.numbers

    @property
    def _of_parts(self) -> int:
        """All of the parts named and the adapters; the tower's layers behind the one that is read never learn."""
        made = self.sizes
        owned = {"tower": made.tower - made.idle, "projector": made.projector, "language_model": made.language_model}
        rows = made.row_end if "language_model" in self.learns else 0
        return sum(owned[part] for part in self.learns) + rows + self.adapters


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations of one sample, by part, forward and backward."""

    tower: float
    projector: float
    layers: float
    attention: float
    head: float
    adapters: float

    @property
    def total(self) -> float:
        return sum(float(getattr(self, part.name)) for part in fields(self))


def flops(run: Run) -> Flops:
    """Of one sample of the run's mean length."""
    made, length = run.sizes, run.tokens * run.padding
    again = float(run.checkpointing)
    own = float("language_model" in run.learns)
    return Flops(
        tower=run.views * _view(run),
        projector=run.views * _projector(run),
        layers=2 * length * (made.packable * (2 + again + own) - again * made.layers * made.width * made.feed_forward),
        attention=4 * length**2 * run.attention_width * made.layers * (3 + again),
        head=2 * run.config.rows * made.width * run.learned_tokens * (2 + own),
        adapters=2 * run.adapters * length * (3 + again),
    )


def _view(run: Run) -> float:
    """One view through the tower, up to the layer that is read."""
    vision, learns = run.config.vision, "tower" in run.learns
    width, hidden = int(vision["hidden_size"]), int(vision["intermediate_size"])
    layers = range(int(vision["num_hidden_layers"]) + 1)[run.config.select_layer]
    patches = (run.config.image_size // run.config.patch_size) ** 2
    rows = patches + 1  # and the CLS row
    layer = 2 * rows * (4 * width**2 + 2 * width * hidden) + 4 * rows**2 * width
    cut = 2 * patches * 3 * run.config.patch_size**2 * width
    if not learns:
        return cut + layers * layer
    return 2 * cut + layers * (3 * layer + run.checkpointing * (layer - 2 * rows * width * hidden))


def _projector(run: Run) -> float:
    """The features of one view through the projector."""
    inner, width = int(run.config.vision["hidden_size"]), run.sizes.width
    own, below = "projector" in run.learns, "tower" in run.learns
    first = 2 * inner * width * (1 + own + below)
    second = 2 * width**2 * (1 + own + (own or below)) if run.config.projector == "mlp2x_gelu" else 0
    return run.config.view_tokens * float(first + second)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the fullest moment: in a later micro-batch, whose gradients are added to those there.

    ``copies``: bf16 copies of learned weights, or the layers gathered from other devices.
    """

    weights: float
    copies: float
    gradients: float
    moments: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return sum(float(getattr(self, part.name)) for part in fields(self))


def memory(run: Run, *, rows: int, devices: int = 1, sharding: Sharding = "none", bf16: bool = True, mask: int = 1) -> Memory:
    """For ``rows`` samples read at a time on each device. Learned weights, gradients and AdamW's two moments are fp32."""
    made = run.sizes
    share = devices if sharding == "fsdp" else 1
    weights = 4 * run.adapters + _weights(run, bf16=bf16)
    largest = max(made.packable / made.layers, run.config.rows * made.width)
    cast = 2 if bf16 else 4
    gathered = 2 * largest * cast  # this one and the next
    copies = gathered if share > 1 else cast * run.learned * bf16
    return Memory(
        weights=weights / share,
        copies=copies,
        gradients=4 * run.learned / share,
        moments=8 * run.learned / share,
        activations=rows
        * (activations(run, bf16=bf16, mask=mask) + 3 * cast * made.feed_forward * run.tokens * run.padding),  # and one layer's own
        logits=rows * run.learned_tokens * run.config.rows * (10 if bf16 else 12),  # as computed, in fp32, and their gradient
    )


def _weights(run: Run, *, bf16: bool) -> float:
    made, held = run.sizes, "fp32" if not bf16 and run.weights == "bf16" else run.weights
    each = 2 if bf16 and held != "fp32" else 4
    from llavakit.model.sizes import BITS

    packed = made.packable * BITS[held] / 8 + (made.language_model - made.packable) * each
    parts = {"tower": made.tower, "projector": made.projector, "language_model": made.language_model}
    frozen = {"tower": made.tower * each, "projector": made.projector * each, "language_model": packed}
    row_end = made.row_end * (4 if "language_model" in run.learns else each)
    idle = made.idle * (4 - each) * ("tower" in run.learns)  # what is never run stays as it came
    back = (run._of_parts - run.learned) * (4 - each)  # of parts that learn, what rows of rates hold back
    return row_end - idle - back + sum(4 * count if part in run.learns else frozen[part] for part, count in parts.items())


def activations(run: Run, *, bf16: bool = True, mask: int = 1) -> float:
    """Bytes kept for the backward pass of one sample; ``mask``: those of dropout for each number, 1 on a card, 4 on a CPU.

    Of a decoder layer: both norms' input (and, when it learns, what they give, and a copy for each of the five layers that read it),
    q, k, v, what they give, the two halves of the feed-forward, their product. Checkpointing keeps each layer's input, and one layer.
    """
    made, wide = run.sizes, run.attention_width
    own, length = "language_model" in run.learns, run.tokens * run.padding
    stream = 4 if own or not bf16 else 2  # bytes of the residual stream
    size = 2 if bf16 else 4
    attended = size * (2 * wide + 2 * made.kv_width)
    if own:
        layer = made.width * (16 + (5 * size if bf16 else 0)) + attended + 4 * size * made.feed_forward
    else:
        layer = made.width * 8 + attended + 3 * size * made.feed_forward
    if run.rank:  # each of seven adapters keeps what dropout left of its input, which inputs those were, and what A gives
        layer += (size + mask) * (5 * made.width + wide + made.feed_forward) + 7 * size * run.rank
    kept = layer + made.layers * stream * made.width if run.checkpointing else made.layers * layer
    last = made.width * (8 if own else 4)  # the norm before the head
    return length * (kept + last) + run.views * _tower_kept(run, size)


def _tower_kept(run: Run, size: int) -> float:
    vision = run.config.vision
    width, hidden, rows = int(vision["hidden_size"]), int(vision["intermediate_size"]), run.config.view_tokens + 1
    layers = range(int(vision["num_hidden_layers"]) + 1)[run.config.select_layer]
    features = rows * size * (width + 3 * run.sizes.width)
    layer = rows * (width * 10 * size + 3 * size * hidden)
    if "tower" not in run.learns:
        return features
    return features + (layer + layers * rows * 4 * width if run.checkpointing else layers * layer)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on some devices. ``rows`` are read at a time on each; ``accumulation`` times make a step."""

    run: Run
    devices: int
    sharding: Sharding
    rows: int
    flops: Flops
    memory: Memory
    room: float
    hours: float
    utilisation: float

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    @property
    def accumulation(self) -> int:
        return max(1, math.ceil(self.run.batch / (self.rows * self.devices)))

    @property
    def words(self) -> str:
        """The same as options of ``llava train``."""
        shard = "full" if self.sharding == "fsdp" else "none"
        return f"batch_size={self.rows} accumulation={self.accumulation * self.devices} shard={shard}"

    def cost(self, price: float) -> float:
        """At ``price`` for one device and hour."""
        return self.hours * self.devices * price


def hours(run: Run, *, rate: float, update: float = 0.0) -> float:
    """At ``rate`` FLOP/s of all devices together, and ``update`` seconds of a step for each number that learns (``pace``)."""
    return (run.samples * run.epochs * flops(run).total / rate + run.steps * run.learned * update) / 3600


def calibrate(run: Run, seconds_of_a_step: float, *, peak: float) -> float:
    """The utilisation that a measured optimizer step shows; ``peak`` is that of all devices together."""
    return flops(run).total * run.batch / (seconds_of_a_step * peak)


def plan(
    run: Run, card: Card, *, devices: int = 1, sharding: Sharding | None = None, utilisation: float = UTILISATION, update: float = 0.0
) -> Plan:
    """With as many rows at a time as fit, in halves of a device's share of the batch. Without a sharding, the simplest that fits."""
    if devices < 1 or not 0 < utilisation <= 1:
        raise ConfigError("devices are at least 1, utilisation is above 0 and at most 1", code="bad_value", where="plan")
    several: tuple[Sharding, ...] = ("ddp", "fsdp") if run.weights in ("bf16", "fp32") else ("ddp",)  # packed layers are not cut (lora.py)
    ways: tuple[Sharding, ...] = (sharding,) if sharding else ("none",) if devices == 1 else several
    room = card.memory * GIB * (1 - SPARE)
    for way in ways:
        for rows in _halves(run.batch // devices):
            held = memory(run, rows=rows, devices=devices, sharding=way, bf16=card.bf16, mask=card.mask)
            if held.total <= room or (way == ways[-1] and rows == 1):
                spent = hours(run, rate=devices * card.peak * utilisation, update=update / (devices if way == "fsdp" else 1))
                return Plan(
                    run=run, devices=devices, sharding=way, rows=rows, flops=flops(run), memory=held, room=room, hours=spent,
                    utilisation=utilisation,
                )  # fmt: skip
    raise AssertionError("the last way with one row is always taken")


def remedies(made: Plan, card: Card) -> Iterator[tuple[str, Plan]]:
    """Changes that make it fit, the smallest first: words for the command line, and what they give."""
    run, devices, rate = made.run, made.devices, made.utilisation
    learns = tuple(part for part in run.learns if part != "language_model")
    lighter = replace(run, learns=learns, rank=run.rank or 128, numbers=None if "language_model" in run.learns else run.numbers)
    tries: list[tuple[str, Run]] = []
    again = "" if run.checkpointing else "gradient_checkpointing=true "
    if again:
        tries.append((again.strip(), replace(run, checkpointing=True)))
        lighter = replace(lighter, checkpointing=True)
    if "language_model" in run.learns:
        tries.append((f"{again}lora.r=128", lighter))
    if run.weights != "4bit" and (run.rank or "language_model" in run.learns):
        tries.append((f"{again}lora.bits=4", replace(lighter, weights="4bit")))
    for words, changed in tries:
        found = plan(changed, card, devices=devices, utilisation=rate)
        if found.fits:
            yield words, found
    for more in (2, 4, 8, 16, 32):
        if more > devices:
            found = plan(run, card, devices=more, utilisation=rate)
            if found.fits:
                yield f"--devices {more}", found
                return


def _halves(count: int) -> Iterator[int]:
    rows = max(1, count)
    while rows > 1:
        yield rows
        rows //= 2
    yield 1
