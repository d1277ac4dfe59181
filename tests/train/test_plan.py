"""Closed formulas against what torch counts and holds; wall times and recipes are test_plan_recipes'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import Peak
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llavakit.config import Lora
from llavakit.errors import ConfigError
from llavakit.model.cards import card
from llavakit.model.llava import IGNORED, Llava
from llavakit.model.presets import ModelConfig, clip, llama
from llavakit.model.released import SYSTEMS
from llavakit.processor import Batch
from llavakit.recipes import RECIPES
from llavakit.train import start
from llavakit.train.described import Samples, outline, planned
from llavakit.train.optim import Optimizer
from llavakit.train.plan import GIB, Part, Run, activations, calibrate, flops, hours, memory, plan
from llavakit.train.stages import STAGES

IMAGE, ROWS, TEXT, LEARNED = 639, 2, 120, 40
CONFIG = ModelConfig(
    vision=clip(size=112, width=64, layers=4, heads=4, projection=16),
    text=llama(width=128, layers=3, heads=4, feed_forward=320, rows=640, positions=1024, pad=638) | {"num_key_value_heads": 2},
    image_token_id=IMAGE,
)
LEARNS: dict[str, tuple[Part, ...]] = {
    "pretrain": ("projector",),
    "finetune": ("projector", "language_model"),
    "whole": ("tower", "projector", "language_model"),
}


def run_of(stage: str, config: ModelConfig = CONFIG, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "config": config, "samples": 100, "batch": ROWS, "views": 1, "image_tokens": 64, "text_tokens": TEXT, "learned_tokens": LEARNED,
        "learns": LEARNS[stage], "checkpointing": False,
    }  # fmt: skip
    return Run(**fields | changes)


def batch_of(config: ModelConfig) -> Batch:
    grid = config.tiling.grid(config.image_size, config.image_size)
    length = grid.tokens + TEXT
    ids = torch.full((ROWS, length), 5)
    ids[:, 3 : 3 + grid.tokens] = IMAGE
    labels = torch.full((ROWS, length), IGNORED)
    labels[:, -LEARNED:] = 7
    views = torch.randn(ROWS, 3, config.image_size, config.image_size)
    return Batch(ids, labels, torch.ones_like(ids), torch.arange(length).expand(ROWS, -1), views, (grid,) * ROWS)


def model_of(run: Run, *, forward: torch.dtype = torch.float32, attention: str = "eager") -> tuple[Llava, dict[str, float]]:
    """A model whose stage is the run's, placed as training places it."""
    model = Llava(run.config)
    stage = STAGES["finetune" if "language_model" in run.learns else "pretrain"]
    rates = stage.with_rows(((r"vision_tower\..*", 1.0),) if "tower" in run.learns else ()).apply(model)
    for name in model.vision_tower.never_run():
        model.get_parameter(name).requires_grad_(False)
        rates.pop(name, None)
    start.place(model, rates, device=torch.device("cpu"), forward=forward, frozen="bf16")
    model.language_model.set_attn_implementation(attention)
    model.vision_tower.vision_model.set_attn_implementation(attention)
    model.train()
    if "tower" not in run.learns:
        model.vision_tower.eval()
    model.set_gradient_checkpointing(run.checkpointing)
    return model, rates


# ---- operations


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("stage", LEARNS)
def test_the_formulas_count_what_torch_counts(stage: str, checkpointing: bool) -> None:
    run = run_of(stage, checkpointing=checkpointing)
    model, _ = model_of(run)
    with FlopCounterMode(display=False) as counter:
        model(batch_of(run.config)).loss_sum.backward()
    assert counter.get_total_flops() == pytest.approx(ROWS * flops(run).total, rel=0.01)


def test_each_part_counts_what_torch_counts_for_it() -> None:
    run = run_of("finetune")
    model, _ = model_of(run)
    with FlopCounterMode(display=False) as counter:
        model(batch_of(run.config)).loss_sum.backward()
    counted = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    made = flops(run)
    assert counted["Llava.vision_tower"] == pytest.approx(ROWS * made.tower, rel=0.01)
    assert counted["Llava.multi_modal_projector"] == pytest.approx(ROWS * made.projector, rel=0.01)
    assert counted["Llava.language_model.lm_head"] == pytest.approx(ROWS * made.head, rel=0.01)
    assert counted["Llava.language_model"] == pytest.approx(ROWS * (made.layers + made.attention + made.head), rel=0.01)


@pytest.mark.parametrize("changes", [{"projector": "linear"}, {"select_layer": -1}, {"select_feature": "cls_patch"}], ids=str)
def test_every_shape_is_counted(changes: dict[str, Any]) -> None:
    config = replace(CONFIG, **changes)
    run = run_of("pretrain", config, image_tokens=config.view_tokens)
    model, _ = model_of(run)
    with FlopCounterMode(display=False) as counter:
        model(batch_of(config)).loss_sum.backward()
    assert counter.get_total_flops() == pytest.approx(ROWS * flops(run).total, rel=0.01)


def test_adapters_are_a_rank_on_every_linear_layer_of_the_language_model() -> None:
    run = run_of("pretrain", rank=4)
    decoder = Llava(CONFIG).language_model.model
    linears = [module for module in decoder.modules() if type(module) is nn.Linear]
    assert run.adapters == sum(4 * (module.in_features + module.out_features) for module in linears)
    assert flops(run).adapters == 2 * run.adapters * run.tokens * 3


# ---- memory


