"""The benchmark of drawn scenes: held-out questions about held-out scenes, exact match, type by type.

The same questions are asked twice, about the picture and about its empty ground (``blank``): what a model scores on the second is what
it knows without sight, and the table prints both. Scoring is pure: answers are strings, wherever they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llavakit.scenes.draw import blank, draw
from llavakit.scenes.export import even_benchmark
from llavakit.scenes.questions import KINDS
from llavakit.scenes.world import COLORS, SHAPES, make_scene
from llavakit.types import Conversation

Answer = Callable[[Sequence[Conversation]], Sequence[str]]
SMALL_PRINT = "small"  # cannot be read at one view of 112 pixels; reported, not counted


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question with its right answer; ``seed`` makes its scene."""

    kind: str
    seed: int
    question: str
    answer: str

    def conversation(self, *, sighted: bool = True) -> Conversation:
        scene = make_scene(self.seed)
        return Conversation.ask(self.question, draw(scene) if sighted else blank(scene))


@dataclass(frozen=True, kw_only=True)
class Score:
    """Right answers of one type."""

    kind: str
    right: int
    total: int

    @property
    def share(self) -> float:
        return self.right / self.total

    @property
    def half_width(self) -> float:
        """Half of the 95 % Wilson interval."""
        n, z = self.total, 1.96
        return z / (1 + z * z / n) * math.sqrt(self.share * (1 - self.share) / n + z * z / (4 * n * n))


def held_out(per_kind: int = 200, *, seed: int = 0) -> list[Asked]:
    """``per_kind`` questions of each type about scenes of the test split."""
    rows = even_benchmark("test", per_kind, seed=seed)
    return [Asked(kind=r["category"], seed=int(r["question_id"].split("-")[0]), question=r["text"], answer=r["answer"]) for r in rows]


def ask(
    answer: Answer, asked: Sequence[Asked], *, sighted: bool = True, batch: int = 64, done: Callable[[int], Any] | None = None
) -> list[str]:
    """The replies to all questions, in order. ``answer`` takes a batch of open conversations."""
    replies: list[str] = []
    for at in range(0, len(asked), batch):
        replies += answer([row.conversation(sighted=sighted) for row in asked[at : at + batch]])
        if done:
            done(len(replies))
    return replies


def normal(text: str) -> str:
    """Lower case, without surrounding blanks and final full stop: the only mercy of exact match."""
    return text.strip().lower().removesuffix(".")


def score(asked: Sequence[Asked], replies: Sequence[str]) -> list[Score]:
    """Right answers by type, in the order of ``KINDS``."""
    assert len(asked) == len(replies), (len(asked), len(replies))
    right = [(row.kind, normal(reply) == normal(row.answer)) for row, reply in zip(asked, replies, strict=True)]
    scores = []
    for kind in KINDS:
        hits = [good for name, good in right if name == kind]
        if hits:
            scores.append(Score(kind=kind, right=sum(hits), total=len(hits)))
    return scores


def overall(scores: Iterable[Score]) -> Score:
    """All types together except small print."""
    counted = [s for s in scores if s.kind != SMALL_PRINT]
    return Score(kind="overall", right=sum(s.right for s in counted), total=sum(s.total for s in counted))


def best_guess(asked: Sequence[Asked]) -> dict[str, float]:
    """Chance by type: always giving the type's most frequent answer ('in front' names one of two: 1/2)."""
    chance = {}
    for kind in {row.kind for row in asked}:
        answers = [row.answer for row in asked if row.kind == kind]
        chance[kind] = 0.5 if kind == "order" else max(map(answers.count, answers)) / len(answers)
    return chance


def named(text: str) -> set[str]:
    """The things that a text names by colour and shape ('red star')."""
    return {f"{color} {shape}" for color in COLORS for shape in SHAPES if f"{color} {shape}" in text}


def caption_f1(seeds: Sequence[int], captions: Sequence[str]) -> float:
    """How well captions name the things of their scenes: F1 over (colour, shape) pairs, all scenes together."""
    hits = said = there = 0
    for seed, caption in zip(seeds, captions, strict=True):
        truth, claimed = {thing.name for thing in make_scene(seed).things}, named(caption)
        hits, said, there = hits + len(truth & claimed), said + len(claimed), there + len(truth)
    return 2 * hits / (said + there)


def table(seen: Sequence[Score], unseen: Sequence[Score], chance: dict[str, float]) -> str:
    """Markdown: type, questions, right with the picture, right with a blank one, chance. Two sums: without small print, and of all."""
    lines = ["| type | questions | right (95 %) | blank image | chance |", "| --- | --- | --- | --- | --- |"]
    for s, dark in zip(_summed(seen), _summed(unseen), strict=True):
        guess = f"{100 * chance[s.kind]:.0f} %" if s.kind in chance else ""
        lines.append(f"| {s.kind} | {s.total} | {100 * s.share:.1f} % ± {100 * s.half_width:.1f} | {100 * dark.share:.1f} % | {guess} |")
    return "\n".join(lines)


def _summed(scores: Sequence[Score]) -> list[Score]:
    """The types, then all but small print, then all."""
    most = overall(scores)
    every = Score(kind="all", right=sum(s.right for s in scores), total=sum(s.total for s in scores))
    return [*scores, Score(kind="all but small", right=most.right, total=most.total), every]
