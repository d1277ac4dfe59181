"""Laws of a measured speed: a shallow model computes what the formulas say it does, whatever learns, and the plan scales it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llavakit.cli import main
from llavakit.config import FINETUNE, PRETRAIN, Lora, TrainConfig
from llavakit.model.cards import Card
from llavakit.model.llava import Llava
from llavakit.model.presets import ModelConfig, clip, llama
from llavakit.train import pace
from llavakit.train.described import Samples, outline, planned
from llavakit.train.plan import flops, hours, plan

CONFIG = ModelConfig(
    vision=clip(size=56, width=32, layers=5, heads=4, projection=16),
    text=llama(width=64, layers=6, heads=4, feed_forward=160, rows=640, positions=1024, pad=638),
    image_token_id=639,
)
DATA = Samples(samples=400, views=1, image_tokens=16, text_tokens=60, learned_tokens=20)
CPU = {"device": "cpu", "dtype": "fp32", "batch_size": 4, "accumulation": 2}
KINDS: dict[str, TrainConfig] = {
    "pretrain": replace(PRETRAIN, **CPU),
    "finetune": replace(FINETUNE, **CPU),
    "padded": replace(FINETUNE, pack=False, **CPU),
    "again": replace(FINETUNE, gradient_checkpointing=True, **CPU),
    "tower": replace(FINETUNE, rates=((r"vision_tower\..*", 0.2),), **CPU),
    "lora": replace(FINETUNE, lora=Lora(r=4, dropout=0.0), **CPU),
}


@pytest.mark.parametrize("kind", ["pretrain", "padded", "tower", "lora"])
def test_the_made_up_samples_cost_what_the_formulas_say(kind: str) -> None:
    config = replace(KINDS[kind], pack=False)
    shape = pace.shallow(CONFIG, 1, 1 + pace.MORE)
    run = planned(config, CONFIG, DATA)
    model, _ = outline(config, shape, device="cpu")
    for name in model.vision_tower.never_run():
        model.get_parameter(name).requires_grad_(False)
    model.language_model.set_attn_implementation("eager")
    model.vision_tower.vision_model.set_attn_implementation("eager")
    tried = pace.rounded(run, shape)
    batch = pace.made_up(tried, 4, pack=False)
    with FlopCounterMode(display=False) as counter:
        model(batch).loss_sum.backward()
    assert counter.get_total_flops() == pytest.approx(4 * flops(tried).total, rel=0.02)


def test_shallow_keeps_the_widths() -> None:
    small = pace.shallow(CONFIG, 2, 3)
    model = Llava(small)
    assert model.vision_tower.run_layers == 2
    assert len(model.language_model.model.layers) == 3
    assert (small.vision["hidden_size"], small.text["intermediate_size"]) == (32, 160)
    assert pace.shallow(CONFIG, 99, 99) == CONFIG


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_can_be_measured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE", 0)
    state = torch.get_rng_state()
    config = KINDS[kind]
    run = planned(config, CONFIG, DATA)
    found = pace.measure(run, config)
    assert found.steps == 3 * pace.LEAST
    assert min(found.rate, found.update) > 0
    assert torch.equal(torch.get_rng_state(), state), "no draw of the caller's"
    made = plan(run, pace.here(config, found), utilisation=1.0, update=found.update)
    expected = 400 * flops(run).total / found.rate + run.steps * run.learned * found.update
    assert made.hours * 3600 == pytest.approx(expected)
    assert made.room > 2**28


def test_updates_count_by_steps_not_by_samples() -> None:
    run = planned(KINDS["finetune"], CONFIG, DATA)
    alone, twice = (hours(replace(run, batch=batch), rate=1e9, update=1e-6) for batch in (8, 4))
    assert twice - alone == pytest.approx(50 * run.learned * 1e-6 / 3600)
    card = Card(memory=24, peak=1e9)
    spread = plan(run, card, devices=2, sharding="fsdp", utilisation=1.0, update=1e-6).hours
    assert spread == pytest.approx(hours(run, rate=2e9, update=0.5e-6)), "each device updates its part"


def test_the_command_measures_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PATIENCE", 0)
    words: list[Any] = ["plan", "pretrain", "--model", "tiny", "--gpu", "here", "samples=100", "batch_size=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "on 1 x this machine" in said
    assert "of the measured rate" in said
