"""Weights of a checkpoint, and whether two are equal bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from llavakit.checkpoint import store


def weights(folder: os.PathLike[str]) -> dict[str, Tensor]:
    model, _ = store.load(Path(folder), dtype="auto")
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
