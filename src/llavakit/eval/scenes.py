"""The benchmark of drawn scenes: held-out questions about held-out scenes, exact match, type by type.

The same questions are asked twice, about the picture and about its empty ground (``blank``): what a model scores on the second is what
it knows without sight, and the table prints both. Scoring is pure: answers are strings, wherever they come from.

``SCENES`` is the same as a benchmark like all others: files in a folder, which it draws itself where there is none.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.eval import benchmark, intervals
from llavakit.eval.benchmark import Answered, Benchmark, Protocol, Published, Question, Verdict
from llavakit.eval.files import json_lines, replaced
from llavakit.scenes.draw import blank, draw
from llavakit.scenes.export import even_benchmark
from llavakit.scenes.questions import KINDS
from llavakit.scenes.world import COLORS, SHAPES, make_scene
from llavakit.types import Conversation, Image

Answer = Callable[[Sequence[Conversation]], Sequence[str]]
SMALL_PRINT = "small"  # cannot be read at one view of 112 pixels; reported, not counted
PER_KIND = 200
MOST = "all but small"
FILE, PICTURES = "benchmark.jsonl", "images"


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
        half = intervals.share(self.kind, self.right, self.total).half_width
        assert half is not None
        return half / 100


def held_out(per_kind: int = PER_KIND, *, seed: int = 0) -> list[Asked]:
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
    return [*scores, Score(kind=MOST, right=most.right, total=most.total), every]


# --- as a benchmark like all others ---------------------------------------------------------------------------------------------------


def make(folder: Path, limit: int | None = None) -> None:
    """The questions of ``held_out``, and the pictures of the first ``limit`` of them, as files. What is there is not made again."""
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    if not (folder / FILE).exists():
        rows = [row | {"image": f"{Path(row['image']).stem}.png"} for row in even_benchmark("test", PER_KIND)]
        json_lines(folder / FILE, rows)
    for question in questions(folder, SCENES.protocols[0])[:limit]:
        assert question.image is not None
        path = question.image.source
        assert isinstance(path, Path)
        if not path.exists():
            drawn = io.BytesIO()
            draw(make_scene(int(path.stem))).save(drawn, "PNG")
            replaced(path, drawn.getvalue(), sync=False)


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """From the files of ``make`` or of ``llava scenes export``. Raises DataError."""
    path = folder / FILE
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        remedy = "llava scenes export FOLDER makes it; without FOLDER scenes are drawn"
        raise DataError(error.strerror or "cannot be read", code="bad_benchmark", where=str(path), remedy=remedy) from error
    return [_question(line, folder, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _question(line: str, folder: Path, where: str) -> Question:
    try:
        row = json.loads(line)
        name, picture, kind, text, answer = (str(row[key]) for key in ("question_id", "image", "category", "text", "answer"))
    except (ValueError, KeyError, TypeError) as error:
        remedy = "write the file anew with llava scenes export"
        raise DataError(f"no question ({type(error).__name__}: {error})", code="bad_benchmark", where=where, remedy=remedy) from error
    return Question(id=name, given=name, prompt=text, image=Image(folder / PICTURES / picture), category=kind, truth=answer)


def numbers(answered: Sequence[Answered]) -> list[benchmark.Score]:
    """Percent by type, of all but small print (what is quoted), and of all. No answer is a wrong one."""
    rows = [Asked(kind=one.question.category, seed=0, question=one.question.prompt, answer=one.question.truth) for one in answered]
    return [
        intervals.share(s.kind, s.right, s.total, headline=s.kind == MOST)
        for s in _summed(score(rows, [one.text or "" for one in answered]))
        if s.total
    ]


def verdict(one: Answered) -> Verdict:
    parsed = normal(one.text or "")
    return Verdict(parsed=parsed, points=float(parsed == normal(one.question.truth)), expected=one.question.truth)


SCENES = Benchmark(
    name="scenes",
    title="Questions about drawn scenes, with the built-in model in mind",
    needs=f"nothing: {len(KINDS) * PER_KIND:,} questions about held-out scenes are made; or a folder of llava scenes export",
    reference="exact match after lower case and without a final full stop; the type of small print is reported and not counted",
    protocols=(
        Protocol(
            name="plain",
            max_new_tokens=64,
            published=(Published(model="tiny", metric=MOST, value=97.1, tolerance=0.3, source="README"),),
        ),
    ),
    questions=questions,
    score=numbers,
    verdict=verdict,
    make=make,
)
