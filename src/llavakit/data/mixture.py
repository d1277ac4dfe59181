"""Several sources as one: how much of each is taken, which samples those are, and what was found in them.

    manifest            root/                    one Sequence[Sample], in the order of the sources
    vqa    share 0.5    vqa.json    12 samples   [vqa 0 2 3 5 8 11][text 0 0 1 1 1 2 2]
    text   share 2.5    text.json    3 samples    6 of 12, drawn    each twice, and one of them a third time

Which samples are taken is a pure function of (the source's fingerprint, its usable samples, its seed): the first of one permutation, so
that a smaller share lies inside every larger one, whatever the rest of the mixture does. ``share`` of the whole takes that part of
each source: trials on 1 % and 10 % of a mixture keep its proportions, and each source keeps one sample at least.

A ``Mixture`` answers as ``sources.Source`` does (length, items, ``lengths``, ``report``, ``fingerprint``); shuffling is the loader's work.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from llavakit.data.manifest import Manifest, SourceSpec, part_of
from llavakit.data.reading import Progress
from llavakit.data.sources import OnBad, Report, Sample, Source, read_llava
from llavakit.errors import DataError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """A source and the numbers of its samples that are taken, ascending; a number stands as often as its sample is taken."""

    spec: SourceSpec
    source: Source
    taken: Numbers

    @staticmethod
    def of(spec: SourceSpec, source: Source, *, share: float = 1.0) -> Ingredient:
        """``share`` of what the manifest wants of this source. Raises DataError ``take_too_large``."""
        if spec.take is not None and spec.take > len(source):
            raise DataError(
                f"take {spec.take} of {len(source)} usable samples",
                code="take_too_large",
                where=spec.name,
                remedy=f"give share: {spec.take / len(source):.4g} to repeat some",
            )
        wanted = part_of(spec.wanted(len(source)), share)
        return Ingredient(spec=spec, source=source, taken=choose(len(source), wanted, fingerprint=source.fingerprint, seed=spec.seed))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One source in the table of counts. ``expected`` and ``records`` are of the file, ``usable`` passed the checks."""

    name: str
    expected: int | None
    records: int
    usable: int
    taken: int
    part: float


def choose(count: int, wanted: int, *, fingerprint: str, seed: int) -> Numbers:
    """``wanted`` of ``count`` sample numbers, ascending: all of them as often as they fit, the rest drawn.

    ``RandomState`` draws, because numpy promises that its streams never change.
    """
    rounds, rest = divmod(wanted, count)
    times = np.full(count, rounds, dtype=np.int64)
    if rest:
        entropy = int.from_bytes(hashlib.sha256(fingerprint.encode()).digest()[:8], "big")
        draw = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, entropy])))
        times[draw.permutation(count)[:rest]] += 1
    return np.repeat(np.arange(count, dtype=np.int64), times)


def open_mixture(
    manifest: Manifest,
    root: Path,
    *,
    share: float = 1.0,
    on_bad: OnBad = "stop",
    allow_outside: bool = False,
    check_images: bool = True,
    progress: Callable[[str], Progress] | None = None,
) -> Mixture:
    """Read every source of the manifest below ``root`` and take ``share`` of the whole (1.0, or less for trials).

    ``progress`` gives, for a file's name, what hears how far its first reading is.

    Raises DataError: ``mixture_missing`` (all files and image folders that are not there, each with what to download), ``bad_share``,
    ``take_too_large``, or what ``read_llava`` says of a file.
    """
    if not 0 < share <= 1:
        raise DataError(f"a share of {share}", code="bad_share", where=manifest.name, remedy="give a part of the whole, such as 0.01")
    absent = missing(manifest, root, images_needed=check_images and on_bad == "stop")
    if absent:
        raise DataError(
            f"{len(absent)} of the mixture's files and folders are not under {root}: {'; '.join(absent)}",
            code="mixture_missing",
            where=manifest.name,
            remedy="download them there, or write a manifest with other paths",
        )

    def read(spec: SourceSpec) -> Source:
        assert spec.file is not None, "a manifest names every file"
        return read_llava(
            root / spec.file, image_root=root / spec.images, on_bad=on_bad, allow_outside=allow_outside, check_images=check_images,
            progress=progress(spec.file.name) if progress is not None else None,
        )  # fmt: skip

    return Mixture([Ingredient.of(spec, read(spec), share=share) for spec in manifest.sources])


