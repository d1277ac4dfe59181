"""Attention for training: examples packed into one row apart from each other, and in bf16 on a CPU twice as fast as torch's own.

Packed (``Batch.segments``), where a mask of the whole row would cost its square:

    row  |##    |####      |######        |     each example sees its own past, nothing is computed between them

    auto   CUDA in half precision: torch's varlen kernel, one for the row; else one call an example, on a CPU in bf16 as below
    sdpa   one call of torch's own attention an example, anywhere
    flex   torch's FlexAttention, one compiled kernel for the row, by transformers; CUDA alone has its backward pass

torch's flash kernel computes the whole square and its backward pass runs at a third of the speed of a plain matrix product. Here the
rows go in blocks, each sees only the columns that exist for it, and the weights are kept for the backward pass:

    queries   block 0   |##\\                  scores of block b: rows x columns up to its own end
              block 1   |######\\              kept: half the square in bf16, so only sequences up to LONGEST come here
              block 2   |##########\\

With one head of 32 to 64 numbers and 230 to 280 positions: 36 to 54 ms where torch takes 84 to 122 (forward and backward, one core).
Scores are rounded to bf16, as in every eager implementation. What is not plain causal attention (a mask, dropout, a window, another
type or device) goes to transformers' sdpa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llavakit.errors import ConfigError

Kind = Literal["auto", "sdpa", "flex"]
NAMES: Mapping[Kind, str] = {"auto": "llavakit_train", "sdpa": "llavakit_train_sdpa", "flex": "flex_attention"}  # transformers' names
BLOCK = 96  # rows at a time
LONGEST = 1024
_NOT_OURS = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


def use_training_attention(language_model: PreTrainedModel, kind: Kind = "auto") -> None:
    """Switch a decoder that attends by sdpa to one of these. Nothing about its weights or its saved config changes."""
    for name, function in OURS.items():
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask)
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(NAMES[kind])


def check_flex(language_model: PreTrainedModel, device: torch.device, *, compiled: bool) -> None:
    """Raise ConfigError where FlexAttention cannot train this language model. ``compiled``: whether its layers will be."""
    dropout = getattr(language_model.config, "attention_dropout", 0.0)
    wrong = {
        f"it has no backward pass on {device.type}": device.type != "cuda",
        f"{type(language_model).__name__} does not know it": not language_model._supports_flex_attn,
        f"it has no dropout, and the language model's is {dropout}": bool(dropout),
        "it is compiled by itself, which nobody tried inside of compiled layers": compiled,
    }
    for what in (what for what, is_wrong in wrong.items() if is_wrong):
        raise ConfigError(f"FlexAttention cannot train here: {what}", code="bad_value", where="attention", remedy="use attention=auto")


def mask(batch_size: int, q_length: int, kv_length: int, *places: Any, attention_mask: Tensor | None = None, **rest: Any) -> Tensor | None:
    """transformers' mask interface: none for a whole row without padding, which ``attention`` cuts itself; else sdpa's."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, *places, attention_mask=attention_mask, **rest)  # type: ignore[no-any-return]


def attention(
    module: torch.nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H / groups, T, D)
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, T, H, D) and no weights. ``cu_seq_lens_q``: the borders of packed examples, from 0 on."""
    if cu_seq_lens_q is None:
        return _one(module, query, key, value, attention_mask, **rest)
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and _plain(rest):
        return _varlen(query, key, value, cu_seq_lens_q, int(max_length_q or query.shape[2]), rest.get("scaling")), None
    return _each(_one, module, (query, key, value), cu_seq_lens_q, rest)


def sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """As ``attention``, by torch's own alone."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)  # type: ignore[no-any-return]
    return _each(sdpa_attention_forward, module, (query, key, value), cu_seq_lens_q, rest)


OURS = {NAMES["auto"]: attention, NAMES["sdpa"]: sdpa}


def _each(
    one: Callable[..., tuple[Tensor, None]], module: torch.nn.Module, row: tuple[Tensor, ...], ends: Tensor, rest: dict[str, Any]
) -> tuple[Tensor, None]:
    """One call an example of a packed row."""
    examples = zip(*(part.split(ends.diff().tolist(), 2) for part in row), strict=True)
    return torch.cat([one(module, q, k, v, _window(rest.get("sliding_window"), q), **rest)[0] for q, k, v in examples], 1), None


def _plain(rest: dict[str, Any]) -> bool:
    return not rest.get("dropout") and all(rest.get(name) is None for name in _NOT_OURS)


def _window(width: int | None, query: Tensor) -> Tensor | None:
    """The mask of a sliding window (Mistral 0.1, Gemma), where an example is longer than it; shape (1, 1, T, T)."""
    length = query.shape[2]
    if width is None or length <= width:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
    return (ones.tril() & ones.triu(1 - width))[None, None]


def _varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float | None) -> Tensor:
    """One kernel for all examples of the row."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    done = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
    assert isinstance(done, Tensor)
    return done[None]


def _one(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Examples of one length, or one example."""
    causal = bool(module.is_causal if is_causal is None else is_causal) and attention_mask is None and query.shape[2] == key.shape[2]
    narrow = torch.is_autocast_enabled("cpu") or query.dtype == torch.bfloat16
    odd = dropout or not _plain(rest)
    if odd or not causal or not narrow or query.device.type != "cpu" or query.shape[2] > LONGEST:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **rest
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return CausalAttention.apply(scaled, key, value).transpose(1, 2), None  # type: ignore[no-untyped-call]


class CausalAttention(torch.autograd.Function):
    """softmax(query key^T over the columns up to the row) value, all (B, H, T, D); the query is already scaled."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty(query.shape[0], query.shape[2], *query.shape[1::2], dtype=query.dtype).transpose(1, 2)
        kept = []
        for start, stop in _blocks(query.shape[2]):
            scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(2, 3)
            later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
            scores[..., start:].masked_fill_(later, -torch.inf)
            weights = torch.softmax(scores, -1)  # sums in fp32 inside
            output[:, :, start:stop] = weights @ value[:, :, :stop]
            kept.append(weights)
        ctx.save_for_backward(query, key, value, output, *kept)
        return output

    @staticmethod
    @custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        query, key, value, output, *kept = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(key, dtype=torch.float32), torch.zeros_like(value, dtype=torch.float32)
        inner = (gradient * output).sum(-1, keepdim=True, dtype=torch.float32).to(gradient.dtype)
        for (start, stop), weights in zip(_blocks(query.shape[2]), kept, strict=True):
            part = gradient[:, :, start:stop]
            of_value[:, :, :stop] += weights.transpose(2, 3) @ part
            of_scores = (part @ value[:, :, :stop].transpose(2, 3)).sub_(inner[:, :, start:stop]).mul_(weights)
            of_query[:, :, start:stop] = of_scores @ key[:, :, :stop]
            of_key[:, :, :stop] += of_scores.transpose(2, 3) @ query[:, :, start:stop]
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
