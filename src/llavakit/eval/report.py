"""A run beside what was published: how far apart, and whether the two may be compared at all.

    Result(benchmark, protocol, model, facts, scores)
      --compare(run, protocol)--> Line(score, published, verdict) ...      one run beside the numbers of its protocol
      --side_by_side(runs)------> a table: one row a metric, one column a run
      --beside(table, runs)-----> a published table with the runs as its last rows

A verdict is *within*, *above* or *below* the published number's tolerance. It is *not comparable* where the run was asked otherwise than
the published one (prompt format, aspect, hints, suffix, judge), or only in part; where nobody recorded how, it says what is not known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.eval.benchmark import Benchmark, Protocol, Published, Score
from llavakit.eval.files import json_file
from llavakit.eval.published import Column, Table
from llavakit.eval.run_folder import RUN

SCORES = "scores.json"
ASKED = ("template", "aspect", "suffix", "hints", "max_new_tokens", "temperature", "judge")  # what a Protocol and a run's facts both say
OTHERS = ("template", "aspect", "judge")  # those that are not ours to choose: the checkpoint's, and whoever judged
NONE = "–"
Rows = list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark, asked once."""

    benchmark: str
    protocol: str
    model: str
    scores: tuple[Score, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    "How it was really asked (``ASKED``), when, with what: run.json."
    name: str = ""
    "Of its folder."


@dataclass(frozen=True, kw_only=True)
class Line:
    """A score, and one published number of the same metric, if there is one."""

    score: Score
    published: Published | None = None
    verdict: str = ""
    reasons: tuple[str, ...] = ()
    "Why it is not comparable, or what is not known."

    @property
    def difference(self) -> float | None:
        return None if self.published is None else self.score.value - self.published.value


def write_scores(folder: Path, scores: Sequence[Score], **facts: Any) -> Path:
    """scores.json beside run.json: the scores, and what was decided while scoring (``judge``)."""
    rows = [asdict(score) for score in scores]
    return json_file(folder / SCORES, {**facts, "scores": rows} if facts else rows, indent=1)


def read_result(folder: Path) -> Result:
    """The run in a folder: run.json and scores.json. Raises DataError where one is missing or is not ours."""
    facts, scored = (_json(folder / name) for name in (RUN, SCORES))
    try:
        scored = {"scores": scored} if isinstance(scored, list) else scored
        return Result(
            benchmark=facts["benchmark"],
            protocol=facts["protocol"],
            model=facts["model"],
            scores=tuple(_score(**score) for score in scored["scores"]),
            facts=facts | {name: value for name, value in scored.items() if name != "scores"},
            name=folder.resolve().name,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        remedy = "llava eval writes these files; score the answers again"
        what = f"{RUN} and {SCORES} do not describe a run ({error!r})"
        raise DataError(what, code="bad_file", where=str(folder), remedy=remedy) from error


def _score(*, value: float, **rest: Any) -> Score:
    return Score(value=float(value), **rest)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        remedy = "name the folder that llava eval wrote; a run without scores is scored first"
        raise DataError("no such file", code="missing_file", where=str(path), remedy=remedy) from error
    except ValueError as error:
        raise DataError("not JSON", code="bad_file", where=str(path), remedy="score the answers again") from error


def protocol_of(run: Result, benchmarks: Iterable[Benchmark]) -> Protocol | None:
    """The protocol that the run names; None where we do not have it."""
    found = (p for b in benchmarks if b.name == run.benchmark for p in b.protocols if p.name == run.protocol)
    return next(found, None)


def compare(run: Result, protocol: Protocol | None, *, against: Sequence[str] = ()) -> list[Line]:
    """Every score beside every published number of its metric; ``against``: of these models only."""
    known = () if protocol is None else protocol.published
    lines = []
    for score in run.scores:
        fitting = [number for number in known if number.metric == score.metric and (not against or number.model in against)]
        lines += [_line(run, score, number, protocol) for number in fitting] or [Line(score=score)]
    return lines


def _line(run: Result, score: Score, number: Published, protocol: Protocol | None) -> Line:
    assert protocol is not None
    differs, unknown = differences(run.facts, protocol)
    differs += [] if math.isfinite(score.value) else ["no value"]
    if differs:
        return Line(score=score, published=number, verdict="not comparable", reasons=tuple(differs))
    far = round(score.value - number.value, 6)
    verdict = "within" if abs(far) <= number.tolerance else "above" if far > 0 else "below"
    reasons = (f"{', '.join(unknown)} not recorded",) if unknown else ()
    return Line(score=score, published=number, verdict=verdict, reasons=reasons)


def differences(facts: Mapping[str, Any], protocol: Protocol) -> tuple[list[str], list[str]]:
    """How the run was asked otherwise than the protocol says, and what nobody recorded."""
    differs, unknown = [], []
    for name in ASKED:
        wanted, used = getattr(protocol, name, None), facts.get(name)
        if wanted is None:
            continue
        if used is None or (name in OTHERS and not used):
            unknown += [name] if name in OTHERS else []
        elif used != wanted:
            differs.append(f"{name} {_shown(used)}, published with {_shown(wanted)}")
    asked, whole = facts.get("asked"), facts.get("questions")
    if asked is not None and whole is not None and asked < whole:
        differs.append(f"{asked:,} of {whole:,} questions")
    return differs, unknown


def _shown(value: object) -> str:
    return ("shown" if value else "not shown") if isinstance(value, bool) else repr(value) if value in ("", None) else str(value)


def value_of(run: Result, column: Column) -> Score | None:
    """The run's score that belongs into a column of a published table: its metric, or the headline."""
    if run.benchmark != column.benchmark or (column.protocol and column.protocol != run.protocol):
        return None
    return next((s for s in run.scores if (s.metric == column.metric if column.metric else s.headline)), None)


def beside(table: Table, runs: Sequence[Result], benchmarks: Iterable[Benchmark] = ()) -> Rows:
    """The published table, header first, then our runs: the scores of one model under one protocol stand in one row."""
    known = tuple(benchmarks)
    rows: Rows = [("model", *(column.name for column in table.columns))]
    rows += [(row.model, *(row.cells[c.name].text if c.name in row.cells else NONE for c in table.columns)) for row in table.rows]
    for model, protocol in dict.fromkeys((run.model, run.protocol) for run in runs):
        ours = [run for run in runs if (run.model, run.protocol) == (model, protocol)]
        found = ([_marked(run, s, known) for run in ours if (s := value_of(run, column))] for column in table.columns)
        rows.append((f"ours: {model}, {protocol}", *(cells[0] if cells else NONE for cells in found)))
    return rows


def side_by_side(runs: Sequence[Result], benchmarks: Iterable[Benchmark] = (), *, against: Sequence[str] = ()) -> Rows:
    """One row a metric of a protocol, one column a run's model, then the models of ``against`` as they were published."""
    known, labels = tuple(benchmarks), _labels(runs)
    rows: Rows = [("benchmark", "protocol", "metric", *dict.fromkeys(labels), *against)]
    for benchmark, protocol, metric in dict.fromkeys((run.benchmark, run.protocol, s.metric) for run in runs for s in run.scores):
        ours = {
            label: _marked(run, score, known)
            for run, label in zip(runs, labels, strict=True)
            for score in run.scores
            if (run.benchmark, run.protocol, score.metric) == (benchmark, protocol, metric)
        }
        ways = (way for b in known if b.name == benchmark for way in b.protocols if way.name == protocol)
        theirs = {number.model: f"{number.value:g}" for way in ways for number in way.published if number.metric == metric}
        cells = (*(ours.get(label, NONE) for label in dict.fromkeys(labels)), *(theirs.get(model, NONE) for model in against))
        rows.append((benchmark, protocol, metric, *cells))
    return rows


def _marked(run: Result, score: Score, benchmarks: Sequence[Benchmark]) -> str:
    return shown(score) + ("*" if departures(run, benchmarks) else "")


def departures(run: Result, benchmarks: Iterable[Benchmark]) -> list[str]:
    """How the run was asked otherwise than its protocol says; what stands in tables with a star."""
    protocol = protocol_of(run, benchmarks)
    return [] if protocol is None else differences(run.facts, protocol)[0]


def _labels(runs: Sequence[Result]) -> list[str]:
    """Models, and their folders where one model was asked the same twice."""
    keys = [(run.model, run.benchmark, run.protocol) for run in runs]
    twice = {run.model for run, key in zip(runs, keys, strict=True) if keys.count(key) > 1}
    return [f"{run.model} ({run.name})" if run.model in twice else run.model for run in runs]


def detailed(lines: Sequence[Line]) -> Rows:
    """The lines of one run as a table, header first; a score with many published numbers is written once."""
    rows: Rows = [("metric", "ours", "published", "model", "difference", "verdict")]
    last = None
    for line in lines:
        name, ours = (line.score.metric, shown(line.score)) if line.score is not last else ("", "")
        last = line.score
        if (number := line.published) is None:
            rows.append((name, ours, NONE, "", "", ""))
            continue
        why = f" ({'; '.join(line.reasons)})" if line.reasons else ""
        rows.append((name, ours, f"{number.value:g} ± {number.tolerance:g}", number.model, f"{line.difference:+.1f}", line.verdict + why))
    return rows


def shown(score: Score) -> str:
    """A number with half of its 95 % interval."""
    return f"{score.value:.1f}" + ("" if score.half_width is None else f" ± {score.half_width:.1f}")


def heading(run: Result, protocol: Protocol | None) -> str:
    """What a reader must know before the numbers."""
    used = [f"{name} {_shown(run.facts[name])}" for name in ("template", "aspect", "hints", "judge") if run.facts.get(name) is not None]
    counted = max((score.count for score in run.scores), default=0)
    note = f". {protocol.note}" if protocol is not None and protocol.note else ""
    strange = "" if protocol is not None else " (not a protocol of ours: nothing to compare with)"
    return f"{run.benchmark}, protocol {run.protocol}{strange}: {', '.join([run.model, *used, f'{counted:,} questions'])}{note}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table of strings as Markdown."""
    header, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body))


def record(run: Result, lines: Sequence[Line]) -> dict[str, Any]:
    """A run and its lines for programs."""
    scores = []
    for score in run.scores:
        beside = [
            asdict(line.published) | {"difference": line.difference, "verdict": line.verdict, "reasons": list(line.reasons)}
            for line in lines
            if line.score == score and line.published is not None
        ]
        scores.append(asdict(score) | {"published": beside})
    return {"benchmark": run.benchmark, "protocol": run.protocol, "model": run.model, "facts": dict(run.facts), "scores": scores}
