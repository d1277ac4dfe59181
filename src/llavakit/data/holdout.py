"""Samples kept from training, and parts of a source by where they come from and what they show.

source   0 1 2 3 4 5 6 7 8 9      keep 3, seed 0 -->  train 0 1 3 4 5 7 9   held 2 6 8      a pure function of (count, keep, seed)
held     2: picture   6: text   8: picture   -->  {"picture": 2 8, "text": 6}              of a mixture: "name, picture" ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llavakit.data.mixture import Mixture
from llavakit.data.sources import Sample, Source
from llavakit.errors import ConfigError


@dataclass(frozen=True)
class Part(Sequence[Sample]):
    """Some samples of a source, in its order."""

    whole: Source | Mixture
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.whole[self.numbers[index]]

    def lengths(self) -> list[tuple[bool, int]]:
        """As the source's own."""
        every = self.whole.lengths()
        return [every[number] for number in self.numbers]


def split(source: Source | Mixture, keep: int, *, seed: int) -> tuple[Source | Mixture | Part, Part]:
    """What is trained on, and what is kept. Raises ConfigError where nothing would be left."""
    if keep >= len(source):
        what = f"{keep} of {len(source)} samples cannot be kept from training"
        raise ConfigError(what, code="bad_value", where="holdout", remedy="keep fewer")
    if not keep:
        return source, Part(source, ())
    drawn = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 0x4E1D]))).permutation(len(source))[:keep]
    held = frozenset(drawn.tolist())
    return Part(source, tuple(i for i in range(len(source)) if i not in held)), Part(source, tuple(sorted(held)))


def groups(part: Part) -> dict[str, Part]:
    """A part cut by source and by kind: with a picture, or text alone."""
    found: dict[str, list[int]] = {}
    for number in part.numbers:
        sample = part.whole[number]
        kind = "picture" if sample.conversation.images else "text"
        found.setdefault(f"{sample.source}, {kind}" if sample.source else kind, []).append(number)
    return {name: Part(part.whole, tuple(numbers)) for name, numbers in sorted(found.items())}
