"""Write ``docs/evaluate-protocols.md`` anew from the benchmarks: ``python dev/write_protocols.py``."""

from __future__ import annotations

from pathlib import Path

from llavakit.eval.benchmarks import ALL
from llavakit.eval.protocols import page

if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs", "evaluate-protocols.md").write_text(page(ALL), "utf-8")
