"""The tiny model as an assistant whose scores are far apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import decided

from llavakit.assistant import Assistant


@pytest.fixture(scope="session")
def helper(tiny_model_dir: Path) -> Assistant:
    """Tests do not change it."""
    return decided(tiny_model_dir)
