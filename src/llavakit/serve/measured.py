"""How fast this machine reads and writes: shallow models of the checkpoint's widths, some steps each, in seconds.

    seconds of a model  =  of one with 1 layer  +  (layers - 1) x half of what 2 more layers take       tower and language model apart

The steps are the engine's own (``model.generation``); weights are random, for they take as long.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llavakit.checkpoint.dtypes import choose_dtype
from llavakit.model.cpu import accelerate_cpu
from llavakit.model.generation import Past, decode_one, prefill_embeddings
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig
from llavakit.serve.sizing import Pace, Request

MORE = 2  # layers added to see what one takes
MANY = 8  # replies in a step, to see what one more takes
LEAST, PATIENCE = 3, 1.0  # runs of a step, and seconds after which no more are begun


@dataclass(frozen=True)
class _Times:
    """Seconds: one view through the tower, the prompt through the language model, a step of one reply, a step of many."""

    view: float
    prompt: float
    one: float
    many: float


def measure(config: ModelConfig, request: Request, *, device: str | None = None) -> Pace:
    """Of this machine, on its GPU where it has one."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tower, text = _depths(config)
    flat, deep = _timed(config, request, place, 1), _timed(config, request, place, 1 + MORE)

    def whole(name: str, layers: int) -> float:
        first, more = getattr(flat, name), getattr(deep, name)
        added = min(1 + MORE, layers) - 1
        return float(first + ((layers - 1) * max(0.0, more - first) / added if added else 0.0))

    one, many = whole("one", text), whole("many", text)
    each = max(0.0, many - one) / (MANY - 1)
    return Pace(prefill=request.views * whole("view", tower) + whole("prompt", text), base=max(0.0, one - each), each=each)


def memory(device: str | None = None) -> float:
    """Bytes of the GPU, or of this machine."""
    if (device or "cuda").startswith("cuda") and torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _depths(config: ModelConfig) -> tuple[int, int]:
    return range(int(config.vision["num_hidden_layers"]) + 1)[config.select_layer], int(config.text["num_hidden_layers"])


def _shallow(config: ModelConfig, layers: int) -> ModelConfig:
    """The same widths; at most so many layers of the tower that are run, and of the language model."""
    run, deep = _depths(config)
    behind = int(config.vision["num_hidden_layers"]) - run
    text = {name: value for name, value in config.text.items() if name != "layer_types"}
    vision = {**config.vision, "num_hidden_layers": behind + min(run, layers)}
    return replace(config, vision=vision, text=text | {"num_hidden_layers": min(deep, layers)})


@torch.inference_mode()
def _timed(config: ModelConfig, request: Request, place: torch.device, layers: int) -> _Times:
    dtype = choose_dtype(torch.bfloat16, place)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llava(_shallow(config, layers)).to(place, dtype).eval()
    if place.type == "cpu":
        accelerate_cpu(model, packed=(model.vision_tower, model.multi_modal_projector))
    views = torch.zeros(1, 3, config.image_size, config.image_size, device=place, dtype=dtype)
    words = torch.zeros(1, request.prompt, int(config.text["hidden_size"]), device=place, dtype=dtype)
    places = torch.arange(request.prompt, device=place)[None]
    past = Past.empty(model)

    def read() -> None:
        nonlocal past
        past = Past.empty(model)
        prefill_embeddings(model, words, mask=torch.ones_like(places, dtype=torch.bool), positions=places, past=past)

    def write(replies: int) -> Callable[[], object]:
        tokens = torch.zeros(replies, dtype=torch.long, device=place)
        return lambda: decode_one(model, tokens, past)

    view, prompt, one = (_seconds(run, place) for run in (lambda: model.encode_views(views), read, write(1)))
    past.repeat(MANY)
    return _Times(view, prompt, one, _seconds(write(MANY), place))


def _seconds(run: Callable[[], object], place: torch.device) -> float:
    """The median of some runs, the first left out: it warms up."""
    spent, began = list[float](), time.perf_counter()
    while len(spent) <= LEAST or (len(spent) < 20 and time.perf_counter() - began < PATIENCE):
        begun = time.perf_counter()
        run()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        spent.append(time.perf_counter() - begun)
        if time.perf_counter() - began > 10 * PATIENCE and len(spent) > 1:
            break
    return statistics.median(spent[1:])
