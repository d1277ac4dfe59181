"""A run as one page, ``report.html``: loss, rate and speed, held-out losses by group, the panel, the config.

One file without scripts or addresses, made from the run folder's own files alone, so that it can be made again (``llava train report RUN``)
or mailed. Curves are SVG lines of at most POINTS points, however long the run; what is no finite number is left out of them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.errors import TrainingError
from llavakit.train.progress import EVALUATIONS, METRICS, PANEL, read_lines

REPORT = "report.html"
POINTS, WIDE, HIGH, EDGE = 600, 640, 220, 46
HUGE = 1e300  # sums and differences of smaller numbers are finite
COLOURS = ("#1f6fb2", "#d1602c", "#2f8f4e", "#8a4fb0", "#b0822a", "#b23a5a", "#3a9aa0", "#666")
Curve = Sequence[tuple[float, float]]

STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } pre { overflow-x: auto; font-size: 13px }
svg { max-width: 100%; height: auto } svg text { fill: currentColor; font-size: 12px } .curves { display: flex; flex-wrap: wrap; gap: 1em }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .3em .8em .3em 0;
border-bottom: 1px solid #8884 }
.good { color: #2f8f4e } .bad { color: #d1602c }
"""


def write_report(out: Path) -> Path:
    """Make ``report.html`` of a run folder. Raises TrainingError ``no_run`` where there is none."""
    metrics = read_lines(out / METRICS)
    if not metrics:
        raise TrainingError("no step was recorded there", code="no_run", where=str(out), remedy="name the folder of a run (its out)")
    evaluations = read_lines(out / EVALUATIONS)
    parts = [f"<h1>{html.escape(out.name)}</h1>", _summary(metrics), '<div class="curves">', *_curves(metrics, evaluations), "</div>"]
    if evaluations:
        parts += ["<h2>Held-out loss</h2>", _losses(evaluations)]
    panel = json.loads((out / PANEL).read_text(encoding="utf-8")) if (out / PANEL).is_file() else []
    if panel and evaluations:
        parts += ["<h2>Panel</h2>", _panel(panel, evaluations)]
    config = out / "config.yaml"
    if config.is_file():
        parts += ["<h2>Config</h2>", f"<pre>{html.escape(config.read_text(encoding='utf-8'))}</pre>"]
    head = f'<meta charset="utf-8"><title>{html.escape(out.name)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    (out / REPORT).write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n', encoding="utf-8")
    return out / REPORT


def _summary(metrics: Sequence[Mapping[str, Any]]) -> str:
    last = metrics[-1]
    seconds, tokens = (sum(float(line[key]) for line in metrics) for key in ("step_time", "tokens"))
    samples = sum(int(line["samples"]) for line in metrics)
    return (
        f"<p>{last['step']:,} steps, {last['epoch']:.2f} epochs, {samples:,} samples, {tokens:,.0f} tokens in {seconds / 3600:.2f} hours "
        f"({tokens / max(seconds, 1e-9):,.0f} tokens a second); last loss {_number(last['loss'])}.</p>"
    )


