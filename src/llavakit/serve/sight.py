"""Where a model looked when it wrote a word: attention from the word back to the patches of the pictures, for the chat page.

The finished conversation is read once more, in one pass, beside the engine and not in it. Only the rows of attention that wrote the word
are computed and kept (rows x positions a layer), so a long conversation costs what reading it costs, and never its square in memory:

    ids      <s> USER: [ image image image image ] What is written? ASSISTANT:  do  g </s>
    row                 .08   .31   .22   .01       .04  ..........   .09 --^   |         the position before a token writes it
    row                 .05   .40   .19   .02       .03  ..........   .05  .06 -^         a word's rows are averaged, heads and layers too

The model's modules are shared with whoever generates: the pass goes through a twin, shallow copies that hold the same weights and a
configuration of their own, which names another attention function.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llavakit.errors import ContextError, LlavaError, PromptError
from llavakit.images import image_size
from llavakit.model.llava import Llava
from llavakit.processor import IGNORED, Inputs, Processor
from llavakit.serve.faults import refuse
from llavakit.serve.seen import Box, picture
from llavakit.types import Conversation

ATTENTION = "llavakit_sight"
MAX_TOKENS = 16_384
MAX_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Attention over patches on a place of a picture, row by row: shares of everything that was looked at."""

    box: Box
    columns: int
    rows: int
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where the model looked. ``pictures``: for each its heat, in order; ``shares``: how much of all attention each picture got.

    ``tokens`` are what the word is made of, ``layers`` the first and last that were averaged, counted from 1, of ``of``.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, int]
    of: int
    shares: tuple[float, ...]
    pictures: tuple[tuple[Heat, ...], ...]


def look(
    model: Llava, processor: Processor, conversation: Conversation, *, start: int, end: int, layers: tuple[int, int] | None = None
) -> Look:
    """Where the model looked when it wrote the characters ``start`` to ``end`` of the last reply. ``layers``: first and last, from 1.

    Raises PromptError (no reply, no such word), ContextError (too long), ImageError, RequestError (no such layers; a decoder that
    does not let its attention be read).
    """
    inputs = processor.encode(conversation, learn=True)
    if len(inputs.input_ids) > MAX_TOKENS:
        raise ContextError(
            f"{len(inputs.input_ids)} tokens where attention is shown for up to {MAX_TOKENS}", code="context_length_exceeded",
            where="messages", remedy="shorten the conversation",
        )  # fmt: skip
    first, last = word_tokens(inputs, processor, conversation, start, end)
    rows = torch.arange(first - 1, last)[:MAX_ROWS]
    seen = attention_rows(model, processor, inputs, rows)
    low, high = layers or (1, len(seen))
    if not 1 <= low <= high <= len(seen):
        raise refuse(f"no layers {low} to {high}", code="bad_parameter", where="layers", remedy=f"choose from 1 to {len(seen)}")
    heat = seen[low - 1 : high].mean(0)
    at_pictures = (inputs.input_ids == processor.image_token_id).nonzero()[:, 0]
    mapped = heat_maps(heat[at_pictures], conversation, processor)
    return Look(
        tokens=tuple(processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[first : last + 1].tolist())),
        layers=(low, high), of=len(seen), shares=tuple(share for share, _ in mapped), pictures=tuple(maps for _, maps in mapped),
    )  # fmt: skip


def word_tokens(inputs: Inputs, processor: Processor, conversation: Conversation, start: int, end: int) -> tuple[int, int]:
    """The first and last position whose tokens hold the characters ``start`` to ``end`` of the last reply."""
    reply = conversation.messages[-1].text if conversation.messages else ""
    learned = (inputs.labels != IGNORED).nonzero()[:, 0]
    begin = int(learned[-1]) if len(learned) else 0
    while begin > 0 and inputs.labels[begin - 1] != IGNORED:
        begin -= 1
    ids = inputs.input_ids[begin:].tolist()
    whole = processor.decode(ids)
    offset = whole.find(reply.strip()) - (len(reply) - len(reply.lstrip()))
    if not 0 <= start < end <= len(reply) or not reply[start:end].strip() or reply.strip() not in whole:
        raise PromptError("there is no such word in the last reply", code="bad_parameter", where="word", remedy="choose one of its words")

    def read(count: int) -> int:
        """Whole characters after so many tokens; a half one shows as U+FFFD."""
        return len(processor.decode(ids[:count]).rstrip("\ufffd"))

    counts = range(len(ids) + 1)
    before = bisect_left(counts, start + offset, key=read)  # a blank in front may come with the word's own first token
    first = before - 1 if read(before) > start + offset else before
    return begin + first, begin + min(bisect_left(counts, end + offset, key=read), len(ids)) - 1


