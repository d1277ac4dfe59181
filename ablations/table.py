"""The table of all claims and runs as Markdown, from the results alone.

    python -m ablations.table [--results ablations/results] [--out docs/ablations.md]

Plots go beside it into a folder of its name, where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations.arms import ALIGN, ARMS, BATCH, SEEDS, TUNE, Arm, seeds_of
from ablations.claims import CLAIMS, Finding, Results, Side, Verdict, finding

METRICS: Mapping[str, str] = {
    "short": "questions of eleven types",
    "short-asked": "the same, asked for short answers",
    "small": "small print",
    "bench": "conversation, detail and reasoning alike",
    "science": "ScienceQA-like",
    "compound": "yes to a compound that is not there",
    "absent": "yes to a thing of neither colour nor shape",
    "present": "yes to what is there",
}

PAGE = """# The papers' claims in miniature

<!-- Made by `python -m ablations.table` from ablations/results; do not edit. -->

`bash runs/ablations.sh` tries each claim with drawn scenes and the tiny family, on a CPU. {tried} claims: {verdicts}.
The {runs} runs below took {minutes} minutes by the clock.

A model of three million parameters that has seen a few thousand drawn pictures says little about one of thirteen billion. What is tried
here is whether an effect shows in the same procedure, and in which direction; not how large it is at the papers' scale.

**Ours** is the mean difference in points of 100, the arm that the paper finds better minus the other. The **95 % interval** is paired
over seeds and questions: every seed is asked the same questions, both vary, and the factor is Student's with the degrees of freedom of
Welch and Satterthwaite (`ablations/interval.py`). Where a shipped model is asked and none is trained, over questions alone.
**Verdict**, by a rule set before the first run: *agrees* where the interval lies on the paper's side of 0, *disagrees* where it lies on
the other, else *cannot tell*. There is no correction for trying many: of {tried} intervals one is expected to miss by chance.

This is the second series. The first had 40 and 48 steps and could tell little: 3 claims agreed, for 16 it could not tell, and the
baseline's seeds lay 38 points apart (dev/LOG.md, 2026-11-21). So the stages were made longer, the projector's rate was raised from 2e-3
to 8e-3, more questions are asked, both text-only decoders learn three times as long, each mix of data is one epoch of its own samples in
place of equal steps, and two mixes were added. All of that was settled before this series began, after pilots of the baseline with
another seed (10). No claim was taken out after its result was known. For both of "reasoning first" the task was replaced
and the half-way step moved from 40 to 60 after a first result of the first series. That the baseline has tiny's decoder was settled for
time. The script ran with two processes, was halted at times while the machine was needed for something else, and was started anew before
the third seed, when the division among processes was made finer; no arm was half kept.

{claims}

{plots}

{steps}

Numbers in brackets behind a source are the sections of our specification that quote it.

## What is not as in the papers

{unlike}

## Every run

The baseline: {align} steps of 32 captions for the projector, then {tune} steps of {batch} conversations for projector and decoder (Muon),
from the shipped tiny's tower and decoder with a new projector between them; other arms as they say. Seeds draw the projector and which
samples come in what order; tower, decoder and pool of samples are the same for all. Shares of 100 by seed. {spread}

{table}
"""


def read(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All results of a folder. Arms are compared only where they were asked the same."""
    found = {}
    asked: dict[str, str] = {}
    for path in sorted(folder.glob("*-seed*.json")):
        one = json.loads(path.read_text())
        found[one["arm"], one["seed"]] = one
        for metric, questions in one["questions"].items():
            if asked.setdefault(metric, questions) != questions:
                raise ValueError(f"{path}: other questions of '{metric}' than in the results before it; run all anew")
    return found


def page(results: Results, *, plots: Sequence[str] = (), seeds: Sequence[int] = SEEDS) -> str:
    """The whole page."""
    findings = [finding(claim, results, seeds) for claim in CLAIMS]
    verdicts: tuple[Verdict, ...] = ("agrees", "disagrees", "cannot tell")
    return PAGE.format(
        tried=len(findings),
        verdicts=", ".join(f"{sum(one.verdict == name for one in findings)} {name}" for name in verdicts),
        runs=len(results),
        minutes=round(sum(sum(one["seconds"].values()) for one in results.values()) / 60),
        claims="\n".join(_claims(findings)),
        plots="\n".join(f"![{name}](ablations/{name})" for name in plots),
        steps=_steps_to(results, seeds),
        unlike="\n".join(f"- {one.claim.name}: {one.claim.unlike}." for one in findings if one.claim.unlike),
        align=ALIGN,
        tune=TUNE,
        batch=BATCH,
        spread=_spread(results, seeds),
        table="\n".join(_runs(results, seeds)),
    )


