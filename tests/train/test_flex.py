"""The ways to keep packed samples apart are one: torch's own attention for each, and FlexAttention for the row.

torch has no backward pass of FlexAttention on a CPU but its reference, which materialises the scores and is refused to users; here it is
let through, to show that what transformers builds of our positions is the attention that we mean.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_packing import gradients, same, taught
from torch.nn.attention import flex_attention as torchs
from transformers.integrations import flex_attention as theirs

from llavakit.config import TrainConfig
from llavakit.errors import ConfigError
from llavakit.train.attention import NAMES, check_flex, use_training_attention
from llavakit.train.loop import train
from llavakit.train.progress import read_metrics
from test_families import made


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", lambda *qkv, training=False, **rest: torchs.flex_attention(*qkv, **rest))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_by_flex_is_unpacked(tokenizer: Any, reference: None) -> None:
    """Loss and every gradient; keys shared by heads, and examples within the window and longer."""
    model, processor = made(tokenizer, "1.5", "mistral")
    model.train()
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    alone = gradients(model, [processor.collate([one], side="right") for one in inputs])
    use_training_attention(model.language_model, "flex")
    assert model.language_model.config._attn_implementation == "flex_attention"
    same(gradients(model, [processor.pack(inputs)]), alone)


@pytest.mark.parametrize("language_model", ["llama", "mistral", "gemma"])
def test_packed_by_torchs_own_is_unpacked(tokenizer: Any, language_model: str) -> None:
    model, processor = made(tokenizer, "1.5", language_model)
    model.train()
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    alone = gradients(model, [processor.collate([one], side="right") for one in inputs])
    use_training_attention(model.language_model, "sdpa")
    assert model.language_model.config._attn_implementation == NAMES["sdpa"]
    same(gradients(model, [processor.pack(inputs)]), alone)
    same(gradients(model, [processor.collate(inputs, side="right")]), alone)


def test_a_run_by_torchs_own_takes_the_same_steps(finetune: TrainConfig, tmp_path: Any) -> None:
    train(finetune)
    train(replace(finetune, attention="sdpa", out=tmp_path / "sdpa"))
    for one, other in zip(read_metrics(finetune.out), read_metrics(tmp_path / "sdpa"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_flex_is_refused_where_it_cannot_train(finetune: TrainConfig, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no backward pass on cpu"):
        train(replace(finetune, attention="flex"))
    language_model, cuda = made(tokenizer, "1.5", "llama")[0].language_model, torch.device("cuda")
    check_flex(language_model, cuda, compiled=False)
    with pytest.raises(ConfigError, match="compiled layers"):
        check_flex(language_model, cuda, compiled=True)
    language_model.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="dropout"):
        check_flex(language_model, cuda, compiled=False)
