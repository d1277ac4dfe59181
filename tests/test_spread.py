"""Models over several devices: laid by accelerate, the same logits; what cannot be laid is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llavakit.assistant import Assistant
from llavakit.errors import CheckpointError, MissingExtraError
from llavakit.types import Conversation, Sampling
from twins import picture

TALK = Conversation.ask("What is this?", picture(0))


def test_without_accelerate_it_is_said(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError) as caught:
        Assistant.load(tiny_model_dir, device_map="auto")
    assert "accelerate" in str(caught.value)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"language_model": "cpu", "": "cpu"}])
def test_a_model_laid_out_answers_alike(tiny_model_dir: Path, device_map: object) -> None:
    pytest.importorskip("accelerate", reason="accelerate is an extra")
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("a GPU rounds in another way than the CPU it is compared with")
    plain = "".join(Assistant.load(tiny_model_dir, device="cpu").reply(TALK, Sampling(max_new_tokens=8)))
    laid = Assistant.load(tiny_model_dir, device_map=device_map)  # type: ignore[arg-type]
    assert "".join(laid.reply(TALK, Sampling(max_new_tokens=8))) == plain


@pytest.mark.parametrize("device_map", [{"tower": "cpu", "": "cpu"}, {"language_model": "cpu"}, {"": "nowhere"}])
def test_a_map_that_does_not_fit_is_said(tiny_model_dir: Path, device_map: dict[str, str]) -> None:
    pytest.importorskip("accelerate", reason="accelerate is an extra")
    with pytest.raises(CheckpointError) as caught:
        Assistant.load(tiny_model_dir, device_map=device_map)
    assert caught.value.code == "bad_device_map"
