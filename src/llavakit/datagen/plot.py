"""How often each phrase stands in the captions, before and after the filter, as the paper draws it: both axes logarithmic.

captions |*
         | **
     100 |...***...   Above the line before and after differ: a hundred captions of each phrase are drawn,
         |      **    and the captions of rarer phrases bring some more along.
         +---------> phrases, the most frequent first
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llavakit.datagen.select import Selection
from llavakit.errors import ConfigError, MissingExtraError

POINTS = 2000  # of a curve: on a logarithmic axis more cannot be told apart
ENDINGS = (".png", ".svg")


def check_plot(path: Path) -> None:
    """Raise what would prevent the picture, before hours of counting."""
    if path.suffix.lower() not in ENDINGS:
        remedy = f"let the name end in {' or '.join(ENDINGS)}"
        raise ConfigError("no format of pictures for that name", code="bad_value", where=str(path), remedy=remedy)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("matplotlib is not installed", code="missing_extra", remedy="pip install 'llavakit[plots]'") from error


def plot(found: Selection, path: Path, *, at_most: int) -> Path:
    """Draw the counts of a selection as PNG or SVG."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for counts, captions, label, colour in (
        (found.before, found.captions, "before", "tab:gray"),
        (found.after, found.kept, "after", "tab:blue"),
    ):
        ranks, values = thinned(counts[counts > 0])
        axes.plot(ranks, values, color=colour, label=f"{label}: {captions:,} captions", linewidth=1.6)
    axes.axhline(at_most, color="tab:red", linestyle=":", linewidth=1, label=f"drawn for a phrase: at most {at_most}")
    axes.set(xscale="log", yscale="log", xlabel=f"phrases ({len(found.before):,}), most frequent first", ylabel="captions that have it")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    return path


def thinned(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ranks from 1 and their counts, at most POINTS of them, evenly spread on a logarithmic axis."""
    if len(counts) <= POINTS:
        return np.arange(1, len(counts) + 1), counts
    ranks = np.unique(np.geomspace(1, len(counts), POINTS).round().astype(np.int64))
    return ranks, counts[ranks - 1]
