"""Every benchmark and its protocols as one page of Markdown: ``docs/evaluate-protocols.md``, written from the values themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llavakit.eval.benchmark import Benchmark, Protocol, Published
from llavakit.eval.report import markdown

HEAD = """# How each benchmark is asked, and what to expect

A score is of a model *and* of how it was asked. Here is how, for every benchmark of `llava eval`: which files it reads, what is asked,
who is followed in scoring and where we depart from them, and what was published under each protocol. The first protocol is the default,
`--protocol NAME` takes another. A blank prompt format, aspect or judge is the checkpoint's, or yours.

Written by `python dev/write_protocols.py` from the values in `src/llavakit/eval/`; a test holds it to them.
"""
COLUMNS = ("protocol", "prompt format", "aspect", "after the question", "hints", "reply", "judge")


def page(benchmarks: Sequence[Benchmark]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for benchmark in benchmarks for line in section(benchmark))])


def section(benchmark: Benchmark) -> Iterator[str]:
    """One benchmark."""
    yield from (f"## {benchmark.name}", "", benchmark.title + ".", "")
    yield f"- **Files:** {_line(benchmark.needs)}"
    yield f"- **Scored:** {_scored(benchmark)}"
    yield f"- **Reference:** {_line(benchmark.reference)}"
    yield from ("", markdown([COLUMNS, *map(_asked, benchmark.protocols)]), "")
    for protocol in benchmark.protocols:
        if protocol.note:
            yield from (f"`{protocol.name}`: {_line(protocol.note)}", "")
    expected = [(protocol.name, *row) for protocol in benchmark.protocols for row in _expected(protocol)]
    if expected:
        yield from (markdown([("protocol", "metric", "published", "within", "source"), *expected]), "")


def _asked(protocol: Protocol) -> tuple[str, ...]:
    suffix = "<br>".join(f"`{line}`" for line in protocol.suffix.splitlines())
    hints = "shown" if protocol.hints else ""
    temperature = protocol.sampling.temperature
    reply = f"{protocol.max_new_tokens} tokens, {f'temperature {temperature:g}' if temperature else 'greedy'}"
    return (f"`{protocol.name}`", protocol.template or "", protocol.aspect or "", suffix, hints, reply, protocol.judge or "")


def _expected(protocol: Protocol) -> Iterator[tuple[str, ...]]:
    """One row a metric and source: the models and their numbers."""
    keys = dict.fromkeys((number.metric, number.tolerance, number.source) for number in protocol.published)
    for metric, tolerance, source in keys:
        same = [n for n in protocol.published if (n.metric, n.tolerance, n.source) == (metric, tolerance, source)]
        yield metric, "; ".join(map(_number, same)), f"{tolerance:g}", source


def _number(published: Published) -> str:
    return f"{published.model} **{published.value:g}**"


def _scored(benchmark: Benchmark) -> str:
    ways = ["here"] if benchmark.score else []
    ways += ["by the official server, from the upload written beside the answers"] if benchmark.submit else []
    return " or ".join(ways) + "." if ways else "nowhere yet."


def _line(text: str) -> str:
    """On one line, ending in a full stop."""
    return " ".join(text.split()).rstrip(".") + "."
