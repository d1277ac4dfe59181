"""The concept-balanced filter of LLaVA's stage 1 (spec 5.4): rare phrases stay, frequent ones are thinned to a hundred captions each.

    1. noun phrases of every caption; a phrase counts once for a caption, however often it stands there
    2. phrases of fewer than ``at_least`` captions are dropped
    3. from the rarest to the most frequent: the captions of the phrase join the pool; of more than ``at_most``, a random ``at_most``
    4. the pool is the result, in the order of the file

A phrase counts captions, since step 3 compares the count with a number of captions. A caption contains a phrase if it is one of the
caption's own phrases: "dog" is not in "hot dog stand". The hundred are drawn from all captions of the phrase, also from those that are
in the pool already, as the paper words it; so the pool does not depend on the order of the visits, and a draw depends on the seed, the
phrase and its captions alone.

No list of objects grows with the file. A phrase is the 64-bit hash of its text, and what is kept is twelve bytes for each phrase of each
caption and four for each caption:

    keys    phrase of each pair        1 9 4 | 9 | 4 7     sorted by key, they are a table: key -> its captions, ascending
    counts  pairs of each caption      3       1   2

Two of a million different phrases share a hash with a chance of three in a hundred million.
"""

from __future__ import annotations

import random
import signal
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from llavakit.datagen.phrases import Choice, Engine, engine
from llavakit.errors import DataError

AT_LEAST, AT_MOST = 3, 100  # the paper's
BATCH = 2000  # captions that a worker takes at once
Progress = Callable[[int], None]  # captions done
Pairs = tuple["array[int]", "array[int]"]  # of a batch: the keys of all its captions, and how many each has


@dataclass(frozen=True, kw_only=True)
class Table:
    """phrase -> captions. Phrase ``i`` is ``keys[i]`` and stands in ``captions[starts[i] : starts[i] + counts[i]]``, ascending."""

    keys: NDArray[np.uint64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    captions: NDArray[np.uint32]
    total: int  # captions read

    def having(self, kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many of the kept captions each phrase has."""
        inside = kept[self.captions].astype(np.int64)
        return np.add.reduceat(inside, self.starts) if len(self.starts) else inside


def key(phrase: str) -> int:
    """The 64 bits that stand for a phrase."""
    return int.from_bytes(blake2b(phrase.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def count(captions: Iterable[str], *, choice: Choice = "auto", workers: int = 1, progress: Progress | None = None) -> Table:
    """Find and count the phrases of captions, which are read once and not kept. The table is the same for any number of workers."""
    keys, counts = array("Q"), array("I")
    with _finders(engine(choice).choice, workers) as pairs_of:
        for found, each in pairs_of(captions):
            keys.extend(found)
            counts.extend(each)
            if progress is not None:
                progress(len(counts))
    return _table(keys, counts)


def balance(table: Table, *, at_least: int = AT_LEAST, at_most: int = AT_MOST, seed: int = 0) -> NDArray[np.bool_]:
    """Which captions are in the pool: one truth value each."""
    assert at_least >= 1
    assert at_most >= 1
    kept = np.zeros(table.total, dtype=np.bool_)
    whole = (table.counts >= at_least) & (table.counts <= at_most)
    kept[table.captions[np.repeat(whole, table.counts)]] = True
    for phrase in np.flatnonzero((table.counts >= at_least) & (table.counts > at_most)):
        start, count = int(table.starts[phrase]), int(table.counts[phrase])
        kept[table.captions[start + np.array(draw(int(table.keys[phrase]), count, at_most=at_most, seed=seed))]] = True
    return kept


def draw(key: int, count: int, *, at_most: int, seed: int) -> list[int]:
    """Which ``at_most`` of a phrase's ``count`` captions are taken."""
    return random.Random(f"{seed}:{key}").sample(range(count), at_most)


def _table(keys: array[int], counts: array[int]) -> Table:
    found = np.frombuffer(keys, dtype=np.uint64)
    owners = np.repeat(np.arange(len(counts), dtype=np.uint32), np.frombuffer(counts, dtype=np.uint32))
    order = np.argsort(found, kind="stable")
    found, owners = found[order], owners[order]
    starts = np.flatnonzero(np.diff(found, prepend=found[:1] ^ 1)) if len(found) else np.zeros(0, dtype=np.int64)
    lengths = np.diff(starts, append=len(found))
    return Table(keys=found[starts], starts=starts, counts=lengths, captions=owners, total=len(counts))


# --- work for several processes -------------------------------------------------------------------------------------------------------


@contextmanager
def _finders(choice: Choice, workers: int) -> Iterator[Callable[[Iterable[str]], Iterator[Pairs]]]:
    """What turns captions into pairs, batch by batch in their order: here, or in ``workers`` processes that are a little ahead."""
    if workers == 1:
        yield lambda captions: (_pairs(choice, batch) for batch in _batches(captions))
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts)
    try:
        yield lambda captions: _ahead(pool, choice, captions, 2 * workers)
    except BrokenProcessPool as error:
        remedy = "use fewer --workers, and look at the memory"
        raise DataError("a process that finds phrases was killed", code="worker_died", remedy=remedy) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(pool: ProcessPoolExecutor, choice: Choice, captions: Iterable[str], most: int) -> Iterator[Pairs]:
    """Results in the order of the batches; at most ``most`` of them are under way or waiting."""
    waiting: deque[Future[Pairs]] = deque()
    for batch in _batches(captions):
        waiting.append(pool.submit(_pairs, choice, batch))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(captions: Iterable[str]) -> Iterator[list[str]]:
    source = iter(captions)
    while batch := list(islice(source, BATCH)):
        yield batch


def _pairs(choice: Choice, batch: Sequence[str]) -> Pairs:
    keys, counts = array("Q"), array("I")
    for phrases in _engine(choice).phrases(batch):
        unique = set(phrases)
        keys.extend(sorted(map(key, unique)))
        counts.append(len(unique))
    return keys, counts


@cache
def _engine(choice: Choice) -> Engine:
    """One engine a process."""
    return engine(choice)


def _ignore_interrupts() -> None:
    """Ctrl-C is the main process's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
