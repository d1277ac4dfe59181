"""Compiled layers: the loss and gradients of the layers as written, one program for all layers, and a run that resumes bit for bit.

The compiler's own code generation is not tested here (it takes minutes): programs are traced, cut and differentiated, and run by torch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packing import gradients, same, taught
from test_resume import assert_same_run, stop_after
from torch.fx import GraphModule

from llavakit.checkpoint import store
from llavakit.config import TrainConfig
from llavakit.errors import ConfigError
from llavakit.model.llava import Llava
from llavakit.train import compiled
from llavakit.train.attention import use_training_attention
from llavakit.train.compiled import check_compiler, compile_layers
from llavakit.train.loop import train
from llavakit.train.progress import read_metrics
from test_families import LANGUAGE_MODELS, made


@pytest.fixture(autouse=True)
def _anew() -> Any:
    """No program of another test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("backend", "pack"), [("aot_eager", True), ("eager", False)])
def test_loss_and_gradients_are_those_of_the_layers_as_written(tokenizer: Any, backend: str, pack: bool) -> None:
    """A packed row with a backward pass of the compiler's, and padded ones."""
    model, processor = made(tokenizer, "1.5", "llama")
    model.train()
    use_training_attention(model.language_model)
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    batch = processor.pack(inputs) if pack else processor.collate(inputs, side="right")
    expected, names = gradients(model, [batch]), list(model.state_dict())
    compile_layers(model, backend=backend)
    same(gradients(model, [batch]), expected)
    assert list(model.state_dict()) == names


def programs(tokenizer: Any, layers: int) -> int:
    """How many a model of so many decoder layers takes, for rows of three lengths."""
    made_of: list[GraphModule] = []

    def counting(graph: GraphModule, inputs: Any) -> Any:
        made_of.append(graph)
        return graph.forward

    LANGUAGE_MODELS["deep"] = {"num_hidden_layers": layers}
    model, processor = made(tokenizer, "1.5", "deep")
    del LANGUAGE_MODELS["deep"]
    assert isinstance(model, Llava)
    model.train()
    use_training_attention(model.language_model)
    inputs = [processor.encode(talk, learn=True) for talk in taught()]
    compile_layers(model, backend=counting)
    for start in range(3):
        model(processor.pack(inputs[start:]))
    torch.compiler.reset()
    return len(made_of)


def test_all_layers_and_lengths_share_their_programs(tokenizer: Any) -> None:
    assert 0 < programs(tokenizer, 2) == programs(tokenizer, 10)


def test_a_compiled_run_takes_the_same_steps_and_resumes_bit_for_bit(
    finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Checkpointed; with pictures answered at each measurement, by the layers as written."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    plain = replace(finetune, steps=4, holdout=3, save_every=2, out=tmp_path / "plain")
    whole, parted = (replace(plain, compile=True, gradient_checkpointing=True, out=tmp_path / name) for name in ("whole", "parted"))
    train(plain)
    saved = train(whole).checkpoint
    for one, other in zip(read_metrics(plain.out), read_metrics(whole.out), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    store.load(saved)
    train(parted, on_step=stop_after(2))
    torch.compiler.reset()
    train(parted)
    assert_same_run(whole.out, parted.out)


def test_without_a_compiler_it_is_told_at_once(finetune: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_cpp_missing", lambda: "there is no C++ compiler")
    with pytest.raises(ConfigError, match="compile=false") as caught:
        train(replace(finetune, compile=True))
    assert caught.value.code == "no_compiler"
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    for kind in ("cuda", "mps"):
        with pytest.raises(ConfigError):
            check_compiler(torch.device(kind))