@pytest.mark.parametrize("stage", LEARNS)
def test_weights_and_moments_are_exact(stage: str) -> None:
    run = run_of(stage)
    model, rates = model_of(run, forward=torch.bfloat16)
    optimizer = Optimizer(model, rates, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999), clip=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch_of(run.config)).loss_sum
    loss.backward()
    gradients = sum(value.grad.nbytes for value in model.parameters() if value.grad is not None)
    optimizer.step(1.0)
    moments = sum(value.nbytes for value in optimizer.state().values() if value.ndim)
    found = memory(run, rows=ROWS)
    assert found.weights == sum(value.nbytes for value in model.parameters())
    assert (found.gradients, found.moments) == (gradients, moments)


@pytest.mark.parametrize("stage", LEARNS)
def test_activations_are_what_autograd_keeps(stage: str) -> None:
    run = run_of(stage)
    model, _ = model_of(run, forward=torch.bfloat16, attention="sdpa")
    own = {value.data_ptr() for value in model.parameters()}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), torch.autocast("cpu", torch.bfloat16):
        model(batch_of(run.config))
    copies = memory(run, rows=ROWS).copies
    logits = ROWS * LEARNED * run.config.rows * 6
    assert sum(size for size, _ in kept.values()) - copies - logits == pytest.approx(ROWS * activations(run), rel=0.05)


@pytest.mark.parametrize("forward", [torch.bfloat16, torch.float32], ids=str)
def test_adapters_keep_what_autograd_keeps(forward: torch.dtype) -> None:
    """With dropout, whose mask torch's CPU holds in four bytes."""
    config = replace(RECIPES["lora"].config, lora=Lora(r=8, dropout=0.05), pack=False)
    model, rates = outline(config, CONFIG, device="cpu")
    start.place(model, rates, device=torch.device("cpu"), forward=forward, frozen="bf16")
    model.train().language_model.set_attn_implementation("sdpa")
    own, kept = {value.data_ptr() for value in model.parameters()}, dict[int, tuple[int, torch.UntypedStorage]]()

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return value

    narrow = forward == torch.bfloat16
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        model(batch_of(CONFIG))
    run = planned(config, CONFIG, Samples(samples=100, views=1, image_tokens=64, text_tokens=TEXT, learned_tokens=LEARNED))
    logits = ROWS * LEARNED * CONFIG.rows * (6 if narrow else 4)
    found = sum(size for size, _ in kept.values()) - memory(run, rows=ROWS, bf16=narrow).copies - logits
    assert found == pytest.approx(ROWS * activations(run, bf16=narrow, mask=4), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("stage", LEARNS)
def test_the_fullest_moment_of_a_second_micro_batch(stage: str, checkpointing: bool) -> None:
    text = llama(width=256, layers=6, heads=8, feed_forward=704, rows=640, positions=1024, pad=638)
    run = run_of(stage, replace(CONFIG, text=text), text_tokens=TEXT, checkpointing=checkpointing)
    model, _ = model_of(run, forward=torch.bfloat16, attention="sdpa")
    with Peak() as peak:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch_of(run.config)).loss_sum
            loss.backward()
    found = memory(run, rows=ROWS)
    share = peak.most / (found.total - found.weights - found.moments)
    assert (0.8 if checkpointing else 0.95) < share < 1.02  # with checkpointing the copies are gone before a layer is computed again


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 64), devices=st.integers(2, 64), checkpointing=st.booleans(), stage=st.sampled_from(sorted(LEARNS)))
def test_memory_only_shrinks_by_what_saves_memory(rows: int, devices: int, checkpointing: bool, stage: str) -> None:
    run = run_of(stage, checkpointing=checkpointing)
    alone = memory(run, rows=rows)
    sharded = memory(run, rows=rows, devices=devices, sharding="fsdp")
    assert sharded.weights * devices == pytest.approx(alone.weights)
    assert sharded.moments * devices == pytest.approx(alone.moments)
    assert memory(run, rows=rows, devices=devices, sharding="ddp") == alone
    assert memory(run, rows=rows + 1).total > alone.total
    assert memory(replace(run, checkpointing=True), rows=rows).total <= alone.total
    assert memory(run, rows=rows, bf16=False).activations > alone.activations


# ---- hours


@settings(max_examples=5, deadline=None)
@given(samples=st.integers(1, 10**6), epochs=st.integers(1, 9), rate=st.floats(1e9, 1e18))
def test_hours_are_operations_over_the_rate(samples: int, epochs: int, rate: float) -> None:
    run = run_of("finetune", samples=samples, epochs=epochs)
    assert hours(run, rate=rate) * 3600 * rate == pytest.approx(samples * epochs * flops(run).total)
    again = replace(run, checkpointing=True)
    assert hours(again, rate=rate) > hours(run, rate=rate)


def test_calibration_is_the_inverse_of_the_prediction() -> None:
    run = run_of("finetune", samples=1000, batch=10)
    seconds = hours(run, rate=8 * 1e12 * 0.3) * 3600 / run.steps
    assert calibrate(run, seconds, peak=8 * 1e12) == pytest.approx(0.3)


# ---- plans


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_published_system_can_be_planned(name: str) -> None:
    run = run_of("finetune", SYSTEMS[name].config, image_tokens=576)
    made = plan(run, card("H200"), devices=8)
    assert made.memory.total > 0.9 * 16 * run.sizes.language_model / 8
    assert made.room < 140 * GIB


@pytest.mark.parametrize(
    "changes", [{"samples": 0}, {"padding": 0.5}, {"learns": ()}, {"learns": ("language_model",), "rank": 8}, {"weights": "4bit"}], ids=str
)
def test_a_run_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run_of("finetune", **changes)
