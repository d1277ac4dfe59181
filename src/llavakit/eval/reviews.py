"""Review files as upstream writes and reads them, one JSON object a line, and the numbers that they come to.

    {"id": 1, "question_id": 0, "answer1_id": .., "answer2_id": .., "category": "conv", "content": "8 6\\n...", "tuple": [8.0, 6.0],
     "judge": {...}}                                                  ours: who judged, at what temperature, with which prompt and seed

        relative = mean of the second scores / mean of the first ones     (a ratio of means, not a mean of ratios; `all` over questions)

A question without a usable review has no line: it is told beside the numbers, never averaged in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llavakit.data.reading import Records
from llavakit.errors import DataError
from llavakit.eval.benchmark import Score
from llavakit.eval.files import json_lines
from llavakit.eval.judge import UNPARSABLE, WILD, Job, Judged
from llavakit.eval.official import as_row
from llavakit.eval.report import Rows, markdown, shown
from llavakit.eval.resample import Pair, Spread, bootstrap, ratio_of_means, spread

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Review:
    """One line of a review file; ``scores`` are (reference, candidate)."""

    given: str | int
    scores: Pair
    category: str = ""
    content: str = ""
    judge: Mapping[str, Any] = field(default_factory=dict)


class Relative(NamedTuple):
    """A category. ``relative`` in percent; ``reference`` and ``candidate`` are mean scores times ten, as they are printed."""

    relative: float
    reference: float
    candidate: float
    questions: int

    @property
    def printed(self) -> tuple[float, float, float]:
        """The three numbers as upstream prints them: one decimal, from means that are rounded to three first."""
        first, second = round(self.reference / 10, 3), round(self.candidate / 10, 3)
        return round(second / first * 100, 1) if first else float("nan"), round(first * 10, 1), round(second * 10, 1)


def relative_scores(pairs: Mapping[str, Sequence[Pair]]) -> dict[str, Relative]:
    """(reference, candidate) scores by category -> the numbers of each category in order, and of ``all`` questions together."""
    told = {name: list(found) for name, found in sorted(pairs.items()) if found}
    if everything := [pair for found in told.values() for pair in found]:
        told[ALL] = everything
    return {name: _relative(found) for name, found in told.items()}


def _relative(pairs: Sequence[Pair]) -> Relative:
    first, second = (10 * sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    return Relative(100 * ratio_of_means(pairs), first, second, len(pairs))


def by_category(reviews: Iterable[Review]) -> dict[str, list[Pair]]:
    """Scores by category, named as in the papers: without ``llava_bench_``."""
    found: dict[str, list[Pair]] = {}
    for review in reviews:
        found.setdefault(review.category.removeprefix(WILD) or ALL, []).append(review.scores)
    return found


def scores(pairs: Mapping[str, Sequence[Pair]], *, seed: int = 0) -> list[Score]:
    """Relative scores with intervals by bootstrap over questions; ``all`` last and in the headline."""
    found = []
    for name, numbers in relative_scores(pairs).items():
        rows = [pair for told in pairs.values() for pair in told] if name == ALL else list(pairs[name])
        half = bootstrap(rows, ratio_of_means, seed=seed).half_width
        half = None if half is None else 100 * half
        found.append(Score(metric=name, value=numbers.relative, count=numbers.questions, half_width=half, headline=name == ALL))
    return found


def across(runs: Sequence[Mapping[str, Relative]]) -> dict[str, Spread]:
    """Several decodings, or several runs of a judge: mean and standard deviation of each category's relative score."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: spread([run[name].relative for run in runs if name in run]) for name in names}


def table(pairs: Mapping[str, Sequence[Pair]], *, seed: int = 0) -> str:
    """Markdown: category, questions, relative score with its interval, mean scores of reference and candidate times ten."""
    rows: Rows = [("category", "questions", "relative (95 %)", "reference", "candidate")]
    told = relative_scores(pairs)
    for score in scores(pairs, seed=seed):
        relative, reference, candidate = told[score.metric].printed
        rows.append((score.metric, str(score.count), shown(replace(score, value=relative)), str(reference), str(candidate)))
    return markdown(rows)


def spreads(runs: Sequence[Mapping[str, Relative]]) -> str:
    """Markdown: mean ± standard deviation of several runs, and each of them."""
    rows: Rows = [("category", f"mean ± sd of {len(runs)}", "runs")]
    for name, found in across(runs).items():
        sd = "" if found.sd is None else f" ± {found.sd:.1f}"
        rows.append((name, f"{found.mean:.1f}{sd}", ", ".join(f"{value:.1f}" for value in found.values)))
    return markdown(rows)


def read_reviews(path: Path, *, ignore: Collection[str | int] = ()) -> list[Review]:
    """A review file, upstream's or ours; ``ignore`` leaves out question ids. Raises DataError with the line."""
    records = Records(path)
    left_out = {str(one) for one in ignore}
    found = []
    for number, value in records:
        row = as_row(value, f"{path}:{records.place(number)}")
        if str(row.get("question_id", "")) in left_out:
            continue
        pair = row.get("tuple", row.get("score"))
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in pair)
        ):
            raise row.fail("no pair of scores under 'tuple'", "give a review file: JSON lines with 'category', 'content' and 'tuple'")
        judge = row.get("judge")
        found.append(
            Review(
                given=row.get("question_id", ""),
                scores=(float(pair[0]), float(pair[1])),
                category=str(row.get("category", "")),
                content=str(row.get("content", "")),
                judge=judge if isinstance(judge, dict) else {},
            )
        )
    if not found:
        raise DataError("there is no review", code="empty_file", where=str(path), remedy="judge some answers first: llava eval judge")
    return found


def unparsable(reviews: Iterable[Review]) -> int:
    """How many reviews hold upstream's -1 : -1, which its averages take for scores."""
    return sum(review.scores == UNPARSABLE for review in reviews)


def write_reviews(path: Path, job: Job, judged: Sequence[Judged], *, judge: str) -> list[Review]:
    """Those that have scores, in order, as a whole or not at all; returns them."""
    rows = [_line(number, job, one, judge) for number, one in enumerate(judged, 1) if one.scores is not None]
    json_lines(path, rows)
    return [
        Review(given=row["question_id"], scores=row["tuple"], category=row["category"], content=row["content"], judge=row["judge"])
        for row in rows
    ]


def _line(number: int, job: Job, one: Judged, judge: str) -> dict[str, Any]:
    case, first = one.case, one.readings[0]
    row: dict[str, Any] = {
        "id": number,
        "question_id": case.given,
        "answer1_id": case.reference_id,
        "answer2_id": case.candidate_id,
        "category": case.category,
        "content": first.text,
        "tuple": one.scores,
        "judge": {
            "asked": judge,
            "model": first.model,
            "temperature": job.sampling.temperature,
            "seed": first.seed,
            "prompt": job.rules.digest(case.category),
            "refused": [refused.reason for refused in one.refused],
        },
    }
    if len(one.readings) > 1:
        row["orders"] = [{"content": reading.text, "tuple": reading.scores, "model": reading.model} for reading in one.readings]
    return row
