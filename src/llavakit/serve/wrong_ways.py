"""The usual ways in which an endpoint serves a LLaVA wrongly, each as our own processor with that one thing changed.

no first token, two of them · no system text · another prompt format · pictures cropped, padded, squashed
the base view alone · the first picture alone · the class feature counted · image tokens not counted
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch

from llavakit.assistant import Assistant
from llavakit.chat_template import JinjaTemplate
from llavakit.preprocess import Aspect, Preprocess
from llavakit.processor import IGNORED, Inputs, Processor
from llavakit.prompts import TEMPLATES, PlainTemplate
from llavakit.tiling import Tiling
from llavakit.types import Conversation, Image, Message

Made = tuple[Inputs | None, int]  # what the model would be given (None: it could not take it), and how many tokens are counted
_TEMPLATE = "give it the chat template that llava launch writes"
_PIXELS = "give it the checkpoint's own preprocessor_config.json and a release that reads it"
_DOES: dict[Aspect, str] = {"square": "it crops pictures", "pad": "it pads pictures", "squash": "it squashes pictures"}
_MEANT: dict[Aspect, str] = {"square": "cropped", "pad": "padded", "squash": "squashed"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """``encode`` gives None for a question that this way leaves as it is."""

    what: str
    remedy: str
    encode: Callable[[Conversation], Made | None]


def wrong_ways(ours: Assistant) -> Iterator[Way]:
    """Those that mean something for this checkpoint."""
    right = ours.processor
    if right.tokenizer("").input_ids:
        yield Way(what="its prompt has no first token (BOS)", remedy=_TEMPLATE, encode=partial(_first, right, 0))
        yield Way(what="its prompt begins with two first tokens (BOS)", remedy=_TEMPLATE, encode=partial(_first, right, 2))
    if not isinstance(right.template, JinjaTemplate):
        quiet = right.using(replace(right.template, system=""))
        yield Way(what="it leaves the system text out", remedy=_TEMPLATE, encode=partial(_without_system, quiet))
    for aspect in get_args(Aspect):
        if aspect != right.preprocess.aspect:
            what = f"{_DOES[aspect]}; the model was trained with {_MEANT[right.preprocess.aspect]} ones"
            wrong = but(right, preprocess=replace(right.preprocess, aspect=aspect))
            yield Way(what=what, remedy=_PIXELS, encode=partial(_pictured, wrong))
    if right.tiling.canvases:
        for merge in ("flat", right.tiling.merge):
            wrong = but(right, tiling=replace(right.tiling, canvases=(), merge=merge))
            what = "it shows the model the base view alone (detail low, or a model without tiles)"
            yield Way(what=what, remedy="ask for detail high, or serve it as llava_next", encode=partial(_pictured, wrong))
    yield Way(what="it uses the first picture alone", remedy="raise its limit of pictures a request", encode=partial(_one_picture, right))
    if not right.tiling.class_token and not right.tiling.canvases:
        counted = partial(_counted, right, lambda inputs: len(inputs.input_ids) + len(inputs.grids))
        yield Way(what="it keeps the class feature: a token more for each picture", remedy=_PIXELS, encode=counted)
    bare = partial(_bare, right)
    yield Way(what="it counts no image tokens in usage; its words agree", remedy="bill and cut by our count", encode=bare)
    for name, template in TEMPLATES.items():
        if name != right.template.name and not isinstance(template, PlainTemplate):
            what = f"it writes prompts as {name}, not {right.template.name}"
            yield Way(what=what, remedy=_TEMPLATE, encode=_plainly(right.using(template)))


def but(processor: Processor, *, preprocess: Preprocess | None = None, tiling: Tiling | None = None) -> Processor:
    """The same processor with other views."""
    return Processor(
        tokenizer=processor.tokenizer, template=processor.template, preprocess=preprocess or processor.preprocess,
        tiling=tiling or processor.tiling, image_token=processor.image_token, max_length=processor.max_length,
        image_pieces=processor.image_pieces, limits=processor.limits,
    )  # fmt: skip


def _plainly(processor: Processor) -> Callable[[Conversation], Made]:
    return lambda asked: _made(processor.encode(asked, learn=False))


def _made(inputs: Inputs) -> Made:
    return inputs, len(inputs.input_ids)


def _first(right: Processor, times: int, asked: Conversation) -> Made:
    inputs = right.encode(asked, learn=False)
    head, rest = inputs.input_ids[:1], inputs.input_ids[1:]
    ids = torch.cat([head.repeat(times), rest])
    return _made(replace(inputs, input_ids=ids, labels=torch.full_like(ids, IGNORED)))


def _without_system(quiet: Processor, asked: Conversation) -> Made:
    return _made(quiet.encode(Conversation(asked.turns), learn=False))


def _pictured(wrong: Processor, asked: Conversation) -> Made | None:
    return _made(wrong.encode(asked, learn=False)) if asked.images else None


def _one_picture(right: Processor, asked: Conversation) -> Made | None:
    if len(asked.images) < 2:
        return None
    kept = asked.images[0]
    messages = (
        Message(one.role, tuple(part for part in one.parts if not isinstance(part, Image) or part is kept)) for one in asked.messages
    )
    return _made(right.encode(Conversation(tuple(messages)), learn=False))


def _counted(right: Processor, count: Callable[[Inputs], int], asked: Conversation) -> Made | None:
    return (None, count(right.encode(asked, learn=False))) if asked.images else None


def _bare(right: Processor, asked: Conversation) -> Made | None:
    if not asked.images:
        return None
    inputs = right.encode(asked, learn=False)
    return inputs, len(inputs.input_ids) - sum(grid.tokens - 1 for grid in inputs.grids)