def missing(manifest: Manifest, root: Path, *, images_needed: bool) -> list[str]:
    """The files, and the folders of pictures, that are not below ``root``, each with what to download."""
    return [line for spec in manifest.sources for line in _missing(spec, root, images_needed=images_needed)]


def _missing(spec: SourceSpec, root: Path, *, images_needed: bool) -> Iterable[str]:
    assert spec.file is not None, "a manifest names every file"
    if not (root / spec.file).is_file():
        yield f"{spec.file} ({spec.name}: {spec.title or 'no title'})"
    if images_needed:
        folders = {spec.images: spec.pictures} if spec.pictures else {}
        folders |= {spec.images / name: part.pictures for part in spec.parts for name in part.roots if part.pictures}
        for folder, pictures in folders.items():
            if not (root / folder).is_dir():
                yield f"{folder}/ ({spec.name}: {pictures})"


class Mixture(Sequence[Sample]):
    """The taken samples of all ingredients, one source after the other. Each sample's ``where`` begins with its source."""

    def __init__(self, ingredients: Sequence[Ingredient], *, rows: range | None = None) -> None:
        self.ingredients = tuple(ingredients)
        self._ends = list(accumulate(len(ingredient.taken) for ingredient in self.ingredients))
        self._rows = range(self._ends[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Mixture: ...
    def __getitem__(self, index: int | slice) -> Sample | Mixture:
        if isinstance(index, slice):
            return Mixture(self.ingredients, rows=self._rows[index])
        which, number = self.place(index)
        ingredient = self.ingredients[which]
        sample = ingredient.source[number]
        return replace(sample, where=f"{ingredient.spec.name}: {sample.where}", source=ingredient.spec.name)

    def place(self, index: int) -> tuple[int, int]:
        """(which ingredient, number in its source) of a sample."""
        row = self._rows[index]
        which = bisect_right(self._ends, row)
        before = self._ends[which - 1] if which else 0
        return which, int(self.ingredients[which].taken[row - before])

    def lengths(self) -> MixedLengths:
        """For each sample: does it hold an image, and its length, as its source counts it."""
        return MixedLengths(self)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a file does, when other samples are taken of it, and when the sources change their order (D12)."""
        told = [(part.spec.name, part.source.fingerprint, len(part.source), len(part.taken), part.spec.seed) for part in self.ingredients]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @cached_property
    def report(self) -> Report:
        """The findings of all sources, each place with its source; and where a file is not what the manifest says."""
        whole = Report()
        for ingredient in self.ingredients:
            spec, found = ingredient.spec, ingredient.source.report
            whole.records += found.records
            whole.faults += found.faults
            whole.remarks += found.remarks
            for code, places in found.places.items():
                whole.places.setdefault(code, []).extend(f"{spec.name}: {place}" for place in places)
            if spec.count is not None and found.records != spec.count:
                whole.remark("count_differs", f"{spec.name}: {found.records} records instead of {spec.count}")
            for part in spec.parts:
                if not part.published:
                    whole.remark("never_published", f"{spec.name}: {part.name}")
        return whole

    def table(self) -> tuple[Row, ...]:
        """The counts of each source; of a whole mixture, not of a slice."""
        return tuple(
            Row(
                name=part.spec.name,
                expected=part.spec.count,
                records=part.source.report.records,
                usable=len(part.source),
                taken=len(part.taken),
                part=len(part.taken) / self._ends[-1],
            )
            for part in self.ingredients
        )

    def lines(self) -> list[str]:
        """The table for a person."""
        wide = max(len("source"), *(len(row.name) for row in self.table()))
        head = f"{'source':<{wide}} {'expected':>9} {'records':>9} {'usable':>9} {'taken':>9} {'part':>7}"
        return [head] + [
            f"{row.name:<{wide}} {'?' if row.expected is None else row.expected:>9} {row.records:>9} {row.usable:>9} {row.taken:>9}"
            f" {row.part:>7.2%}"
            for row in self.table()
        ]


class MixedLengths(Sequence[tuple[bool, int]]):
    """The lengths of a mixture's samples, looked up in those of its sources: nothing is copied."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._sources = [ingredient.source.lengths() for ingredient in mixture.ingredients]

    def __len__(self) -> int:
        return len(self._mixture)

    @overload
    def __getitem__(self, index: int) -> tuple[bool, int]: ...
    @overload
    def __getitem__(self, index: slice) -> MixedLengths: ...
    def __getitem__(self, index: int | slice) -> tuple[bool, int] | MixedLengths:
        if isinstance(index, slice):
            return self._mixture[index].lengths()
        which, number = self._mixture.place(index)
        return self._sources[which][number]
