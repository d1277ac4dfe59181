"""Graphics cards as a literal table: memory, and dense matrix products a second in the arithmetic that training uses there.

bf16 with sums in fp32, without sparsity, as the vendors print it; where a card multiplies no bf16, training runs in fp32 and that rate
stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llavakit.errors import ConfigError

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Card:
    """``peak`` in FLOP/s, ``memory`` in GiB, ``mask`` the bytes of dropout for each number."""

    memory: float
    peak: float
    bf16: bool = True
    mask: int = 1


CARDS: Mapping[str, Card] = {
    "B200": Card(memory=180, peak=2250 * TERA),
    "H200": Card(memory=140, peak=989 * TERA),
    "H100": Card(memory=80, peak=989 * TERA),
    "H100-PCIE": Card(memory=80, peak=756 * TERA),
    "MI300X": Card(memory=192, peak=1307 * TERA),
    "A100-80": Card(memory=80, peak=312 * TERA),
    "A100-40": Card(memory=40, peak=312 * TERA),
    "L40S": Card(memory=48, peak=362 * TERA),
    "A6000": Card(memory=48, peak=155 * TERA),
    "A40": Card(memory=48, peak=150 * TERA),
    "L4": Card(memory=24, peak=121 * TERA),
    "A10": Card(memory=24, peak=125 * TERA),
    "RTX5090": Card(memory=32, peak=209 * TERA),
    "RTX4090": Card(memory=24, peak=165 * TERA),
    "RTX3090": Card(memory=24, peak=71 * TERA),
    "V100-32": Card(memory=32, peak=15.7 * TERA, bf16=False),
    "V100-16": Card(memory=16, peak=15.7 * TERA, bf16=False),
    "T4": Card(memory=16, peak=8.1 * TERA, bf16=False),
}


def card(name: str) -> Card:
    """The card of a name, its case ignored. Raises ConfigError ``unknown_card``."""
    found = CARDS.get(name.upper())
    if found is None:
        raise ConfigError(f"no card '{name}'", code="unknown_card", where="--gpu", remedy=f"use one of {', '.join(CARDS)}")
    return found
