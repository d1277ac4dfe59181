"""Samples kept from training, and parts of a source by where they come from and what they show.

source   0 1 2 3 4 5 6 7 8 9      keep 3, seed 0 -->  train 0 1 3 4 5 7 9   held 2 6 8      a pure function of (count, keep, seed)
held     2: picture   6: text   8: picture   -->  {"picture": 2 8, "text": 6}              of a mixture: "name, picture" ...

A part holds numbers in one array: of 665K samples five megabytes, whatever processes share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llavakit.data.mixture import Mixture
from llavakit.data.sources import Sample, Source
from llavakit.errors import ConfigError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Part(Sequence[Sample]):
    """Some samples of a source, in its order."""

    whole: Source | Mixture
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        return self.whole[int(self.numbers[index])]

    def lengths(self) -> Some:
        """As the source's own."""
        return Some(self.whole.lengths(), self.numbers)


@dataclass(frozen=True, eq=False)
class Some(Sequence[tuple[bool, int]]):
    """The lengths of a part's samples, looked up in those of the whole."""

    every: Sequence[tuple[bool, int]]
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[bool, int]:  # type: ignore[override]
        return self.every[int(self.numbers[index])]


def split(source: Source | Mixture, keep: int, *, seed: int) -> tuple[Source | Mixture | Part, Part]:
    """What is trained on, and what is kept. Raises ConfigError where nothing would be left."""
    if keep >= len(source):
        what = f"{keep} of {len(source)} samples cannot be kept from training"
        raise ConfigError(what, code="bad_value", where="holdout", remedy="keep fewer")
    if not keep:
        return source, Part(source, np.zeros(0, np.int64))
    drawn = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 0x4E1D]))).permutation(len(source))[:keep]
    kept = np.ones(len(source), bool)
    kept[drawn] = False
    return Part(source, np.flatnonzero(kept)), Part(source, np.flatnonzero(~kept))


def groups(part: Part) -> dict[str, Part]:
    """A part cut by source and by kind: with a picture, or text alone."""
    found: dict[str, list[int]] = {}
    for number in part.numbers.tolist():
        sample = part.whole[number]
        kind = "picture" if sample.conversation.images else "text"
        found.setdefault(f"{sample.source}, {kind}" if sample.source else kind, []).append(number)
    return {name: Part(part.whole, np.asarray(numbers)) for name, numbers in sorted(found.items())}
