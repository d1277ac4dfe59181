"""Everything that is wrong with a training file, and what is in it: for a person before the run, so nothing stops and nothing is made."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llavakit.data.formats import records
from llavakit.data.present import elsewhere, missing
from llavakit.data.reading import Progress
from llavakit.data.rules import Finding, examine
from llavakit.errors import DataError, ImageError, LlavaError
from llavakit.images import image_size
from llavakit.types import Conversation, Image

READERS = 8  # threads that open pictures: most of it is waiting for the disk


@dataclass(frozen=True)
class Checked:
    """A file's records, and all findings about them in the order of the file; missing and broken pictures after them."""

    records: int
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> int:
        return sum(finding.fault for finding in self.findings)


def check(
    path: Path,
    *,
    image_root: Path | None = None,
    allow_outside: bool = False,
    open_images: bool = False,
    progress: Progress | None = None,
) -> Checked:
    """Examine every record of a file; with ``open_images`` also the header of every picture. What is wrong is found, never raised.

    Only MissingExtraError is raised, for parquet without pyarrow.
    """
    root = image_root if image_root is not None else path.parent
    found: list[Finding] = []
    users: dict[str, list[str]] = {}  # picture -> the places of the records that name it
    seen: set[str] = set()
    count = 0
    source = records(path, broken=lambda error: found.append(_finding(error)), progress=progress)
    try:
        for number, entry in source:
            count += 1
            where = f"{path.name}:{source.place(number)}"
            examined = examine(entry, where=where, allow_outside=allow_outside)
            found += examined.findings
            place = f"{where} (id {examined.id})"
            if examined.id in seen:
                found.append(Finding(False, "id_repeated", "an id that an earlier record has", place))
            seen.add(examined.id)
            for image in examined.conversation.images if examined.conversation else ():
                if isinstance(image.source, Path):
                    users.setdefault(str(image.source), []).append(place)
                elif open_images:
                    found += _opened(image, [place])
    except DataError as error:  # the file itself, or its JSON: nothing after that place can be read
        found.append(_finding(error))
    if not count and not found:
        found.append(Finding(True, "no_samples", "no record", str(path), "the file is empty"))
    found += _pictures(users, root, open_images)
    return Checked(count, tuple(found))


def _finding(error: LlavaError) -> Finding:
    return Finding(True, error.code, error.what, error.where, error.remedy)


def _pictures(users: dict[str, list[str]], root: Path, open_images: bool) -> Iterator[Finding]:
    absent = missing(users, root)
    lost = [name for name in users if name in absent]
    near = elsewhere(lost[0], root) if lost else None
    for name in users:
        if name in absent:
            remedy = f"looked under {root.absolute()}" + (f"; it is under {near}" if near and (near / name).is_file() else "")
            yield from (Finding(True, "image_missing", f"no image file {name}", place, remedy) for place in users[name])
    if open_images:
        there = [name for name in users if name not in absent]
        with ThreadPoolExecutor(READERS) as pool:
            for found in pool.map(lambda name: _opened(Image(root / name), users[name]), there):
                yield from found


def _opened(image: Image, places: Iterable[str]) -> list[Finding]:
    try:
        image_size(image)
    except ImageError as error:
        what = f"{error.where}: {error.what}"
        return [Finding(True, error.code, what, place, error.remedy) for place in places]
    return []


@dataclass(frozen=True)
class Spread:
    """How a number is spread over the samples."""

    least: float
    median: float
    mean: float
    most_but_5_percent: float
    most: float
    total: float

    @staticmethod
    def of(values: array[int]) -> Spread:
        found = np.asarray(values, np.int64)
        middle, high = np.quantile(found, (0.5, 0.95))
        return Spread(int(found.min()), float(middle), round(float(found.mean()), 2), float(high), int(found.max()), int(found.sum()))


@dataclass(frozen=True)
class Stats:
    """What is in a file. ``tokens`` and ``learned`` where a model counted them; ``cut`` are the samples longer than ``max_length``."""

    samples: int
    images: dict[int, int]  # how many samples hold so many pictures
    spreads: dict[str, Spread] = field(default_factory=dict)
    max_length: int | None = None
    cut: int | None = None


def stats(
    samples: Iterable[Conversation],
    *,
    count: Callable[[Conversation], tuple[int, int]] | None = None,
    max_length: int | None = None,
) -> Stats:
    """Count turns, words and pictures of closed conversations; ``count`` gives (tokens, learned) of one, where a model is at hand."""
    names = ("turns", "question_words", "reply_words", *(("tokens", "learned") if count else ()))
    columns = {name: array("q") for name in names}
    images: Counter[int] = Counter()
    for conversation in samples:
        turns = conversation.turns
        images[len(conversation.images)] += 1
        columns["turns"].append(len(turns) // 2)
        columns["question_words"].append(sum(len(turn.text.split()) for turn in turns[::2]))
        columns["reply_words"].append(sum(len(turn.text.split()) for turn in turns[1::2]))
        if count is not None:
            for name, value in zip(("tokens", "learned"), count(conversation), strict=True):
                columns[name].append(value)
    cut = sum(value > max_length for value in columns["tokens"]) if count is not None and max_length is not None else None
    spreads = {name: Spread.of(values) for name, values in columns.items() if values}
    return Stats(images.total(), dict(sorted(images.items())), spreads, max_length if cut is not None else None, cut)
