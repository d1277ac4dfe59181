"""Packed language models: close to the full one, smaller by the stated share, and nothing but the language model is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llavakit.assistant import Assistant
from llavakit.checkpoint import store
from llavakit.errors import CheckpointError
from llavakit.model.quantize import GROUP, QUANTIZATIONS, Linear4, Linear8, Quantization, is_packed
from llavakit.types import Conversation, Image, Pixels

WORST = {"8bit": 0.012, "4bit": 0.13}  # relative error of a product with normal weights


def packed(linear: nn.Linear, kind: type[Linear8] | type[Linear4]) -> nn.Module:
    module = kind(linear)
    module.load_state_dict(dict(module.state_dict(), **kind.pack(linear.weight.detach())), assign=True)
    return module


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.sampled_from([64, 192, 256]), st.sampled_from([16, 48, 128]), st.booleans(), st.sampled_from(QUANTIZATIONS))
def test_a_packed_product_is_close(rows: int, inputs: int, outputs: int, bias: bool, quantization: Quantization) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    nn.init.normal_(linear.weight)
    x = torch.randn(2, rows, inputs, dtype=torch.bfloat16)
    with torch.inference_mode():
        full, near = linear(x).float(), packed(linear, Linear8 if quantization == "8bit" else Linear4)(x).float()
    assert near.shape == full.shape
    assert float((near - full).norm() / full.norm()) < WORST[quantization]


def test_rows_are_packed_independently() -> None:
    """So that a large weight may be packed in pieces."""
    weight = torch.randn(1024, 128, dtype=torch.bfloat16)
    for kind in (Linear8, Linear4):
        whole, pieces = kind.pack(weight), [kind.pack(rows) for rows in weight.split(512)]
        for leaf, dimension in kind.rows.items():
            assert torch.equal(whole[leaf], torch.cat([piece[leaf] for piece in pieces], dim=dimension))


def test_weights_on_the_grid_are_packed_without_loss() -> None:
    linear = nn.Linear(GROUP, 16, bias=False)
    numbers = torch.randint(-127, 128, (16, GROUP))
    numbers[:, 0] = 127
    linear.weight.data = numbers.float()
    x = torch.randn(3, GROUP)
    assert torch.allclose(packed(linear, Linear8)(x), linear(x), rtol=1e-5, atol=1e-3)
    steps = torch.randint(0, 16, (16, GROUP))
    steps[:, :2] = torch.tensor([0, 15])
    linear.weight.data = steps.float()
    assert torch.allclose(packed(linear, Linear4)(x), linear(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_only_the_language_model_is_packed(quantization: Quantization) -> None:
    from llavakit.checkpoint import places

    full, _ = store.load(places.built_in())
    small, _ = store.load(places.built_in(), quantization=quantization)
    assert is_packed(small)
    assert not is_packed(full)
    now = small.state_dict()
    layers = {
        name: value
        for name, value in full.state_dict().items()
        if ".layers." in name and name.startswith("language_model.") and value.dim() == 2
    }
    for name, value in full.state_dict().items():
        if name not in layers:
            assert torch.equal(now[name], value), name
    stored = sum(now[name].nbytes + now[name.removesuffix("weight") + "scale"].nbytes for name in layers)
    share = stored / sum(value.nbytes for value in layers.values())
    assert share < {"8bit": 0.51, "4bit": 0.29}[quantization]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_built_in_model_still_answers(quantization: Quantization) -> None:
    square = Image(Pixels(64, 64, bytes((212, 38, 40)) * 64 * 64))
    replies = [
        "".join(Assistant.load(quantization=choice, device="cpu").reply(Conversation.ask("What is this?", square)))
        for choice in (None, quantization)
    ]
    assert all(reply.startswith("The picture shows") for reply in replies)


def test_a_packed_model_is_not_saved(tmp_path: Path, tiny_model_dir: Path) -> None:
    model, processor = store.load(tiny_model_dir, quantization="8bit")
    with pytest.raises(CheckpointError) as caught:
        store.save(model, processor, tmp_path / "out")
    assert caught.value.code == "packed_weights"
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_packed_is_said(tiny_model_dir: Path) -> None:
    for quantization, code in (("2bit", "bad_quantization"), ("4bit", "quantization_not_possible")):
        with pytest.raises(CheckpointError) as caught:
            store.load(tiny_model_dir, quantization=quantization, device="cpu" if quantization == "2bit" else "meta")  # type: ignore[arg-type]
        assert caught.value.code == code
