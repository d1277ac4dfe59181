"""Threads that compute together: who lets his team go has none, who computes alone never gathers one, and nobody else notices."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llavakit.model.teams import _openmp, compute_alone, disband

GNU = sys.platform.startswith("linux") and _openmp() is not None and not hasattr(_openmp(), "kmp_set_blocktime")
pytestmark = pytest.mark.skipif(not GNU, reason="teams are counted by GNU's OpenMP on Linux")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Also where the tests themselves run with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
    disband()


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def large_product() -> torch.Tensor:
    return torch.ones(1 << 20).mul(3.0)


def test_who_lets_his_team_go_has_none_and_gathers_another() -> None:
    counts = []

    def work() -> None:
        counts.append(threads())
        for _ in range(2):
            assert large_product().sum() == 3 * 2**20
            counts.append(threads())
            assert disband()
            counts.append(threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    others = torch.get_num_threads() - 1
    assert [count - counts[0] for count in counts] == [0, others, 0, others, 0]


def test_who_computes_alone_gathers_no_team_and_changes_nothing_for_others() -> None:
    before = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=compute_alone) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
        count = threads()
        assert pool.submit(large_product).result().sum() == 3 * 2**20
        assert pool.submit(threads).result() <= max(count, threads())
        assert torch.get_num_threads() == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]
