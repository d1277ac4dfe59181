"""The claims as intervals, and accuracy by steps for reasoning first and answer first (extra ``plots``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from ablations.arms import SEEDS
from ablations.claims import CLAIMS, Results, finding

COLORS = {"agrees": "#2a7a3f", "disagrees": "#b3372f", "cannot tell": "#7a7a7a"}


def draw_all(results: Results, folder: Path, seeds: Sequence[int] = SEEDS) -> list[str]:
    """Write the plots for which there are results; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    return [name for name, draw in (("claims.png", intervals), ("steps.png", steps)) if draw(results, folder / name, seeds)]


def intervals(results: Results, path: Path, seeds: Sequence[int]) -> bool:
    """One line a claim: the mean difference and its interval, against no difference."""
    found = [one for one in (finding(claim, results, seeds) for claim in CLAIMS) if one.interval is not None]
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(found) + 1.2), layout="constrained")
    axes.axvline(0, color="black", linewidth=0.8)
    for row, one in enumerate(reversed(found)):
        assert one.interval is not None
        color = COLORS[one.verdict]
        axes.plot([one.interval.low, one.interval.high], [row, row], color=color, linewidth=2)
        axes.plot(one.interval.mean, row, "o", color=color, markerfacecolor="white" if one.missing else color)
    axes.set_yticks(range(len(found)), [one.claim.name for one in reversed(found)])
    axes.set_xlim(max(-100, axes.get_xlim()[0]), min(100, axes.get_xlim()[1]))
    axes.set_xlabel("ours, points of 100, 95 % interval; right of 0: as the paper says\nhollow: seeds are missing")
    for verdict, color in COLORS.items():
        axes.plot([], [], "o-", color=color, label=verdict)
    axes.legend(loc="lower right", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def steps(results: Results, path: Path, seeds: Sequence[int]) -> bool:
    """Accuracy after so many steps: each seed thin, the mean thick."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    drawn = False
    for name, color in (("reasoning-first", "#2a5fa8"), ("answer-first", "#c47a1c")):
        curves = [results[name, seed]["points"]["science"] for seed in seeds if (name, seed) in results]
        if not curves:
            continue
        drawn = True
        at = sorted(map(int, curves[0]))
        shares = [[100 * statistics.fmean(curve[str(step)]) for step in at] for curve in curves]
        for share in shares:
            axes.plot(at, share, color=color, linewidth=0.7, alpha=0.5)
        axes.plot(at, [statistics.fmean(column) for column in zip(*shares, strict=True)], "o-", color=color, label=name)
    if drawn:
        axes.set_xlabel("steps")
        axes.set_ylabel("right, of 100")
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return drawn
