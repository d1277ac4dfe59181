"""All benchmarks, as one literal table."""

from __future__ import annotations

import difflib

from llavakit.errors import ConfigError
from llavakit.eval.benchmark import Benchmark, Protocol
from llavakit.eval.scenes import SCENES

ALL: tuple[Benchmark, ...] = (SCENES,)


def find(name: str) -> Benchmark:
    """The benchmark of this name. Raises ConfigError, which guesses what was meant."""
    found = next((benchmark for benchmark in ALL if benchmark.name == name), None)
    if found is None:
        raise _unknown("benchmark", name, [benchmark.name for benchmark in ALL])
    return found


def protocol(benchmark: Benchmark, name: str | None) -> Protocol:
    """The protocol of this name, or the first one. Raises ConfigError."""
    if name is None:
        return benchmark.protocols[0]
    found = next((protocol for protocol in benchmark.protocols if protocol.name == name), None)
    if found is None:
        raise _unknown("protocol", name, [protocol.name for protocol in benchmark.protocols])
    return found


def _unknown(what: str, name: str, names: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, 1)
    remedy = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}" if len(names) > 1 else f"there is {names[0]}"
    return ConfigError(f"no {what} {name!r}", code="bad_value", where="--protocol" if what == "protocol" else "NAME", remedy=remedy)
