"""torch.compile for training: layer by layer, so that all layers of a kind are one program, made once.

    tower layer    [ norm, attention, norm, MLP ]                          a kernel or few instead of one an operation
    decoder layer  [ norm, q k v, turn ] attention [ out, norm, MLP ]      the attention of packed rows stays what it is: it is fast,
                                                                           and where its examples begin is data, not program

Lengths are symbols from the first step on: no length is compiled for itself, and a run that is resumed computes with the programs of the
run that was not stopped. Names of weights, checkpoints and configs know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llavakit.errors import ConfigError
from llavakit.model.llava import Llava
from llavakit.train.attention import OURS
from llavakit.train.ranks import layers

BACKEND = "inductor"


def check_compiler(device: torch.device) -> None:
    """Raise ConfigError ``no_compiler`` where torch.compile would fail at the first step."""
    if device.type == "cuda":
        missing = None if find_spec("triton") else "triton is not installed"
    elif device.type == "cpu":
        missing = _cpp_missing()
    else:
        missing = f"{device.type} is not supported"
    if missing:
        raise ConfigError(f"layers cannot be compiled: {missing}", code="no_compiler", where="compile", remedy="use compile=false")


def _cpp_missing() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler"
    return None


def compile_layers(model: Llava, *, backend: str | None = None) -> None:
    """Compile the blocks of tower and decoder in place; each is compiled when it is first run."""
    for name, function in OURS.items():
        ALL_ATTENTION_FUNCTIONS.register(name, torch.compiler.disable(function))
    for layer in layers(model):
        layer.compile(backend=backend or BACKEND, dynamic=True)


@contextmanager
def uncompiled(on: bool) -> Iterator[None]:
    """Within it, compiled layers run as they are written: generation, token by token, would compile them anew for each cache."""
    if not on:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
