"""What old scripts import from here."""

from __future__ import annotations


def disable_torch_init() -> None:
    """Nothing to do: llavakit builds a model without initialising it. (The original switched torch's initialisers off for the process.)"""
