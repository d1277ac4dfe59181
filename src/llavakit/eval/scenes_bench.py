"""LLaVA-Bench in miniature: drawn scenes, three questions each, a reference from the truth, and a judge that counts instead of thinking.

It shows the way from answers over reviews to relative scores without a key and without a network. It is no LLaVA-Bench: the judge is a
rule, the reference is always right, and the pictures are drawn, so its numbers compare models of drawn scenes with one another and
nothing else.

    conv      one short question with one right answer      10 as said, 8 among other words, 1 wrong
    detail    describe the picture                          1 + 9 F1 of the things named (colour and shape)
    complex   how many would be left if ...                 1 + 5 for the right number + 4 F1 of the things named
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavakit.errors import DataError, RefusedError
from llavakit.eval import reviews
from llavakit.eval.benchmark import Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.judge import HIGHEST, Case
from llavakit.eval.llava_bench import Answer
from llavakit.eval.scenes import SMALL_PRINT, named, normal
from llavakit.scenes.draw import box, draw
from llavakit.scenes.export import choose
from llavakit.scenes.questions import questions as asked_about
from llavakit.scenes.statements import NUMBERS, captions
from llavakit.scenes.world import Scene
from llavakit.types import Conversation, Image, Sampling

JUDGE = "scenes-judge"
SCENES = 30
DESCRIBE = ("Describe the picture.", "Describe the image in detail.", "What do you see?")
_PROMPT = re.compile(
    r"\[Context\]\n(.*?)\n\n\[Question\]\n(.*?)\n\n\[Assistant 1\]\n(.*)\n\n\[End of Assistant 1\]\n\n"
    r"\[Assistant 2\]\n(.*)\n\n\[End of Assistant 2\]\n\n\[System\]\n",
    re.DOTALL,
)
_WORD = re.compile(r"\w+")
_DIGITS = re.compile("[0-9]{1,9}")
_COUNTS = {"none": 0, "nothing": 0, **{word: number for number, word in enumerate(NUMBERS)}}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question about one scene. ``truth`` is its short answer: of ``complex`` a number, of ``detail`` nothing."""

    id: int
    scene: Scene
    category: str
    question: str
    truth: str
    reference: str

    @property
    def context(self) -> str:
        """What the scene shows, as the judge of LLaVA-Bench (COCO) is told it: five sentences, and a box a line."""
        scene = self.scene
        size = (scene.width, scene.height, scene.width, scene.height)
        corners = ((thing.shape, zip(box(thing, scene), size, strict=True)) for thing in scene.things)
        lines = (f"{shape}: {[round(at / side, 3) for at, side in found]}" for shape, found in corners)
        return "\n".join(captions(scene)) + "\n\n" + "\n".join(lines)


def items(count: int = SCENES, *, seed: int = 0) -> list[Item]:
    """Three questions about each of ``count`` held-out scenes."""
    found: list[Item] = []
    for scene in choose(count, split="test", seed=seed).whole:
        rng = random.Random(scene.seed + 6)
        short = rng.choice([one for one in asked_about(scene, rng) if one.kind != SMALL_PRINT])
        told = captions(scene)[3]
        color = rng.choice(sorted({thing.color for thing in scene.things}))
        left = sum(thing.color != color for thing in scene.things)
        left_over = f"{told} Without the {color} ones, {NUMBERS[left] if left else 'none'} would be left."
        three = (
            ("conv", short.question, short.answer, short.answer),
            ("detail", rng.choice(DESCRIBE), "", told),
            ("complex", f"How many things would be left if everything {color} were taken away?", str(left), left_over),
        )
        for category, question, truth, reference in three:
            one = Item(id=len(found), scene=scene, category=category, question=question, truth=truth, reference=reference)
            found.append(one)
    return found


def grade(item: Item, answer: str) -> tuple[float, str]:
    """One to ten points for an answer, and why."""
    if item.category == "conv":
        if normal(answer) == normal(item.truth):
            return HIGHEST, f"says {item.truth!r}, which is right"
        among = f" {' '.join(_words(item.truth))} " in f" {' '.join(_words(answer))} "
        return (8.0, f"says {item.truth!r} among other words") if among else (1.0, f"does not say {item.truth!r}")
    there, said = {thing.name for thing in item.scene.things}, named(answer.lower())
    f1 = 2 * len(there & said) / (len(there) + len(said))
    told = f"names {len(there & said)} of {len(there)} things and {len(said - there)} that are not there"
    if item.category == "detail":
        return round(1 + 9 * f1, 1), told
    right = _last_number(answer) == int(item.truth)
    return round(1 + 5 * right + 4 * f1, 1), f"{'counts right' if right else f'does not come to {item.truth}'}, {told}"


