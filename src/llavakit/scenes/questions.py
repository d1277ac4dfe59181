"""Questions about a scene with exactly one right answer, by type.

Each type is one function: scene -> all (question, answer) pairs that the scene allows. Answers are words or short phrases, so that
exact match is a fair score; ``CHANCE`` says what each type scores without sight.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from llavakit.scenes.statements import article, plural, side, where
from llavakit.scenes.world import COLORS, SHAPES, Scene


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one scene. ``kind`` is a key of ``KINDS``."""

    kind: str
    question: str
    answer: str


Pairs = Iterator[tuple[str, str]]


def _color(scene: Scene, rng: random.Random) -> Pairs:
    shapes = Counter(t.shape for t in scene.things)
    for t in scene.things:
        if shapes[t.shape] == 1:
            yield rng.choice((f"What color is the {t.shape}?", f"Which color does the {t.shape} have?")), t.color


def _shape(scene: Scene, rng: random.Random) -> Pairs:
    colors = Counter(t.color for t in scene.things)
    for t in scene.things:
        if colors[t.color] == 1:
            yield rng.choice((f"What shape is the {t.color} thing?", f"Which shape is {t.color}?")), t.shape


def _size(scene: Scene, rng: random.Random) -> Pairs:
    for t in scene.things:
        yield rng.choice((f"Is the {t.name} small or big?", f"How big is the {t.name}, small or big?")), t.size


def _place(scene: Scene, rng: random.Random) -> Pairs:
    for t in scene.things:
        yield rng.choice((f"Where is the {t.name}?", f"In which part of the picture is the {t.name}?")), t.place


def _what(scene: Scene, rng: random.Random) -> Pairs:
    taken = Counter([t.place for t in scene.things] + [s.place for s in scene.signs])
    for t in scene.things:
        if taken[t.place] == 1:
            yield rng.choice((f"What is {where(t.place)}?", f"What do you see {where(t.place)}?")), article(t.name)


def _count(scene: Scene, rng: random.Random) -> Pairs:
    shapes, colors = Counter(t.shape for t in scene.things), Counter(t.color for t in scene.things)
    yield "How many things are there?", str(len(scene.things))
    for shape in dict.fromkeys((*shapes, rng.choice(SHAPES))):  # no set: the order of strings in one differs from process to process
        yield f"How many {plural(shape, 2)} are there?", str(shapes[shape])
    for color in dict.fromkeys((*colors, rng.choice(COLORS))):
        yield f"How many {color} things are there?", str(colors[color])


def _exist(scene: Scene, rng: random.Random) -> Pairs:
    """Yes and no equally often; the false things are made of the scene's own shapes and colours where possible."""
    names = {t.name for t in scene.things}
    ask = ("Is there {}?", "Do you see {}?")
    for t in scene.things:
        yield rng.choice(ask).format(article(t.name)), "yes"
        mixed = [f"{a.color} {b.shape}" for a in scene.things for b in scene.things]
        near = [f"{t.color} {rng.choice(SHAPES)}", f"{rng.choice(COLORS)} {t.shape}"]
        wrong = [name for name in (*mixed, *near) if name not in names]
        if wrong:
            yield rng.choice(ask).format(article(rng.choice(wrong))), "no"


def _relation(scene: Scene, rng: random.Random) -> Pairs:
    answers = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
    for a in scene.things:
        for b in scene.things:
            direction = side(a, b, scene) if a is not b else None
            if direction:
                yield f"Is the {a.name} left, right, above or below, seen from the {b.name}?", answers[direction]


def _order(scene: Scene, rng: random.Random) -> Pairs:
    for back, front in scene.overlaps:
        names = [scene.things[back].name, scene.things[front].name]
        rng.shuffle(names)
        yield f"Which is in front, the {names[0]} or the {names[1]}?", f"the {scene.things[front].name}"


def _word(scene: Scene, rng: random.Random) -> Pairs:
    for s in scene.signs:
        if s.type == "large" and s.kind == "word":
            yield rng.choice(("What word is written?", "Which word do you read?")), s.text


def _number(scene: Scene, rng: random.Random) -> Pairs:
    for s in scene.signs:
        if s.type == "large" and s.kind == "number":
            yield rng.choice(("What number is written?", "Which number do you read?")), s.text


def _small(scene: Scene, rng: random.Random) -> Pairs:
    for s in scene.signs:
        if s.type == "small":
            yield "What does the small print say?", s.text


KINDS: dict[str, Callable[[Scene, random.Random], Pairs]] = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "place": _place,
    "what": _what,
    "count": _count,
    "exist": _exist,
    "relation": _relation,
    "order": _order,
    "word": _word,
    "number": _number,
    "small": _small,
}


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every question the scene allows, in the order of ``KINDS``."""
    return [Question(kind=kind, question=q, answer=a) for kind, ask in KINDS.items() for q, a in ask(scene, rng)]


def pick(scene: Scene, rng: random.Random, count: int, *, ask: Collection[str] = ()) -> list[Question]:
    """``count`` questions, the types as even as the scene allows, in random order; one of each type in ``ask`` first, if there is one."""
    pools: dict[str, list[Question]] = {}
    for question in questions(scene, rng):
        pools.setdefault(question.kind, []).append(question)
    for pool in pools.values():
        rng.shuffle(pool)
    chosen = [pools.pop(kind)[0] for kind in ask if kind in pools]
    while len(chosen) < count and pools:
        for kind in rng.sample(sorted(pools), len(pools)):
            chosen.append(pools[kind].pop())
            if not pools[kind]:
                del pools[kind]
    rng.shuffle(chosen := chosen[:count])
    return chosen