@torch.inference_mode()
def attention_rows(model: Llava, processor: Processor, inputs: Inputs, rows: Tensor) -> Tensor:
    """(layers, T): attention of the positions ``rows``, averaged over them and over heads, in a pass of its own."""
    batch = processor.collate([replace(inputs, labels=torch.full_like(inputs.labels, IGNORED))], side="right")
    batch = batch.to(model.device, model.dtype)
    notes = Notes(rows=rows)
    decoder = twin(model.language_model.base_model, notes)
    decoder(inputs_embeds=model.embed(batch), position_ids=batch.positions, use_cache=False)
    if not notes.layers:
        raise _not_shown(f"{type(model.language_model).__name__} computes it by itself")
    return torch.stack([notes.layers[number] for number in sorted(notes.layers)])


@dataclass
class Notes:
    """What one pass writes down: for each layer the attention of ``rows``."""

    rows: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)


def twin(module: nn.Module, notes: Notes) -> nn.Module:
    """The same modules over the same weights, with configurations of their own that name our attention function."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, noted_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    configs: dict[int, Any] = {}

    def copied(one: nn.Module) -> nn.Module:
        new = copy.copy(one)
        new.__dict__["_modules"] = {name: None if child is None else copied(child) for name, child in one._modules.items()}
        if (config := getattr(one, "config", None)) is not None:
            if id(config) not in configs:
                configs[id(config)] = copy.copy(config)
                configs[id(config)]._attn_implementation = ATTENTION
            new.__dict__.update(config=configs[id(config)], notes=notes)
        return new

    return copied(module)


def noted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **rest: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: torch's own attention, and the weights of some rows written down."""
    if rest.get("softcap") is not None or rest.get("s_aux") is not None:
        raise _not_shown("its decoder bends its scores, which is not shown")
    notes: Notes = module.notes  # type: ignore[assignment]
    rows = notes.rows.to(query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    some = query[:, :, rows].float() * scale
    groups = query.shape[1] // key.shape[1]
    scores = some.unflatten(1, (key.shape[1], groups)) @ key.float().transpose(2, 3)[:, :, None]
    if attention_mask is None:
        later = torch.arange(key.shape[2], device=query.device)[None] > rows[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    else:
        part = attention_mask[:, :, rows][:, :, None]
        scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part
    notes.layers[int(module.layer_idx)] = torch.softmax(scores, -1).mean((0, 1, 2, 3)).cpu()  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)  # type: ignore[no-any-return]


def heat_maps(heat: Tensor, conversation: Conversation, processor: Processor) -> list[tuple[float, tuple[Heat, ...]]]:
    """Attention over image tokens as (share, maps) of each picture, in order."""
    pictures = [picture(image_size(image, processor.limits), processor) for image in conversation.images]
    found = []
    for one, part in zip(pictures, heat.split([one.tokens for one in pictures]) if pictures else (), strict=True):
        maps, at = [], 0
        for patches in one.patches:
            cells = part[at + patches.class_token : at + patches.tokens].view(patches.rows, -1)[:, : patches.columns]
            values = tuple(round(value, 7) for value in cells.flatten().tolist())
            maps.append(Heat(box=patches.box, columns=patches.columns, rows=patches.rows, values=values))
            at += patches.tokens
        found.append((round(float(part.sum()), 6), tuple(maps)))
    return found


def _not_shown(why: str) -> LlavaError:
    return refuse(f"attention cannot be shown: {why}", code="unsupported_parameter", where="model", remedy="choose another model")
