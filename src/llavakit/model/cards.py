"""Graphics cards as a literal table: memory, how fast it is read, and dense matrix products a second in the arithmetic used there.

bf16 with sums in fp32, without sparsity, as the vendors print it; where a card multiplies no bf16, training runs in fp32 and that rate
stands here. Such a card serves in fp16, whose rate is ``half``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llavakit.errors import ConfigError

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Card:
    """``peak`` and ``half`` in FLOP/s, ``memory`` in GiB, ``bandwidth`` in bytes/s, ``mask`` the bytes of dropout for each number."""

    memory: float
    peak: float
    bandwidth: float = 0.0
    bf16: bool = True
    half: float = 0.0
    mask: int = 1

    @property
    def serving(self) -> float:
        """FLOP/s in 16 bits, whichever kind the card has."""
        return self.peak if self.bf16 else self.half


CARDS: Mapping[str, Card] = {
    "B200": Card(memory=180, peak=2250 * TERA, bandwidth=8 * TERA),
    "H200": Card(memory=140, peak=989 * TERA, bandwidth=4.8 * TERA),
    "H100": Card(memory=80, peak=989 * TERA, bandwidth=3.35 * TERA),
    "H100-PCIE": Card(memory=80, peak=756 * TERA, bandwidth=2 * TERA),
    "MI300X": Card(memory=192, peak=1307 * TERA, bandwidth=5.3 * TERA),
    "A100-80": Card(memory=80, peak=312 * TERA, bandwidth=2.04 * TERA),
    "A100-40": Card(memory=40, peak=312 * TERA, bandwidth=1.56 * TERA),
    "L40S": Card(memory=48, peak=362 * TERA, bandwidth=0.864 * TERA),
    "A6000": Card(memory=48, peak=155 * TERA, bandwidth=0.768 * TERA),
    "A40": Card(memory=48, peak=150 * TERA, bandwidth=0.696 * TERA),
    "L4": Card(memory=24, peak=121 * TERA, bandwidth=0.3 * TERA),
    "A10": Card(memory=24, peak=125 * TERA, bandwidth=0.6 * TERA),
    "RTX5090": Card(memory=32, peak=209 * TERA, bandwidth=1.79 * TERA),
    "RTX4090": Card(memory=24, peak=165 * TERA, bandwidth=1.01 * TERA),
    "RTX3090": Card(memory=24, peak=71 * TERA, bandwidth=0.936 * TERA),
    "V100-32": Card(memory=32, peak=15.7 * TERA, bandwidth=0.9 * TERA, bf16=False, half=125 * TERA),
    "V100-16": Card(memory=16, peak=15.7 * TERA, bandwidth=0.9 * TERA, bf16=False, half=125 * TERA),
    "T4": Card(memory=16, peak=8.1 * TERA, bandwidth=0.32 * TERA, bf16=False, half=65 * TERA),
}


def card(name: str) -> Card:
    """The card of a name, its case ignored. Raises ConfigError ``unknown_card``."""
    found = CARDS.get(name.upper())
    if found is None:
        raise ConfigError(f"no card '{name}'", code="unknown_card", where="--gpu", remedy=f"use one of {', '.join(CARDS)}")
    return found
