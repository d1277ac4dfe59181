"""The fast CPU paths give what the stock paths give, for any shape, mask and head grouping; the in-place cache is a cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llavakit.model import cpu
from llavakit.model.cache import InPlaceLayer, new_cache, whole
from llavakit.model.cpu import ATTENTION, CpuLinear, accelerate_cpu, blocked_attention, cpu_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def _llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=71, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 2), groups=st.sampled_from([1, 2, 3]), rows=st.integers(1, 11), past=st.integers(0, 9),
    kind=st.sampled_from(["none", "causal", "padding", "per head", "numbers"]),
    dtype=st.sampled_from(list(TOLERANCE)), seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_equals_sdpa(batch: int, groups: int, rows: int, past: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    past = 0 if kind == "causal" else past
    length, heads, width = past + rows, 2 * groups, 8
    query = torch.randn(batch, heads, rows, width)
    key, value = torch.randn(batch, 2, length, width), torch.randn(batch, 2, length, width)
    mask = _mask(kind, batch, heads, rows, length)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    mask = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
    wide_key, wide_value = key.repeat_interleave(groups, 1).float(), value.repeat_interleave(groups, 1).float()
    wide_mask = mask.float() if mask is not None and mask.dtype != torch.bool else mask
    expected = F.scaled_dot_product_attention(query.float(), wide_key, wide_value, attn_mask=wide_mask, is_causal=kind == "causal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_BLOCK", 4)
        scaled = query * width**-0.5
        for one_key, one_value in ((key, value), (_as_cached(key), _as_cached(value))):
            found = blocked_attention(scaled, one_key, one_value, mask, causal=kind == "causal")
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=4 * TOLERANCE[dtype])


def _mask(kind: str, batch: int, heads: int, rows: int, length: int) -> Tensor | None:
    if kind in ("none", "causal"):
        return None
    seen = torch.rand(batch, heads if kind == "per head" else 1, rows, length) > 0.4
    seen[..., -1] = True  # every row sees something
    return torch.where(seen, torch.randn(seen.shape), -torch.inf) if kind == "numbers" else seen


def _as_cached(states: Tensor) -> Tensor:
    """The same numbers as a view of a cache's buffer."""
    layer = InPlaceLayer()
    layer.update(states[:, :, :1], states[:, :, :1])
    if states.shape[2] == 1:
        return layer.keys[:, :, :1]
    return layer.update(states[:, :, 1:], states[:, :, 1:])[0]


def test_a_row_that_sees_nothing_stays_finite() -> None:
    query, states = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    mask = torch.tensor([[False] * 3, [True] * 3, [True] * 3])[None, None]
    assert blocked_attention(query, states, states, mask, causal=False).isfinite().all()