class ScenesJudge:
    """A responder that judges answers about these items from their truth. It finds them by the context and question that it is told."""

    def __init__(self, known: Sequence[Item]) -> None:
        self._known = {(item.context, item.question): item for item in known}

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        """The review in one piece. Raises RefusedError where the question is not about one of its scenes."""
        found = _PROMPT.match(conversation.turns[-1].text)
        item = self._known.get((found[1], found[2])) if found else None
        if found is None or item is None:
            remedy = "name another with --judge: the built-in one judges scenes-bench only"
            raise RefusedError("this judge knows its own drawn scenes only", code="not_a_scene", remedy=remedy)
        (first, why), (second, so) = grade(item, found[3]), grade(item, found[4])
        return iter((f"{first:g} {second:g}\nAssistant 1 {why}. Assistant 2 {so}. (A rule has counted this from the scene's truth.)",))


def make(folder: Path, limit: int | None = None) -> None:
    """The folder, empty: all that there is to know of a scene is its seed."""
    folder.mkdir(parents=True, exist_ok=True)


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """The questions, with pictures drawn here; ``folder`` is of no matter."""
    known = items()
    pictures = _pictures(known)
    return [
        Question(
            id=str(item.id),
            given=item.id,
            prompt=protocol.asked(item.question),
            image=pictures[item.scene.seed],
            category=item.category,
            truth=item,
        )
        for item in known
    ]


def cases(known: Sequence[Item], answers: Mapping[str, Answer]) -> list[Case]:
    """What the judge is asked of these answers. Raises DataError where one is missing."""
    if absent := [item.id for item in known if str(item.id) not in answers]:
        what = f"{len(absent)} of {len(known)} questions have no answer, the first is {absent[0]}"
        raise DataError(what, code="unanswered", where="scenes-bench", remedy="answer all questions first: llava eval scenes-bench")
    pictures = _pictures(known)
    return [
        Case(
            id=str(item.id),
            given=item.id,
            category=item.category,
            question=item.question,
            reference=item.reference,
            candidate=answers[str(item.id)].text,
            context=item.context,
            reference_id=item.id,
            candidate_id=answers[str(item.id)].id,
            image=pictures[item.scene.seed],
        )
        for item in known
    ]


def _pictures(known: Sequence[Item]) -> dict[int, Image]:
    """Every scene drawn once."""
    return {seed: Image.of(draw(scene)) for seed, scene in {item.scene.seed: item.scene for item in known}.items()}


def score(answered: Sequence[Answered]) -> list[Score]:
    """The relative scores that the built-in judge comes to, at once; what is not answered is an empty answer."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for one in answered:
        item: Item = one.question.truth
        pairs.setdefault(item.category, []).append((grade(item, item.reference)[0], grade(item, one.text or "")[0]))
    return reviews.scores(pairs)


def verdict(one: Answered) -> Verdict:
    """The points of one answer, for the page of questions."""
    item: Item = one.question.truth
    points, why = grade(item, one.text or "")
    return Verdict(parsed=why, points=points / HIGHEST, expected=item.reference)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _last_number(text: str) -> int | None:
    """The number that a text ends up with: digits or a number word."""
    found = [_COUNTS[word] if word in _COUNTS else int(word) for word in _words(text) if word in _COUNTS or _DIGITS.fullmatch(word)]
    return found[-1] if found else None


SCENES_BENCH = Benchmark(
    name="scenes-bench",
    title="LLaVA-Bench in miniature (drawn scenes; a rule judges, no model)",
    needs="nothing: the scenes are drawn",
    reference="our own; the way is LLaVA-Bench (COCO)'s, the numbers compare with nothing outside this project",
    questions=questions,
    score=score,
    verdict=verdict,
    make=make,
    protocols=(Protocol(name="scenes", max_new_tokens=128, judge=JUDGE, note="judged by a rule from the scenes' truth"),),
)
