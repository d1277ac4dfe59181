"""How fast this machine trains: some optimizer steps of a shallow model of the run's widths, on made-up samples of its lengths.

    seconds of a step  =  batch x FLOPs of a sample / rate  +  numbers that learn x update

Both rates are measured here, on a few layers; ``train.plan``'s formulas carry them to the whole depth, another batch and other lengths.
So a run is planned before its model and its data are there: ``llava plan RECIPE --gpu here``. What a run does beside its steps (opening
pictures, saving, measuring) is not in it; a rehearsal (``llava train RECIPE ... --dry-run``) knows more.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import dataclass, replace

import torch

from llavakit.config import TrainConfig
from llavakit.model.llava import IGNORED
from llavakit.model.presets import ModelConfig
from llavakit.processor import Batch
from llavakit.train import start
from llavakit.train.cards import Card
from llavakit.train.described import outline
from llavakit.train.optim import Optimizer
from llavakit.train.plan import GIB, Run, flops

DEPTH = 2  # layers of the tower that are run, and of the language model
TOKENS = 1024  # of a measured micro-batch at least, where the run's rows hold them
LEAST, MOST, PATIENCE = 3, 30, 6.0  # measured steps, and seconds after which no more are begun


@dataclass(frozen=True, kw_only=True)
class Pace:
    """``rate`` in FLOP/s, ``update`` in seconds for each number that learns, ``spread`` how far steps lay apart (share of the median)."""

    rate: float
    update: float
    spread: float
    steps: int


def here(config: TrainConfig, pace: Pace) -> Card:
    """This machine as a card whose whole peak is reached."""
    device = start.device(config)
    if device.type == "cuda":
        size = torch.cuda.get_device_properties(device).total_memory
    else:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    narrow = start.forward_dtype(config, device) == torch.bfloat16
    return Card(memory=size / GIB, peak=pace.rate, bf16=narrow, mask=1 if device.type == "cuda" else 4)


def measure(run: Run, config: TrainConfig, *, depth: int = DEPTH) -> Pace:
    """Train a shallow model of the run's widths for some seconds. What it computes is the run's: what learns, dtypes, kernels, packing."""
    device = start.device(config)
    dtype = start.forward_dtype(config, device)
    shape = shallow(run.config, depth)
    rows = max(1, min(config.batch_size, math.ceil(TOKENS / run.tokens)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, rates = outline(config, shape, device="cpu", dtype=dtype)
        batch, tried = made_up(run, shape, rows, pack=config.pack)
    for name in model.vision_tower.never_run():
        model.get_parameter(name).requires_grad_(False)
        rates.pop(name, None)
    start.place(model, rates, device=device, forward=dtype, frozen="bf16")
    start.set_modes(config, model, rates, device=device, forward=dtype)
    optimizer = Optimizer(
        model, rates, lr=1e-6, weight_decay=config.weight_decay, betas=config.betas, clip=config.clip, kind=config.optimizer
    )
    batch = batch.to(device, torch.float32)
    passes, updates, began = list[float](), list[float](), time.perf_counter()
    while len(passes) <= LEAST or (len(passes) <= MOST and time.perf_counter() - began < PATIENCE):
        begun = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(batch).loss_sum / 100
        loss.backward()
        passed = _now(device)
        optimizer.clip_gradients()
        optimizer.step(1.0)
        optimizer.forget_gradients()
        passes.append(passed - begun)
        updates.append(_now(device) - passed)
    spent = statistics.median(passes[1:])  # the first one warms up
    least, _, most = statistics.quantiles(passes[1:], n=4)
    return Pace(
        rate=rows * flops(tried).total / spent, update=statistics.median(updates[1:]) / optimizer.learned, spread=(most - least) / spent,
        steps=len(passes) - 1,
    )  # fmt: skip


def shallow(config: ModelConfig, depth: int) -> ModelConfig:
    """The same widths; so many layers of the tower that are run, and of the language model."""
    layers = int(config.vision["num_hidden_layers"])
    unread = layers - range(layers + 1)[config.select_layer]
    vision = {**config.vision, "num_hidden_layers": min(layers, depth + unread)}
    text = {key: value for key, value in config.text.items() if key != "layer_types"}
    return replace(config, vision=vision, text=text | {"num_hidden_layers": min(int(text["num_hidden_layers"]), depth)})


def made_up(run: Run, shape: ModelConfig, rows: int, *, pack: bool) -> tuple[Batch, Run]:
    """A micro-batch of samples as the run's are on the mean, rounded; and the run of such samples and this shape."""
    seen = max(1, round(run.image_tokens / shape.view_tokens)) if run.views else 0
    grid = replace(shape, canvases=(), merge="flat").tiling.grid(shape.image_size, shape.image_size)
    text, learned = max(2, round(run.text_tokens)), max(1, round(run.learned_tokens))
    length = seen * grid.tokens + text
    ids = torch.full((rows, length), 5)
    ids[:, 1 : 1 + seen * grid.tokens] = shape.image_token_id
    labels = torch.full((rows, length), IGNORED)
    labels[:, length - min(learned, text - 1) :] = 7
    positions = torch.arange(length).expand(rows, -1)
    views = torch.randn(rows * seen, 3, shape.image_size, shape.image_size)
    segments = (length,) * rows if pack else ()
    ids, labels, positions = (value.reshape(1 if pack else rows, -1) for value in (ids, labels, positions))
    batch = Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), positions, views, (grid,) * (rows * seen), segments)
    tried = replace(
        run, config=shape, views=seen, image_tokens=seen * grid.tokens, text_tokens=text, learned_tokens=min(learned, text - 1),
        padding=1.0, matrices=None, numbers=None,
    )  # fmt: skip
    return batch, tried


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
