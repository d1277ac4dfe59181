"""Training with tiles (LLaVA-NeXT, 1.5-HD): what is added to the model, what learns, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from weights import weights

from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.errors import ConfigError
from llavakit.tiling import HD, tiles_of
from llavakit.train.loop import train

TOWER_TOO = ((r"vision_tower\..*", 0.1),)  # NeXT's stage 2 (spec 4.1)


def test_next_learns_the_tower_and_the_row_end_too(finetune: TrainConfig, tiny_model_dir: Path) -> None:
    config = replace(finetune, aspect="anyres", tiles="1x2,2x1,2x2", rates=TOWER_TOO, steps=2, batch_size=6)
    done = train(config)
    model, processor = store.load(done.checkpoint, dtype="stored")
    assert model.config.canvases == processor.tiling.canvases == tiles_of(((1, 2), (2, 1), (2, 2)), model.config.image_size)
    assert processor.preprocess.aspect == "squash"
    before, after = weights(tiny_model_dir), weights(done.checkpoint)
    assert after.keys() - before.keys() == {"image_newline"}
    unread = {name for name in before if name.startswith("vision_tower") and torch.equal(before[name], after[name])}
    last = f"layers.{model.config.vision['num_hidden_layers'] - 1}."  # LLaVA reads the layer before the last
    assert all("post_layernorm" in name or last in name for name in unread), unread
    assert not any(torch.equal(before[name], after[name]) for name in before.keys() - unread)


def test_the_row_end_learns_with_the_language_model_and_not_before(finetune: TrainConfig, pretrain: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(pretrain, aspect="anyres", steps=1, batch_size=6)).checkpoint
    second = train(replace(finetune, start=first, aspect="anyres", steps=1, batch_size=6, out=tmp_path / "two")).checkpoint
    third = train(replace(pretrain, start=second, aspect="anyres", steps=1, batch_size=6, out=tmp_path / "three"))
    one, two, three = (weights(folder)["image_newline"] for folder in (first, second, third.checkpoint))
    assert not torch.equal(one, two)
    assert torch.equal(two, three)


def test_hd_pads_the_view_of_the_whole(finetune: TrainConfig) -> None:
    model, processor = store.load(train(replace(finetune, aspect="anyres", tiles="hd", base="pad", steps=1, batch_size=6)).checkpoint)
    assert model.config.canvases == tiles_of(HD, model.config.image_size)
    assert processor.preprocess.aspect == "pad"


def test_a_model_with_tiles_does_not_lose_them_unasked(finetune: TrainConfig, tmp_path: Path) -> None:
    first = train(replace(finetune, aspect="anyres", steps=1, batch_size=6)).checkpoint
    with pytest.raises(ConfigError) as caught:
        train(replace(finetune, start=first, out=tmp_path / "second"))
    assert caught.value.where == "aspect"


@pytest.mark.parametrize("tiles", ["", "2", "0x1", "2x2,", "all", "10x1"])
def test_tiles_that_are_none(finetune: TrainConfig, tiles: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(replace(finetune, aspect="anyres", tiles=tiles))
    assert caught.value.where == "tiles"
