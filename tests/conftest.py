"""What many rooms' tests share for a session; see ``tiny.py`` for how it is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llavakit.assistant import Assistant
from llavakit.checkpoint import store
from llavakit.model.llava import Llava
from tiny import llama_tokenizer, tiny_config, tiny_processor


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A throwaway tokenizer; tests do not change it."""
    return llama_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint with random fp32 weights; tests do not change it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        store.save(Llava(tiny_config(tokenizer)), tiny_processor(tokenizer), folder)
    return folder


@pytest.fixture(scope="module")
def helper(tiny_model_dir: Path) -> Assistant:
    """A random model with scores far apart, so that rounding decides nothing."""
    made = Assistant.load(tiny_model_dir, device="cpu")
    with torch.no_grad():
        for weight in made.model.language_model.parameters():
            if weight.ndim == 2:
                weight.mul_(12)
    return made
