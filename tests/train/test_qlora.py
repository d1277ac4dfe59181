"""Laws of QLoRA, on the CPU where bitsandbytes computes too: the packed base stays, and what is learned belongs to the whole one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lora import CLOSE, SMALL, attached, logits
from test_resume import assert_same_run, stop_after

from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.data.loader import Loader
from llavakit.train import start
from llavakit.train.loop import train
from twins import apart


@pytest.fixture
def config(finetune: TrainConfig) -> TrainConfig:
    return replace(finetune, lora=SMALL, lr=2e-2, steps=3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_stays_as_it_is_and_its_adapter_is_one_of_the_whole(bits: int, config: TrainConfig, tmp_path: Path) -> None:
    run = replace(config, lora=replace(SMALL, bits=bits), dtype="bf16", out=tmp_path / "whole")
    folder = train(run).checkpoint
    begun, again = attached(run, None), attached(run, folder)
    packed = {name: value for name, value in begun.model.named_parameters() if not value.is_floating_point()}
    assert len(packed) == 14
    assert all(".base_layer." in name for name in packed)
    now = dict(again.model.named_parameters())
    changed = {name for name, value in begun.model.named_parameters() if not torch.equal(value, now[name])}
    assert changed == set(again.rates)
    assert all(value.dtype == torch.float32 for value in load_file(folder / "adapter_model.safetensors").values())
    merged = logits(*store.load(folder, base=config.start, dtype="fp32"))
    assert apart(merged, logits(*store.load(run.start, dtype="fp32"))) > 1e-2  # type: ignore[arg-type]
    parted = replace(run, out=tmp_path / "parted")
    assert train(parted, on_step=stop_after(1)).exit_code == 143
    train(parted)
    assert_same_run(run.out, parted.out)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_watched_run_gives_the_same_bits(bits: int, config: TrainConfig, tmp_path: Path) -> None:
    """Evaluation runs in eval mode, in which packed layers compute in another way."""
    run = replace(config, lora=replace(SMALL, bits=bits), holdout=4, panel=1, out=tmp_path / "seen", steps=2)
    train(replace(run, eval_every=1))
    train(replace(run, eval_every=0, out=tmp_path / "unseen"))
    seen, unseen = (load_file(out / "step-2" / "adapter_model.safetensors") for out in (run.out, tmp_path / "unseen"))
    assert all(torch.equal(seen[name], unseen[name]) for name in seen)


def test_gradients_through_four_bits_are_those_of_the_same_numbers_held_whole(config: TrainConfig) -> None:
    """Also after a look in eval mode, where bitsandbytes would take up a kernel without gradients."""
    import bitsandbytes as bnb

    run = start.settled(replace(config, lora=replace(SMALL, bits=4, dropout=0.0)))
    begun = attached(run, None)
    start.place(begun.model, begun.rates, device=torch.device("cpu"), forward=torch.float32, frozen="keep")
    for name, parameter in begun.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    looked, whole = copy.deepcopy(begun.model), copy.deepcopy(begun.model)
    logits(looked, begun.processor)
    for module in [module for module in whole.modules() if isinstance(getattr(module, "base_layer", None), bnb.nn.Linear4bit)]:
        weight = module.base_layer.weight
        held = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        held.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        module.base_layer = held.requires_grad_(False)
    assert run.data is not None
    source = start.samples(run, print)
    (batch,) = next(iter(Loader(source, begun.processor, batch_size=4, seed=0))).batches
    found = []
    for model in (looked, whole):
        model.train()
        model(batch).loss_sum.backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys() == set(begun.rates)
    assert all(apart(found[0][name], found[1][name]) < CLOSE for name in found[0])
