"""``verify`` passes what is equal and names the first stage of what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llavakit.checkpoint import places, store, verify
from llavakit.errors import CheckpointError
from llavakit.model.llava import Llava
from llavakit.processor import Processor
from llavakit.types import Conversation
from tiny import tiny_config, tiny_processor

NAMES = ["pixels", "token ids", "features", "logits", "greedy reply"]


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    store.save(Llava(tiny_config(tokenizer)), tiny_processor(tokenizer), tmp_path / "model")
    return tmp_path / "model"


def first(folder: Path) -> str | None:
    return next((stage.name for stage in verify.verify(folder) if not stage.same), None)


def test_what_is_equal_passes(folder: Path) -> None:
    stages = verify.verify(folder)
    assert [stage.name for stage in stages] == NAMES
    assert all(stage.same for stage in stages), stages


def test_a_difference_is_named_by_its_first_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llavakit.model.projector import Projector
    from llavakit.preprocess import Preprocess

    levels, project, encode = Preprocess._levels, Projector.forward, Processor.encode
    with monkeypatch.context() as patch:
        patch.setattr(Preprocess, "_levels", lambda self: levels(self) + 0.1)
        assert first(folder) == "pixels"
    with monkeypatch.context() as patch:
        patch.setattr(Processor, "encode", lambda self, asked, **more: encode(self, _louder(asked), **more))
        assert first(folder) == "token ids"
    with monkeypatch.context() as patch:
        patch.setattr(Projector, "forward", lambda self, x: project(self, x) * 1.001)
        assert first(folder) == "features"
    assert first(folder) is None


def _louder(asked: Conversation) -> Conversation:
    return Conversation.ask("What is in the picture!", asked.images[0])


def test_other_weights_in_the_language_model_are_a_difference_of_logits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = store.load

    def changed(*args: Any, **more: Any) -> Any:
        model, processor = load(*args, **more)
        with torch.no_grad():
            model.language_model.lm_head.weight.mul_(1.01)
        return model, processor

    monkeypatch.setattr(verify.store, "load", changed)
    assert first(folder) == "logits"


def test_what_transformers_cannot_represent_is_said(tokenizer: Any, tmp_path: Path) -> None:
    store.save(Llava(tiny_config(tokenizer, projector="linear")), tiny_processor(tokenizer), tmp_path / "v1")
    with pytest.raises(CheckpointError) as caught:
        verify.verify(tmp_path / "v1")
    assert caught.value.code == "not_comparable"
    with pytest.raises(CheckpointError) as caught:
        verify.verify(places.built_in("tiny-hd"))  # transformers pads no base view
    assert caught.value.code == "not_comparable"


@pytest.mark.parametrize("name", ["tiny", "tiny-next"])
def test_the_built_in_models_are_the_same_in_transformers(name: str) -> None:
    assert all(stage.same for stage in verify.verify(places.built_in(name)))
