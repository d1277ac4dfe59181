"""A merged file held against its manifest: how many records came from which source.

The released 665K file is one list, and no record says where it came from. Two things tell it: the folder its image lies in, and the format
words of its questions.

    folder \\ words            none              word or phrase    option's letter   caption    region, box
    coco/train2017            LLaVA-Instruct    VQAv2, OKVQA      A-OKVQA                      RefCOCO
    gqa, ocr_vqa                                GQA; OCR-VQA
    textvqa                                                                         TextCaps
    vg                                                                                         Visual Genome
    no image                  ShareGPT

Parts that no record tells apart (VQAv2 and OKVQA) are counted together and held against the sum of their counts. Words are looked for
without regard to case: papers write "Provide ...", the released records "Please provide ...". Text alone is not searched for words.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llavakit.data.manifest import Part, SourceSpec
from llavakit.data.sources import Sample

Names = tuple[str, ...]
K = TypeVar("K", bound=Hashable)
TEXT_ONLY, NO_WORDS, STRAY = "no image", "no format words", "fits no part"
STRAYS_SHOWN = 5
_ELSEWHERE: Names = ("another folder",)


@dataclass(frozen=True, kw_only=True)
class Count:
    """How many records are of one kind, and how many should be; ``expected`` None where it was never published."""

    name: str
    found: int
    expected: int | None

    @property
    def fits(self) -> bool:
        return self.expected is None or self.found == self.expected

    def __str__(self) -> str:
        expected = "never published" if self.expected is None else "as expected" if self.fits else f"expected {self.expected}"
        return f"{self.name}: {self.found} ({expected})"


@dataclass(frozen=True, kw_only=True)
class PartCounts:
    """A file's records in all, by image folder, by format words and by part; ``strays`` are the first that fit no part."""

    whole: Count
    by_root: tuple[Count, ...] = ()
    by_words: tuple[Count, ...] = ()
    by_part: tuple[Count, ...] = ()
    strays: tuple[str, ...] = ()

    @property
    def differences(self) -> tuple[Count, ...]:
        return tuple(count for count in (self.whole, *self.by_root, *self.by_words, *self.by_part) if not count.fits)


def count_parts(samples: Iterable[Sample], spec: SourceSpec, root: Path) -> PartCounts:
    """Count a merged file, read with its images below ``root / spec.images``, and hold it against the manifest's table.

    Parts that have neither a count nor a folder (never published) tell nothing; without any other, only the whole is counted.
    """
    parts = [part for part in spec.parts if part.count is not None or part.roots]
    folders = _Folders(root / spec.images, {part.roots for part in parts if part.roots})
    words = {part.suffixes: tuple(map(str.casefold, part.suffixes)) for part in parts if part.suffixes}
    kinds = _grouped(parts, lambda part: (part.roots, part.suffixes))
    found: Counter[tuple[Names, Names]] = Counter()
    strays: list[str] = []
    for sample in samples:
        folder = folders.of(sample)
        kind = (folder, _words(sample, words) if folder else ())
        found[kind] += 1
        if kind not in kinds and len(strays) < STRAYS_SHOWN:
            strays.append(f"{sample.where} (id {sample.id})")
    whole = Count(name=spec.name, found=found.total(), expected=spec.count)
    if not parts:
        return PartCounts(whole=whole)
    by_part = Counter({kind: count for kind, count in found.items() if kind in kinds})
    stray = found.total() - by_part.total()
    return PartCounts(
        whole=whole,
        by_root=_table(_summed(found, 0), _grouped(parts, lambda part: part.roots), lambda names: ", ".join(names) or TEXT_ONLY),
        by_words=_table(_summed(found, 1), _grouped(parts, lambda part: part.suffixes), lambda names: "; ".join(names) or NO_WORDS),
        by_part=(
            *_table(by_part, kinds, lambda kind: ", ".join(part.name for part in kinds[kind])),
            *([Count(name=STRAY, found=stray, expected=0)] if stray else []),
        ),
        strays=tuple(strays),
    )


class _Folders:
    """Which of the known folders a sample's first image lies in."""

    def __init__(self, images: Path, groups: Iterable[Names]) -> None:
        beginnings = {_beginning(images / name): group for group in groups for name in group}
        self._longest_first = sorted(beginnings.items(), key=lambda item: -len(item[0]))

    def of(self, sample: Sample) -> Names:
        """The folders that are counted together; none for text alone."""
        image = next(iter(sample.conversation.images), None)
        if image is None:
            return ()
        path = str(image.source)
        return next((group for beginning, group in self._longest_first if path.startswith(beginning)), _ELSEWHERE)


def _beginning(folder: Path) -> str:
    return "" if str(folder) == "." else str(folder) + os.sep


def _words(sample: Sample, words: Mapping[Names, Names]) -> Names:
    """The suffixes of the first question that holds any; none where no question does."""
    for message in sample.conversation.turns[::2]:
        text = message.text.casefold()
        for group, spellings in words.items():
            if any(spelling in text for spelling in spellings):
                return group
    return ()


def _grouped(parts: Iterable[Part], key: Callable[[Part], K]) -> dict[K, list[Part]]:
    groups: dict[K, list[Part]] = {}
    for part in parts:
        groups.setdefault(key(part), []).append(part)
    return groups


def _summed(found: Counter[tuple[Names, Names]], side: int) -> Counter[Names]:
    summed: Counter[Names] = Counter()
    for kind, count in found.items():
        summed[kind[side]] += count
    return summed


def _table(found: Counter[K], groups: Mapping[K, Sequence[Part]], name: Callable[[K], str]) -> tuple[Count, ...]:
    """A line for each group of the manifest, in its order, then one for each kind that it does not know."""
    keys = [*groups, *(key for key in found if key not in groups)]
    return tuple(Count(name=name(key), found=found[key], expected=_expected(groups.get(key, ()))) for key in keys)


def _expected(parts: Sequence[Part]) -> int | None:
    counts = [part.count for part in parts]
    return None if None in counts else sum(count for count in counts if count is not None)
