"""Pages of one's own: zeros, of any shape and type, given back when nobody looks at them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from llavakit.model.heap import own_pages

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (2, 0, 3)])
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = own_pages(shape, dtype, CPU)
    assert torch.equal(made, torch.zeros(shape, dtype=dtype))
    assert made.is_contiguous()
    made += 1
    assert torch.equal(made, torch.ones(shape, dtype=dtype))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
def test_pages_are_taken_when_written_and_given_back_at_once() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    made = own_pages((64, 1 << 20), torch.uint8, CPU)
    view = made[3:]
    assert resident() - before < 8 << 20
    made.fill_(1)
    assert resident() - before > 56 << 20
    del made
    assert int(view[0, 0]) == 1, "a part keeps the whole"
    del view
    assert resident() - before < 8 << 20