def test_cases_that_were_not_measured_go_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def stock(*args: object, **kwargs: object) -> tuple[Tensor, None]:
        calls.append("stock")
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr(cpu, "sdpa_attention_forward", stock)
    module = SimpleNamespace(is_causal=True)
    states = torch.randn(1, 2, 40, 4)
    with torch.no_grad():
        cpu_attention(module, states, states, states, None)  # float32, many rows
        cpu_attention(module, states[:, :, :2], states[:, :, :2], states[:, :, :2], None, dropout=0.5)
    training = states[:, :, :2].clone().requires_grad_()
    cpu_attention(module, training, training, training, None)[0].sum().backward()
    assert len(calls) == 3
    assert training.grad is not None
    with torch.no_grad():
        cpu_attention(module, states[:, :, :2], states[:, :, :2], states[:, :, :2], None)
        cpu_attention(module, *(states.bfloat16(),) * 3, None)
    assert len(calls) == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_linear_equals_the_stock_linear(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = nn.Linear(64, 48, bias=bias).to(dtype)
    fast = nn.Sequential(copy.deepcopy(stock))
    accelerate_cpu(fast, packed=(fast,))
    assert type(fast[0]) is CpuLinear
    assert list(fast[0].state_dict()) == list(stock.state_dict())
    inputs = torch.randn(1, rows, 64, dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(fast(inputs), stock(inputs), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_changed_weight_is_noticed() -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False).bfloat16())
    accelerate_cpu(model, packed=(model,))
    inputs = torch.randn(5, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        model(inputs)
        model[0].weight.mul_(2)
        torch.testing.assert_close(model(inputs), F.linear(inputs, model[0].weight), rtol=2e-2, atol=2e-2)
        model[0].load_state_dict({"weight": torch.eye(32)})
        assert torch.equal(model(inputs), inputs)
        assert torch.equal(copy.deepcopy(model)(inputs), inputs)


def test_gradients_flow_through_an_accelerated_model() -> None:
    stock, fast = _llama(), _llama()
    accelerate_cpu(fast, packed=(fast,))
    ids = torch.arange(9)[None]
    for model in (stock, fast):
        model(input_ids=ids).logits.square().sum().backward()
    for (name, expected), found in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_one_dnn_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4).bfloat16())
    accelerate_cpu(model)
    row = torch.ones(1, 4, dtype=torch.bfloat16)
    before = torch.backends.mkldnn.enabled
    with torch.inference_mode():
        model(row)
        assert torch.backends.mkldnn.enabled is before
        with torch.backends.mkldnn.flags(enabled=False):
            model(row)
            assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled is before


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_decoder_gives_the_same_scores(dtype: torch.dtype) -> None:
    stock, fast = _llama(dtype), _llama(dtype)
    accelerate_cpu(fast, packed=(fast,))
    accelerate_cpu(fast, packed=(fast,))  # twice is once
    assert fast.config._attn_implementation == ATTENTION
    ids = torch.randint(0, 71, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    found, expected = _scores(fast, ids, mask), _scores(stock, ids, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=expected.abs().max().item() * (1e-5 if dtype == torch.float32 else 3e-2))


@torch.inference_mode()
def _scores(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Scores of 12 positions read together, 4 more together, then one by one."""
    cache = new_cache(model.config)
    parts = []
    for start, stop in ((0, 12), (12, 16), *((at, at + 1) for at in range(16, 20))):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        output = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
        parts.append(output.logits)
    scores = torch.cat(parts, 1).float()
    return torch.cat([scores[0], scores[1, 7:]])


def test_a_vision_tower_gives_the_same_features() -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7, projection_dim=8
    )
    stock = CLIPVisionModel(config).eval().bfloat16()
    fast = copy.deepcopy(stock)
    accelerate_cpu(fast, packed=(fast,))
    views = torch.randn(2, 3, 28, 28).bfloat16()
    with torch.inference_mode():
        expected, found = stock(views).last_hidden_state, fast(views).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * expected.abs().max().item())


OPERATIONS = st.lists(st.sampled_from(["one", "five", "forty", "crop", "rows", "repeat", "reorder"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_the_cache_holds_what_a_dynamic_cache_holds(operations: list[str]) -> None:
    ours, theirs = new_cache(LlamaConfig()), DynamicCache()
    rows = 2
    for operation in ("five", *operations, "one"):
        if size := {"one": 1, "five": 5, "forty": 40}.get(operation):
            new = torch.randn(rows, 2, size, 4)
            for layer in range(2):
                for found, expected in zip(ours.update(new, -new, layer), theirs.update(new, -new, layer), strict=True):
                    assert torch.equal(found, expected)
        rows = _change(operation, rows, ours, theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)


def _change(operation: str, rows: int, *caches: object) -> int:
    for cache in caches:
        if operation == "crop":
            cache.crop(-min(3, cache.get_seq_length() - 1))
        elif operation == "rows" and rows > 1:
            cache.batch_select_indices(torch.arange(1, rows))
        elif operation == "repeat" and rows < 9:
            cache.batch_repeat_interleave(2)
        elif operation == "reorder":
            cache.reorder_cache(torch.arange(rows))
    return rows - (operation == "rows" and rows > 1) + rows * (operation == "repeat" and rows < 9)


def test_reordering_beams_moves_what_they_do_not_share() -> None:
    layer = InPlaceLayer()
    past = torch.randn(2, 1, 5, 4)
    layer.update(past, past)
    layer.batch_repeat_interleave(2)
    new = torch.randn(4, 1, 3, 4)
    layer.update(new, new)
    order = torch.tensor([1, 1, 2, 2])
    layer.reorder_cache(order)
    found, _ = layer.update(new[:, :, :1], new[:, :, :1])
    assert torch.equal(found[:, :, :8], torch.cat([past.repeat_interleave(2, 0), new], 2)[order])


def test_the_buffer_behind_a_view_is_found_only_behind_a_view() -> None:
    layer = InPlaceLayer()
    layer.update(torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 4))
    keys, _ = layer.update(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4))
    buffer = whole(keys)
    assert buffer is not None
    assert buffer.data_ptr() == layer.keys.data_ptr()
    assert buffer.shape == layer.keys.shape
    assert buffer.isfinite().all()
    assert whole(torch.ones(2, 3, 5, 4)) is None
    assert whole(torch.ones(2, 5, 3, 4).transpose(1, 2)) is None
    assert whole(torch.ones(2, 3, 9, 4)[:, :, 3:]) is None
