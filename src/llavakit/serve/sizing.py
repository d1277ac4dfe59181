"""How many requests a second a GPU replies to, and how many GPUs a load needs.

    read     bound by arithmetic    P    = operations / (FLOP/s)                                                  seconds a request
    write    bound by memory        D(b) = the larger of (weights + b x keys and values) / (bytes/s), b x operations / (FLOP/s)
    memory   weights + b x keys and values of a whole conversation <= the card                                    -> at most b*

With b replies in one step a request costs P and R x D(b) / b, R being its reply's tokens. So a GPU that does nothing else gives

    1 / (P + R x D(b*) / b*)    requests a second,

and at a smaller load so many replies are under way as Little's law says: b = load x seconds of a reply, which depend on b.
The rates are the card's, times what engines reach of them, or measured here (``serve.measured``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llavakit.errors import ConfigError
from llavakit.model.cards import Card
from llavakit.model.presets import ModelConfig
from llavakit.model.sizes import Sizes

GIB = 2**30
READ, WRITE = 0.5, 0.7  # reached of a card's arithmetic while prompts are read, of its memory's rate while replies are written
TOGETHER = 0.8  # of the sum of cards that share one model
SEQUENCES = 256  # replies at a time in the larger engines, unless told otherwise


@dataclass(frozen=True, kw_only=True)
class Request:
    """The usual request. ``prompt``: tokens of text and pictures together; ``views``: squares that the tower sees."""

    prompt: int
    reply: int
    views: int

    @property
    def whole(self) -> int:
        """Positions that its keys and values take at the end."""
        return self.prompt + self.reply


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds: ``prefill`` of a request; of a step, ``base`` whatever the batch and ``each`` more for a reply, and never less than
    ``least`` for a reply."""

    prefill: float
    base: float
    each: float
    least: float = 0.0

    def step(self, replies: float) -> float:
        """One token for each of so many replies."""
        return max(self.base + replies * self.each, replies * self.least)


def read_operations(config: ModelConfig, sizes: Sizes, request: Request) -> float:
    """Operations from pictures and words to the first token; a product and a sum are two."""
    vision = config.vision
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    layers = range(int(vision["num_hidden_layers"]) + 1)[config.select_layer]
    places = (config.image_size // config.patch_size) ** 2 + 1
    view = layers * (2 * places * (4 * width**2 + 2 * width * inner) + 4 * places**2 * width)
    view += 2 * places * (3 * config.patch_size**2 * width) + 2 * sizes.projector * config.view_tokens
    words = 2 * sizes.packable * request.prompt + 2 * sizes.layers * request.prompt**2 * sizes.width
    return request.views * view + words + 2 * config.rows * sizes.width


def pace(config: ModelConfig, sizes: Sizes, request: Request, card: Card, *, cards: int = 1, kind: str = "bf16") -> Pace:
    """What ``cards`` of a kind do together on one copy of the model, held as ``kind`` (a key of ``model.sizes.BITS``).

    Raises ConfigError where the card's rates are not known.
    """
    if not card.bandwidth or not card.serving:
        raise ConfigError("its rates are not known", code="unknown_card", where="--gpu", remedy="name a card, or measure: --gpu here")
    share = cards * (TOGETHER if cards > 1 else 1.0)
    arithmetic, memory = share * card.serving * READ, share * card.bandwidth * WRITE
    head = config.rows * sizes.width
    held = sizes.weights(kind) - (sizes.total - sizes.packable - head) * 2  # what a step reads: the layers and the head
    middle = request.prompt + request.reply / 2
    operations = 2 * (sizes.packable + head) + 4 * sizes.layers * sizes.width * middle
    return Pace(
        prefill=read_operations(config, sizes, request) / arithmetic, base=held / memory,
        each=sizes.cache(1, kind) * middle / memory, least=operations / arithmetic,
    )  # fmt: skip


def most(sizes: Sizes, request: Request, memory: float, *, kind: str = "bf16") -> int:
    """Replies at a time: what the memory (bytes, of all cards that share the model) holds, and no more than engines run."""
    return min(SEQUENCES, sizes.batch(memory, request.whole, kind))


def capacity(pace: Pace, reply: int, at_once: int) -> float:
    """Requests a second of one copy of the model that never rests. 0 when not one conversation fits."""
    return 1 / (pace.prefill + reply * pace.step(at_once) / at_once) if at_once else 0.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """One copy of the model under a load: ``replies`` under way on the mean, seconds to the first token, of a token, of a request."""

    share: float
    replies: float
    first: float
    token: float
    whole: float


def under(pace: Pace, reply: int, at_once: int, load: float) -> Load | None:
    """The steady state at ``load`` requests a second; None when it is more than the copy can do."""
    limit = capacity(pace, reply, at_once)
    reading = load * pace.prefill
    if load >= limit or reading >= 1:
        return None
    low, high = 0.0, float(at_once)  # what is under way at a step's pace grows slower than the pace allows: one crossing
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if load * reply * pace.step(middle) / (1 - reading) > middle else (low, middle)
    token = pace.step(high) / (1 - reading)
    first = token + pace.prefill * (1 + reading / (2 * (1 - reading)))
    return Load(share=load / limit, replies=load * reply * token, first=first, token=token, whole=first + reply * token)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """So many copies of the model, each on ``cards`` GPUs, for a load. ``each``: one copy at its share of it."""

    copies: int
    cards: int
    at_once: int
    limit: float
    each: Load

    @property
    def gpus(self) -> int:
        return self.copies * self.cards


def fleet(pace: Pace, request: Request, at_once: int, load: float, *, cards: int = 1, headroom: float = 0.7) -> Fleet:
    """The fewest copies that carry ``load`` requests a second at ``headroom`` of what they can. Raises ConfigError."""
    if load <= 0 or not 0 < headroom < 1:
        what = f"{load:g} requests a second" if load <= 0 else f"a share of {headroom:g}"
        raise ConfigError(f"{what} cannot be planned for", code="bad_value", where="--load", remedy="give a load above 0, a share below 1")
    limit = capacity(pace, request.reply, at_once)
    if not limit:
        what = f"not one conversation of {request.whole} tokens fits beside the weights"
        raise ConfigError(what, code="no_room", where="--gpu", remedy="take a larger card, or more for one copy: --devices")
    copies = math.ceil(load / (headroom * limit))
    each = under(pace, request.reply, at_once, load / copies)
    assert each is not None, "a share of what a copy can do is less than it"
    return Fleet(copies=copies, cards=cards, at_once=at_once, limit=limit, each=each)
