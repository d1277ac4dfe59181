"""All benchmarks, as one literal table."""

from __future__ import annotations

from llavakit.eval.benchmark import Benchmark

ALL: tuple[Benchmark, ...] = ()
