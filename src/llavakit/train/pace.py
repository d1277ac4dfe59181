"""How fast this machine trains: some optimizer steps of shallow models of the run's widths, on made-up samples of its lengths.

    seconds of a micro-batch  =  of one layer each  +  (layers - 1) x one more layer of the tower  +  the same of the language model
    seconds of a step         =  micro-batches x the above  +  numbers that learn x update

Three models are timed: with one layer of the tower and one of the language model, with two more of the one, with two more of the other.
So what every micro-batch costs however deep the model is (pictures, head, loss, the calls themselves) is not taken for depth. The rest is
``train.plan``'s: its formulas carry the rate to another batch and other lengths. A run is planned before its model and its data are
there: ``llava plan RECIPE --gpu here``. What a run does beside its steps (opening pictures, saving, measuring) is not in it; a rehearsal
(``llava train RECIPE ... --dry-run``) knows more.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from dataclasses import dataclass, replace

import torch

from llavakit.config import TrainConfig
from llavakit.model.cards import Card
from llavakit.model.llava import IGNORED
from llavakit.model.presets import ModelConfig
from llavakit.processor import Batch
from llavakit.train import start
from llavakit.train.described import outline
from llavakit.train.optim import Optimizer
from llavakit.train.plan import GIB, Run, flops

MORE = 2  # layers added to see what one takes
TOKENS = 1024  # of a measured micro-batch at least, where the run's rows hold them
LEAST, MOST, PATIENCE = 3, 30, 3.0  # measured steps of a model, and seconds after which no more are begun


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


def measure(run: Run, config: TrainConfig) -> Pace:
    """Train three shallow models for some seconds. What they compute is the run's: what learns, dtypes, kernels, packing."""
    rows = max(1, min(config.batch_size, math.ceil(TOKENS / run.tokens)))
    tower, text = depths(run.config)
    flat, wide, deep = (_timed(run, config, shallow(run.config, *layers), rows) for layers in ((1, 1), (1 + MORE, 1), (1, 1 + MORE)))
    spent = flat.seconds
    for one, layers in ((wide, tower), (deep, text)):
        more = min(MORE, layers - 1)
        spent += (layers - 1) * max(0.0, one.seconds - flat.seconds) / more if more else 0.0
    return Pace(
        rate=rows * flops(rounded(run, run.config)).total / spent, update=statistics.median(one.update for one in (flat, wide, deep)),
        spread=max(one.spread for one in (flat, wide, deep)), steps=sum(one.steps for one in (flat, wide, deep)),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """``seconds`` of a micro-batch forward and backward, ``update`` of a step for each number that learns, ``spread`` as in ``Pace``."""

    seconds: float
    update: float
    spread: float
    steps: int


def _timed(run: Run, config: TrainConfig, shape: ModelConfig, rows: int) -> _Timed:
    """Steps of one shallow model."""
    device = start.device(config)
    dtype = start.forward_dtype(config, device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, rates = outline(config, shape, device="cpu", dtype=dtype)
        batch = made_up(rounded(run, shape), rows, pack=config.pack)
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
    seconds = statistics.median(passes[1:])  # the first one warms up
    least, _, most = statistics.quantiles(passes[1:], n=4)
    return _Timed(
        seconds=seconds, update=statistics.median(updates[1:]) / optimizer.learned, spread=(most - least) / seconds, steps=len(passes) - 1
    )


def depths(config: ModelConfig) -> tuple[int, int]:
    """Layers of the tower that are run, and of the language model."""
    return range(int(config.vision["num_hidden_layers"]) + 1)[config.select_layer], int(config.text["num_hidden_layers"])


def shallow(config: ModelConfig, tower: int, text: int) -> ModelConfig:
    """The same widths; at most so many layers of the tower that are run, and of the language model."""
    layers, (run, deep) = int(config.vision["num_hidden_layers"]), depths(config)
    vision = {**config.vision, "num_hidden_layers": layers - run + min(run, tower)}
    words = {key: value for key, value in config.text.items() if key != "layer_types"}
    return replace(config, vision=vision, text=words | {"num_hidden_layers": min(deep, text)})


def rounded(run: Run, shape: ModelConfig) -> Run:
    """The run whose samples are all as these are on the mean, in whole views and tokens."""
    seen = max(1, round(run.image_tokens / shape.view_tokens)) if run.views else 0
    text = max(2, round(run.text_tokens))
    return replace(
        run, config=shape, views=seen, image_tokens=seen * shape.view_tokens, text_tokens=text,
        learned_tokens=min(max(1, round(run.learned_tokens)), text - 1), padding=1.0, matrices=None, numbers=None,
    )  # fmt: skip


def made_up(tried: Run, rows: int, *, pack: bool) -> Batch:
    """A micro-batch of such samples (``rounded``)."""
    shape, seen, learned = tried.config, int(tried.views), int(tried.learned_tokens)
    grid = replace(shape, canvases=(), merge="flat").tiling.grid(shape.image_size, shape.image_size)
    length = int(tried.tokens)
    ids = torch.full((rows, length), 5)
    ids[:, 1 : 1 + seen * grid.tokens] = shape.image_token_id
    labels = torch.full((rows, length), IGNORED)
    labels[:, length - learned :] = 7
    positions = torch.arange(length).expand(rows, -1)
    views = torch.randn(rows * seen, 3, shape.image_size, shape.image_size)
    segments = (length,) * rows if pack else ()
    ids, labels, positions = (value.reshape(1 if pack else rows, -1) for value in (ids, labels, positions))
    return Batch(ids, labels, torch.ones_like(ids, dtype=torch.bool), positions, views, (grid,) * (rows * seen), segments)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
