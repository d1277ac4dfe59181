"""Faster arithmetic for a transformers model on a CPU, switched on by one call: ``accelerate_cpu(model)``.

Nothing in a model's structure or weights changes, only which kernel computes a product. Four facts, each measured by
``benchmarks/speed.py``:

* one row times a bfloat16 matrix is a walk through memory; ATen's own kernel walks faster than oneDNN's;
* many rows are faster with the weight re-laid for oneDNN once (a second copy, so only for the modules named in ``packed``);
* scaled_dot_product_attention reads a cache at an eighth of the memory's speed; matmul, softmax, matmul reads it at full speed;
* in prefill the same in blocks of 128 query rows stays in the processor's cache.

Results equal the stock path up to the order of summation: exactly in no dtype, within rounding in every dtype. Greedy replies are the
same except where two tokens score within that rounding (with random weights in bfloat16 that happens; with trained ones hardly).
Training, gradients, dropout, other devices and every case not measured go to transformers' own code.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llavakit.model.cache import whole

ATTENTION = "llavakit_cpu"
_BLOCK = 128  # query rows at a time
_FEW = 32  # up to so many query rows the blocked path wins in float32 too
_SWITCH = threading.Lock()  # oneDNN's switch is one for the process


def accelerate_cpu(model: nn.Module, *, packed: Sequence[nn.Module] = ()) -> None:
    """Switch every linear layer and sdpa attention below ``model`` to the fast CPU path. Safe to call twice; undone by nothing.

    packed: modules (vision tower, projector) whose linears see many rows; they keep a second, re-laid copy of their bfloat16
        weights, made on first use. It costs their size in memory and is renewed when a weight changes.
    """
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, cpu_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, sdpa_mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == "sdpa":
            module.set_attn_implementation(ATTENTION)
        elif type(module) is nn.Linear:  # a subclass means something else is in charge of it
            module.__class__ = CpuLinear
    for root in packed:
        for module in root.modules():
            if isinstance(module, CpuLinear):
                module.keep_packed = _packing_works()


class CpuLinear(nn.Linear):
    """nn.Linear that picks the kernel by the number of rows. Same parameters, same names, same state."""

    keep_packed: bool = False
    _packed: tuple[Tensor, tuple[int, int]] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        weight, bias, count = self.weight, self.bias, input.numel()
        fast = input.dtype == weight.dtype == torch.bfloat16 and input.is_cpu and not torch.is_grad_enabled()
        if not fast or not count or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, bias)
        if count == self.in_features:
            return _one_row(input, weight, bias)
        if self.keep_packed:
            return torch.ops.mkldnn._linear_pointwise(input, self._relaid(), bias, "none", [], "")  # type: ignore[no-any-return]
        return F.linear(input, weight, bias)

    def _relaid(self) -> Tensor:
        """The weight in oneDNN's layout, made again when the weight was replaced or written to."""
        key = (self.weight.data_ptr(), -1 if self.weight.is_inference() else self.weight._version)
        if self._packed is None or self._packed[1] != key:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None), key
        return self._packed[0]

    def __getstate__(self) -> dict[str, Any]:
        """The re-laid copy is neither copied nor pickled; it is made anew where it is needed."""
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _one_row(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with _SWITCH:
        before = torch.backends.mkldnn.enabled
        torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a property on the module object
        try:
            return F.linear(row, weight, bias)
        finally:
            torch.backends.mkldnn.enabled = before


def _packing_works() -> bool:
    """Whether this build and processor have oneDNN's bfloat16 linear layer."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def cpu_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H / groups, S, D)
    value: Tensor,
    attention_mask: Tensor | None,  # (B, 1 or H, T, S), True where attended, or numbers to add
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (B, T, H, D) and no weights."""
    causal = module.is_causal if is_causal is None else is_causal
    if not _ours(query, key, value, dropout, rest):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **rest
        )
    scaled = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # the query is smaller than the scores
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    return blocked_attention(scaled, key, value, attention_mask, causal=causal).transpose(1, 2).contiguous(), None


def _ours(query: Tensor, key: Tensor, value: Tensor, dropout: float, rest: dict[str, Any]) -> bool:
    """Whether this is a case that was measured faster and needs nothing special."""
    if query.device.type != "cpu" or dropout or any(rest.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return query.dtype == torch.bfloat16 or (query.dtype == torch.float32 and query.shape[2] <= _FEW)


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """softmax(query key^T + mask) value, (B, H, T, D), the query already scaled, a block of query rows at a time.

    causal: row t sees keys 0..t (aligned at the first key, as sdpa does); then no mask may be given.
    A row whose mask is False everywhere gets finite numbers that mean nothing.
    """
    batch, heads, rows, _ = query.shape
    length = key.shape[2]
    if causal:
        assert mask is None, "a causal call brings no mask"
        triangle = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool).tril()
    else:
        full_key, full_value = whole(key), whole(value)  # read the cache's buffer rather than copy a view of it
        if full_key is not None and full_value is not None and full_key.shape[2] == full_value.shape[2]:
            key, value = full_key, full_value
    if rows > 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()  # once here, not once a block in matmul
    output = query.new_empty(batch, heads, rows, value.shape[-1])
    for start in range(0, rows, _BLOCK):
        stop = min(start + _BLOCK, rows)
        block = query[:, :, start:stop]
        if causal:
            corner = triangle[: stop - start, : stop - start]
            output[:, :, start:stop] = _attend(block, key[:, :, :stop], value[:, :, :stop], stop, corner, start)
        else:
            part = None if mask is None else mask[:, :, start:stop, :length]
            output[:, :, start:stop] = _attend(block, key, value, length, part, 0)
    return output


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int, mask: Tensor | None, first: int) -> Tensor:
    """One block. Query heads that share a key head become more rows of it; ``mask`` covers keys ``first`` to ``length``."""
    batch, heads, rows, width = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    query = query.reshape(batch, key_heads, groups * rows, width)
    scores = torch.matmul(query, key.transpose(2, 3))
    if key.shape[2] > length:
        scores[..., length:] = -torch.inf  # the buffer's spare room
    if mask is not None:
        _apply(scores.view(batch, key_heads, groups, rows, key.shape[2])[..., first:length], mask)
    weights = torch.softmax(scores, -1)  # sums in float32 inside, whatever goes in
    return torch.matmul(weights, value).view(batch, heads, rows, value.shape[-1])


def _apply(scores: Tensor, mask: Tensor) -> None:
    """Write a mask (T, S), (B, 1, T, S) or (B, H, T, S) into scores (B, key heads, groups, T, S)."""
    if mask.ndim == 4:
        mask = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.reshape(mask.shape[0], scores.shape[1], scores.shape[2], *mask.shape[2:])
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        scores.add_(mask.to(scores.dtype))