def _curves(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    def curve(key: str) -> Curve:
        return [(float(line["step"]), float(line[key])) for line in metrics if _finite(line[key])]

    held: dict[str, list[tuple[float, float]]] = {}
    for line in evaluations:
        for name, row in line["losses"].items():
            if _finite(row["loss"]):
                held.setdefault(name, []).append((float(line["step"]), float(row["loss"])))
    found: list[tuple[str, Mapping[str, Curve]]] = [("loss of a step", {"": curve("loss")}), ("held-out loss", held)]
    names = {"learning rate": "lr", "gradient norm": "grad_norm", "tokens a second": "tokens_per_s"}
    found += [(title, {"": curve(key)}) for title, key in names.items()]
    return [figure(title, curves) for title, curves in found if any(curves.values())]


def _finite(value: float | None) -> bool:
    return value is not None and abs(value) < HUGE  # False for NaN


def figure(title: str, curves: Mapping[str, Curve]) -> str:
    """Curves over steps as SVG, each thinned to POINTS points by means, so that nothing is hidden by skipping."""
    thin = {name: _thinned(curve) for name, curve in curves.items() if curve}
    xs, ys = ([point[axis] for curve in thin.values() for point in curve] for axis in (0, 1))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    across, up = (right - left) or 1.0, (high - low) or abs(high) or 1.0

    def at(x: float, y: float) -> str:
        return f"{EDGE + (x - left) / across * (WIDE - 2 * EDGE):.1f},{HIGH - EDGE / 2 - (y - low) / up * (HIGH - 1.5 * EDGE):.1f}"

    lines = []
    for number, (name, curve) in enumerate(thin.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(at(x, y) for x, y in curve)
        mark = f'<circle cx="{points.split(",")[0]}" cy="{points.split(",")[1]}" r="3" fill="{colour}"/>' if len(curve) == 1 else ""
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>{mark}')
        if name:
            place = f'x="{WIDE - EDGE + 4}" y="{EDGE / 2 + 14 * number}" text-anchor="end"'
            lines.append(f'<text {place} style="fill:{colour}">{html.escape(name)}</text>')
    scale = (
        f'<text x="2" y="{EDGE / 2 + 12}">{_number(high)}</text><text x="2" y="{HIGH - EDGE / 2}">{_number(low)}</text>'
        f'<text x="{EDGE}" y="{HIGH - 4}">step {left:.0f}</text><text x="{WIDE - EDGE}" y="{HIGH - 4}" text-anchor="end">{right:.0f}</text>'
    )
    head = f'<text x="{EDGE}" y="14" font-weight="600">{html.escape(title)}</text>'
    frame = f'viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img" aria-label="{html.escape(title)}"'
    return f"<svg {frame}>{head}{scale}{''.join(lines)}</svg>"


def _thinned(curve: Curve) -> Curve:
    if len(curve) <= POINTS:
        return curve
    size = len(curve) / POINTS
    cuts = [curve[int(number * size) : int((number + 1) * size)] for number in range(POINTS)]
    return [(cut[-1][0], sum(y for _, y in cut) / len(cut)) for cut in cuts if cut]


def _losses(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Of the first measurement and the last, which may be the same."""
    shown = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    head = "".join(f"<th>step {line['step']}</th>" for line in shown)
    rows = []
    for name, row in shown[-1]["losses"].items():
        cells = "".join(f"<td>{_number(line['losses'].get(name, {}).get('loss'))}</td>" for line in shown)
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{row['samples']}</td>{cells}</tr>")
    return f"<table><tr><th>group</th><th>samples</th>{head}</tr>{''.join(rows)}</table>"


def _panel(panel: Sequence[Mapping[str, str]], evaluations: Sequence[Mapping[str, Any]]) -> str:
    told = [line for line in evaluations if line["replies"]]
    rows = []
    for number, row in enumerate(panel):
        given = [(line["step"], line["replies"][number]) for line in told[-5:] if number < len(line["replies"])]  # the panel may have grown
        replies = "".join(f"<li>step {step}: {_judged(reply, row['truth'])}</li>" for step, reply in given)
        picture = f'<img src="{html.escape(row["picture"])}" alt="picture of {html.escape(row["id"])}">'
        asked = f"{html.escape(row['question'])}<br><b>{html.escape(row['truth'])}</b>"
        rows.append(f"<tr><td>{picture}</td><td>{asked}</td><td><ul>{replies}</ul></td></tr>")
    return f"<table><tr><th>picture</th><th>question, true reply</th><th>replies</th></tr>{''.join(rows)}</table>"


def _judged(reply: str, truth: str) -> str:
    return f'<span class="{"good" if reply.strip() == truth.strip() else "bad"}">{html.escape(reply)}</span>'


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
