"""One step of a language model over parts of many replies at once, in one row without padding.

    row       | a | b | c c c c c c c c | d d d |     a, b: the next token of replies; c, d: chunks of prompts
    linears   all rows at once: the weights are read once a step
    attention cut by reply; each part sees its own memory and itself, at its exact length

transformers' models take this as it is: embeddings (1, N, H), a position for each, an object in the place of the cache, and our attention
function, which finds the parts in the word ``parts``. Where no parts are given the function is the fast CPU one, so the same model still
answers alone. For every new shape oneDNN compiles a product and keeps it (half a megabyte), so rows and lengths are rounded up to few
numbers, by rows of zeros that nobody looks at.

Whether a model can be read so is tried out before it is served (``reader_for``): a few embeddings whole and in parts must give the same
scores. Models that cannot (capped scores, chunked windows, positions that depend on the longest) are read one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llavakit.model.cache import new_cache
from llavakit.model.cpu import ATTENTION as CPU_ATTENTION
from llavakit.model.cpu import cpu_attention
from llavakit.model.llava import Llava
from llavakit.serve.memory import Memory, Shape

ATTENTION = "llavakit_serve"
_BLOCK = 128  # query rows at a time
_EXACT = 16  # rows that are not rounded
_STEADY_POSITIONS = ("default", "linear", "llama3", "yarn")  # a key's rotation never depends on how long the text became
_NOT_OURS = ("softcap", "s_aux", "position_bias")
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the largest score; half precision: 5e-2


@dataclass
class Part:
    """Consecutive positions of one reply: its memory and the embeddings (n, H) that are to be read behind it."""

    memory: Any
    embeddings_nh: Tensor

    @property
    def count(self) -> int:
        return self.embeddings_nh.shape[0]


class Reader(Protocol):
    """Reads parts; afterwards every memory is longer by its part."""

    shape: Shape
    packed: bool
    "Whether memories are ``Memory``s, which can be copied and cropped."

    def new_memory(self, *, most: int, now: int) -> Any: ...

    def read(self, parts: Sequence[Part]) -> Tensor:
        """The scores (number of parts, V) after the last position of each, float32."""
        ...


class Parts:
    """The parts of a step, in the place of a cache: keys and values go into each one's memory."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.memories: list[Memory] = [part.memory for part in parts]
        counts = [part.count for part in parts]
        self.idle = _rounded(sum(counts)) - sum(counts)
        self.counts = [*counts, self.idle]  # rows of zeros, which belong to nobody, come last
        self.layer = -1
        self.windows: set[int | None] = set()

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """transformers' cache interface, (1, H, N, D)."""
        self.layer = layer_idx
        each = zip(self.memories, keys[0].split(self.counts, 1), values[0].split(self.counts, 1), strict=False)
        for memory, key, value in each:
            memory.write(layer_idx, key, value)
        return keys, values

    def attend(self, query: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """(1, H, N, D) -> (1, N, H, D)."""
        self.windows.add(window)
        *each, idle = (query[0] * scaling).split(self.counts, 1)
        done = []
        for memory, rows in zip(self.memories, each, strict=True):
            keys, values = memory.layer(self.layer)
            done.append(attend(rows, keys, values, past=memory.length, window=window))
        return torch.cat([*done, torch.zeros_like(idle)], 1).transpose(0, 1)[None]


def attend(query: Tensor, keys: Tensor, values: Tensor, *, past: int, window: int | None) -> Tensor:
    """Scaled rows (H, n, D) at positions ``past``... see keys (H / groups, capacity, D) up to their own position, at most ``window``."""
    if query.device.type != "cpu":
        return _by_sdpa(query, keys, values, past=past, window=window)
    rows = query.shape[1]
    if rows == 1:
        return _block(query, keys, values, first=0, start=past, window=window)  # all of the buffer: nothing is copied
    output = query.new_empty(*query.shape[:2], values.shape[-1])
    for at in range(0, rows, _BLOCK):
        block, start = query[:, at : at + _BLOCK], past + at
        real = block.shape[1]
        block = F.pad(block, (0, 0, 0, min(_rounded(real), _BLOCK) - real))
        first = 0 if window is None else max(0, start - window + 1) // _BLOCK * _BLOCK
        stop = min(-(-(start + real) // _BLOCK) * _BLOCK, keys.shape[1])
        seen = _block(block, keys[:, first:stop], values[:, first:stop], first=first, start=start, window=window)
        output[:, at : at + real] = seen[:, :real]
    return output


def _block(query: Tensor, keys: Tensor, values: Tensor, *, first: int, start: int, window: int | None) -> Tensor:
    """Rows from position ``start`` on over keys from ``first`` on. Query heads that share a key head become more rows of it."""
    heads, rows, width = query.shape
    groups = heads // keys.shape[0]
    scores = torch.matmul(query.reshape(keys.shape[0], groups * rows, width), keys.transpose(1, 2))
    if rows == 1:
        scores[..., start - first + 1 :] = -torch.inf
        if window is not None and start - first + 1 > window:
            scores[..., : start - first + 1 - window] = -torch.inf
    else:
        masked = start - first if window is None else 0  # before their own block rows see everything, but for a window
        unseen = _unseen(rows, keys.shape[1] - masked, start - first - masked, window, keys.device)
        scores.view(keys.shape[0], groups, rows, -1)[..., masked:].masked_fill_(unseen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)  # sums in float32 inside, whatever goes in
    return torch.matmul(weights, values).view(heads, rows, -1)


def _unseen(rows: int, columns: int, past: int, window: int | None, device: torch.device) -> Tensor:
    """True where row r, at position past + r, does not look."""
    ones = torch.ones(rows, columns, dtype=torch.bool, device=device)
    later = ones.triu(past + 1)
    return later if window is None else later | ones.tril(past - window)


def _rounded(rows: int) -> int:
    """Up to one of few numbers."""
    step = 1 if rows <= _EXACT else 8 if rows <= 64 else 32 if rows <= 512 else 128
    return -(-rows // step) * step


def _by_sdpa(query: Tensor, keys: Tensor, values: Tensor, *, past: int, window: int | None) -> Tensor:
    rows = query.shape[1]
    end = past + rows
    first = 0 if window is None else max(0, past - window + 1)
    keys, values = keys[:, first:end], values[:, first:end]
    whole = rows == end and (window is None or rows <= window)
    mask = None if rows == 1 or whole else ~_unseen(rows, end - first, past - first, window, query.device)
    output = F.scaled_dot_product_attention(
        query[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=whole and rows > 1,
        scale=1.0,
        enable_gqa=query.shape[0] != keys.shape[0],
    )
    return output[0]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    parts: Parts | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, T, H, D) and no weights."""
    if parts is None:
        return cpu_attention(module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **rest)
    if any(rest.get(name) is not None for name in _NOT_OURS):
        raise NotImplementedError(f"{type(module).__name__} attends in a way of its own")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return parts.attend(query, scaling=scaling, window=sliding_window), None


class PackedReader:
    """All parts in one row."""

    packed = True

    def __init__(self, model: Llava, shape: Shape) -> None:
        self.shape = shape
        self._language_model = model.language_model
        self._ours = torch.zeros(1, 1, 1, 1, device=shape.device)  # in the place of a mask: "it is made, leave it"

    def new_memory(self, *, most: int, now: int) -> Memory:
        return Memory(self.shape, most=most, now=now)

    def read(self, parts: Sequence[Part]) -> Tensor:
        scores, _ = self.read_seeing(parts)
        return scores

    def read_seeing(self, parts: Sequence[Part]) -> tuple[Tensor, set[int | None]]:
        """The scores, and the windows that layers asked for."""
        for part in parts:
            part.memory.make_room(part.memory.length + part.count)
        here = Parts(parts)
        positions = torch.cat([torch.arange(part.memory.length, part.memory.length + part.count) for part in parts])
        last = torch.tensor(here.counts[:-1]).cumsum(0) - 1
        rows = F.pad(torch.cat([part.embeddings_nh for part in parts]), (0, 0, 0, here.idle))
        logits: Tensor = self._language_model(
            inputs_embeds=rows[None],
            attention_mask=self._ours,
            position_ids=F.pad(positions, (0, here.idle)).to(self.shape.device)[None],
            past_key_values=here,
            use_cache=True,
            logits_to_keep=last.to(self.shape.device),
            parts=here,
        ).logits
        for part in parts:
            part.memory.grow(part.count)
        return logits[0].float(), here.windows


@dataclass
class OwnCache:
    """A memory only transformers' own attention can read."""

    cache: Any
    length: int = 0
    nbytes: int = field(default=0)


class SoloReader:
    """One part after the other, each by the model's own cache and masks."""

    packed = False

    def __init__(self, model: Llava, shape: Shape) -> None:
        self.shape = shape
        self._language_model = model.language_model

    def new_memory(self, *, most: int, now: int) -> OwnCache:
        return OwnCache(new_cache(self._language_model.config))

    def read(self, parts: Sequence[Part]) -> Tensor:
        return torch.cat([self._read(part) for part in parts])

    def _read(self, part: Part) -> Tensor:
        start, part.memory.length = part.memory.length, part.memory.length + part.count
        part.memory.nbytes = part.memory.length * self.shape.position_bytes
        positions = torch.arange(start, part.memory.length, device=self.shape.device)[None]
        logits: Tensor = self._language_model(
            inputs_embeds=part.embeddings_nh[None],
            position_ids=positions,
            past_key_values=part.memory.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].float()


@torch.inference_mode()
def reader_for(model: Llava) -> Reader:
    """All at once where that is proved to give the same; one by one otherwise."""
    language_model = model.language_model
    probe = torch.Generator().manual_seed(0)
    ids = torch.randint(0, language_model.config.vocab_size, (2, 9), generator=probe).to(model.device)
    embeddings = model.language_model.get_input_embeddings()(ids)
    wanted, shape = _alone(model, embeddings)
    solo = SoloReader(model, shape)
    if not _plain(language_model):
        return solo
    before = language_model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    language_model.set_attn_implementation(ATTENTION)
    packed = PackedReader(model, shape)
    try:
        found, windows = _in_parts(packed, embeddings)
        close = (found - wanted).abs().max() <= _TOLERANCE.get(shape.dtype, 5e-2) * wanted.abs().max()
        works = bool(close) and (_windowed(language_model.config) <= windows)
    except (TypeError, ValueError, AttributeError, NotImplementedError, IndexError, RuntimeError, AssertionError):
        works = False
    if not works:
        language_model.set_attn_implementation(before)
    return packed if works else solo


def _alone(model: Llava, embeddings: Tensor) -> tuple[Tensor, Shape]:
    """The scores (2, V) after all embeddings, and what a position takes."""
    cache = DynamicCache(config=model.language_model.config)
    scores = model.language_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    layers = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    widest = max(layers, key=lambda keys: keys.shape[1] * keys.shape[3])
    heads, width = widest.shape[1], widest.shape[3]
    return scores, Shape(layers=len(layers), heads=heads, width=width, dtype=widest.dtype, device=widest.device)


def _in_parts(reader: PackedReader, embeddings: Tensor) -> tuple[Tensor, set[int | None]]:
    """The same scores, read in three steps: chunks, a chunk beside a single row, single rows."""
    memories = [reader.new_memory(most=9, now=3), reader.new_memory(most=9, now=4)]
    for first, second in (((0, 3), (0, 4)), ((3, 8), (4, 5)), ((8, 9), (5, 9))):
        spans = [(memories[0], embeddings[0, slice(*first)]), (memories[1], embeddings[1, slice(*second)])]
        scores, windows = reader.read_seeing([Part(memory, rows) for memory, rows in spans])
    return scores, windows


def _plain(language_model: Any) -> bool:
    """Whether its layers are all attention to the past, by an interface that can be taken over."""
    config = language_model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one, or one for each kind of layer
    return (
        kinds <= {"full_attention", "sliding_attention"}
        and all(one.get("rope_type", "default") in _STEADY_POSITIONS for one in ropes)
        and config._attn_implementation in ("sdpa", CPU_ATTENTION, ATTENTION)
        and bool(getattr(language_model, "_supports_attention_backend", False))
    )


def _windowed(config: Any) -> set[int]:
    """The window that some layer must ask for."""
    width = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = "sliding_attention" in kinds if kinds else width is not None
    return {int(width)} if used and width is not None else set()
