"""The CPU's training attention is causal attention: value and gradients, any length, shared key heads, and nothing that is not its case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from llavakit.train import attention as module
from llavakit.train.attention import BLOCK, attention


class Layer(nn.Module):
    is_causal = True
    num_key_value_groups = 1


def tensors(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def near(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Within 2 % of the size of what goes in or out: bf16 holds a number to 0.4 %, and gradients are differences of such numbers."""
    return float((found.float() - expected).norm()) <= 0.02 * float(max(expected.norm(), scale.norm()))


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 2 * BLOCK + 5), groups=st.sampled_from([1, 3]), autocast=st.booleans(), seed=st.integers(0, 99))
def test_value_and_gradients_are_those_of_exact_attention(length: int, groups: int, autocast: bool, seed: int) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    query = tensors(seed, 2, 2 * groups, length, 8, dtype=dtype)
    key, value = (tensors(seed + i, 2, 2, length, 8, dtype=dtype) for i in (1, 2))
    exact = [x.detach().to(torch.bfloat16).float().requires_grad_() for x in (query, key, value)]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=groups > 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = attention(Layer(), query, key, value, None)
    weight = tensors(seed + 3, *found.shape, dtype=torch.float32).detach()
    (found.float() * weight).sum().backward()
    (reference.transpose(1, 2) * weight).sum().backward()
    assert found.dtype == torch.bfloat16
    assert near(found.detach(), reference.detach().transpose(1, 2), reference.detach())
    for ours, theirs in zip((query, key, value), exact, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert near(ours.grad, theirs.grad, weight)


def test_no_row_sees_a_later_one() -> None:
    query, key, value = (tensors(i, 1, 1, BLOCK + 40, 4) for i in range(3))
    before, _ = attention(Layer(), query, key, value, None)
    with torch.no_grad():
        key[:, :, BLOCK + 20 :], value[:, :, BLOCK + 20 :] = 9.0, -9.0
    after, _ = attention(Layer(), query, key, value, None)
    assert torch.equal(before[:, : BLOCK + 20], after[:, : BLOCK + 20])
    assert not torch.equal(before[:, BLOCK + 20 :], after[:, BLOCK + 20 :])


@pytest.mark.parametrize(
    "case", [{"attention_mask": True}, {"sliding_window": 4}, {"is_causal": False}, {"long": True}, {"dtype": torch.float32}, {"keys": 3}]
)
def test_every_other_case_is_transformers_own(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def theirs(*inputs: Any, **options: Any) -> tuple[None, None]:
        calls.append(options)
        return None, None

    monkeypatch.setattr(module, "sdpa_attention_forward", theirs)
    length = module.LONGEST + 1 if case.pop("long", False) else 6
    query = tensors(0, 1, 1, length, 4, dtype=case.pop("dtype", torch.bfloat16))
    key = query[:, :, : case.pop("keys", length)]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool) if case.pop("attention_mask", False) else None
    attention(Layer(), query, key, key, mask, **case)
    assert len(calls) == 1
