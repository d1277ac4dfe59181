"""What the trained models are asked: fixed sets of questions about scenes of the test split, the same for every arm and seed.

A set gives each answer points between 0 and 1; pairs of arms are compared question by question.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

from ablations.data import DETAIL, problem
from llavakit.assistant import Assistant
from llavakit.data.scienceqa import turns
from llavakit.datagen.scenes_teacher import reason
from llavakit.eval.benchmark import SHORT
from llavakit.eval.scenes import SMALL_PRINT, caption_f1, held_out, normal
from llavakit.scenes.draw import draw
from llavakit.scenes.export import START, benchmark
from llavakit.scenes.statements import article
from llavakit.scenes.world import COLORS, SHAPES, Scene, make_scene, scenes
from llavakit.types import Conversation, Sampling

PER_KIND = 40  # of each of eleven types; small print has a set of its own
BENCH = 50  # of each of three kinds
Points = Callable[["Asked", str], float]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question about the scene of ``seed``."""

    seed: int
    prompt: str
    answer: str
    points: Points
    room: int = 24
    "Tokens that the answer may take."


def exact(asked: Asked, reply: str) -> float:
    return float(normal(reply) == normal(asked.answer))


def names(asked: Asked, reply: str) -> float:
    """How well a description names the things of its scene."""
    return caption_f1([asked.seed], [reply])


def concludes(asked: Asked, reply: str) -> float:
    """Does reasoning end in the right conclusion?"""
    return float(conclusion(reply) == conclusion(asked.answer))


def conclusion(text: str) -> str:
    """What is left, or which are more: the last clause, up to a list of names."""
    found = re.findall(r"(\w+) would be left|there are (more \w+|as many)", text)
    return "".join(found[-1]) if found else ""


def letter(asked: Asked, reply: str) -> float:
    """The one letter behind "The answer is", as ScienceQA's evaluation reads it."""
    found = re.findall(r"The answer is ([A-E])\.", reply)
    return float(len(found) == 1 and found[0] == asked.answer)


def begins_yes(asked: Asked, reply: str) -> float:
    return float(normal(reply).startswith("yes"))


def short(suffix: str = "") -> list[Asked]:
    """Questions of all types but small print."""
    rows = [row for row in held_out(PER_KIND) if row.kind != SMALL_PRINT]
    return [Asked(seed=row.seed, prompt=row.question + suffix, answer=row.answer, points=exact) for row in rows]


def small() -> list[Asked]:
    found = (row for scene in _scenes(1) for row in benchmark([scene]) if row["category"] == SMALL_PRINT)
    rows = itertools.islice(found, 120)
    return [Asked(seed=int(r["question_id"].split("-")[0]), prompt=r["text"], answer=r["answer"], points=exact) for r in rows]


def detail(count: int = BENCH) -> list[Asked]:
    return [Asked(seed=scene.seed, prompt=DETAIL, answer="", points=names, room=128) for scene in itertools.islice(_scenes(2), count)]


def bench() -> list[Asked]:
    """Conversation, detail and reasoning in equal numbers, as LLaVA-Bench (COCO)."""
    reasoned = ((scene.seed, *reason(scene)) for scene in itertools.islice(_scenes(3), BENCH))
    asked = [Asked(seed=seed, prompt=question, answer=answer, points=concludes, room=112) for seed, question, answer in reasoned]
    usual = short()
    return [*(usual[i * len(usual) // BENCH] for i in range(BENCH)), *detail(), *asked]


def science() -> list[Asked]:
    problems = [(scene, problem(scene)) for scene in itertools.islice(_scenes(4), 100)]
    return [Asked(seed=s.seed, prompt=turns(p, "QCM-LEA")[0], answer=p.letter, points=letter, room=112) for s, p in problems]


def probe(kind: str) -> list[Asked]:
    """The failure that LLaVA's paper shows: two things that are there, taken for one that is not.

    compound   a red star asked for where a red circle and a blue star stand     right: no
    absent     a green moon, where nothing is green and no moon stands            right: no
    present    a thing that is there                                              right: yes
    """
    asked: list[Asked] = []
    for scene in _scenes(5):
        names = _named(scene, kind)
        if names and all(_named(scene, other) for other in ("compound", "absent")):
            name = random.Random(scene.seed).choice(names)
            asked.append(Asked(seed=scene.seed, prompt=f"Is there {article(name)}?", answer="", points=begins_yes))
        if len(asked) == 200:
            return asked
    raise AssertionError("scenes never end")


def _named(scene: Scene, kind: str) -> list[str]:
    """What may be asked for about a scene."""
    there = [thing.name for thing in scene.things]
    colors, shapes = {thing.color for thing in scene.things}, {thing.shape for thing in scene.things}
    if kind == "present":
        return there
    mixed = [f"{color} {shape}" for color in COLORS for shape in SHAPES if (color in colors, shape in shapes) == (kind == "compound",) * 2]
    return [name for name in mixed if name not in there]


SETS: Mapping[str, Callable[[], list[Asked]]] = {
    "short": cache(short),
    "short-asked": cache(partial(short, f"\n{SHORT}")),
    "small": cache(small),
    "bench": cache(bench),
    "science": cache(science),
    **{kind: cache(partial(probe, kind)) for kind in ("compound", "absent", "present")},
}


def ask(model: Assistant, asked: Sequence[Asked], *, long_side: int | None, batch: int = 40) -> list[float]:
    """The points of every question; those with room for long answers apart from the short ones."""
    points = [0.0] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: asked[i].room)
    for room, group in itertools.groupby(order, key=lambda i: asked[i].room):
        for part in _batched(list(group), batch):
            talks = [Conversation.ask(asked[i].prompt, draw(make_scene(asked[i].seed), long_side=long_side)) for i in part]
            for i, reply in zip(part, model.reply_batch(talks, Sampling(max_new_tokens=room)), strict=True):
                points[i] = asked[i].points(asked[i], reply)
    return points


def fingerprint(asked: Sequence[Asked]) -> str:
    """Two runs may be compared if this is equal: the same scenes in the same order."""
    return hashlib.blake2b(repr([one.seed for one in asked]).encode(), digest_size=6).hexdigest()


def _batched(values: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (values[at : at + size] for at in range(0, len(values), size))


def _scenes(part: int) -> Iterator[Scene]:
    """Scenes of the test split, each set's own."""
    return (scene for scene in scenes("test", start=START["test"] + 2_000_000 * part) if scene.things)