def _claims(findings: Sequence[Finding]) -> list[str]:
    lines = [
        "| claim | the paper | ours | 95 % interval | verdict | seeds | command |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in findings:
        claim, found = one.claim, one.interval
        ours = "-" if found is None else f"{found.mean:+.1f}"
        spread = "-" if found is None else f"{found.low:+.1f} to {found.high:+.1f}"
        seeds = str(len(one.seeds)) + (f", missing {' '.join(map(str, one.missing))}" if one.missing else "")
        command = f"`python -m ablations.run --arms {' '.join(claim.arms)}`"
        lines.append(
            f"| **{claim.name}**: {claim.says} | {claim.paper}; {claim.source} | {ours} | {spread} | {one.verdict} | {seeds} | {command} |"
        )
    return lines


def _spread(results: Results, seeds: Sequence[int]) -> str:
    """How far apart the seeds of the baseline are: what every claim that rests on it must rise above."""
    means = [100 * statistics.fmean(row) for seed in seeds if (row := Side(arm="base").points(results, seed)) is not None]
    if len(means) < 2:
        return ""
    apart = max(means) - min(means)
    return f"The\nbaseline's seeds lie {apart:.1f} points apart: what makes a smaller difference can hardly be told by three seeds."


def _steps_to(results: Results, seeds: Sequence[int]) -> str:
    """After how many steps each seed has the accuracy that answering first ends with."""
    curves = {
        name: {seed: results[name, seed]["points"]["science"] for seed in seeds if (name, seed) in results}
        for name in ("reasoning-first", "answer-first")
    }
    ends = [statistics.fmean(curve[max(curve, key=int)]) for curve in curves["answer-first"].values()]
    if not ends:
        return "Steps to an accuracy: answer-first has not been run."
    target = statistics.fmean(ends)
    told = []
    for name, by_seed in curves.items():
        reached = []
        for curve in by_seed.values():
            steps = [int(step) for step, points in curve.items() if statistics.fmean(points) >= target]
            reached.append(str(min(steps)) if steps else "never")
        told.append(f"{name} {' / '.join(reached) or 'not run'}")
    every = ARMS["answer-first"].every
    return f"Answer first ends at {100 * target:.1f} of 100. Steps to that, asked every {every}, by seed: {'; '.join(told)}."


def _runs(results: Results, seeds: Sequence[int]) -> list[str]:
    lines = ["| arm | what is changed | asked | by seed | mean | seconds a run |", "| --- | --- | --- | --- | --- | --- |"]
    for arm in ARMS.values():
        lines += [_run(arm, metric, step, results, seeds) for metric in arm.asks for step in _steps(arm)]
    return lines


def _steps(arm: Arm) -> Sequence[int]:
    return range(arm.every, arm.tune + 1, arm.every) if arm.every else (arm.tune,)


def _run(arm: Arm, metric: str, step: int, results: Results, seeds: Sequence[int]) -> str:
    known = [results.get((arm.name, seed)) for seed in seeds_of(arm, seeds)]
    rows = [None if one is None else one["points"].get(metric, {}).get(str(step)) for one in known]
    means = [None if row is None else 100 * statistics.fmean(row) for row in rows]
    there = [mean for mean in means if mean is not None]
    each = " / ".join("missing" if mean is None else f"{mean:.1f}" for mean in means)
    mean = f"{statistics.fmean(there):.1f}" if there else "-"
    seconds = [sum(one["seconds"].values()) for one in known if one is not None]
    took = f"{statistics.fmean(seconds):.0f}" if seconds else "-"
    at = f", step {step}" if arm.every else ""
    return f"| {arm.name} | {arm.says} | {METRICS[metric]}{at} | {each} | {mean} | {took} |"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--results", type=Path, default=Path("ablations/results"))
    words.add_argument("--out", type=Path, default=Path("docs/ablations.md"))
    given = words.parse_args()
    results = read(given.results)
    try:
        from ablations.plots import draw_all

        plots = draw_all(results, given.out.parent / "ablations")
    except ImportError:
        plots = []  # the table needs no matplotlib
    given.out.write_text(page(results, plots=plots))
    print(given.out)


if __name__ == "__main__":
    main()
