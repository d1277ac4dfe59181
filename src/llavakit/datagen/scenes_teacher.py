"""A teacher without a key: it knows the truth of drawn scenes and says it in the form that every teacher is asked for.

It is asked like any other, with the picture beside the context, and finds the scene by the picture's name (its seed). What it is told must
be that scene's captions: a photograph that happens to be called 00000017.jpg is refused, not described.

    conversation    several questions with one right answer each, mostly with a description before or after them
    detail          everything on the picture, how much of it, and what lies where
    reasoning       a question about what would be if; the answer counts it through
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from llavakit.datagen.context import Box, Context
from llavakit.datagen.kinds import KINDS, Prompts
from llavakit.datagen.parse import Kind, Turns, write
from llavakit.errors import RefusedError
from llavakit.scenes.draw import box
from llavakit.scenes.export import image_name
from llavakit.scenes.questions import pick
from llavakit.scenes.statements import NUMBERS, article, captions, plural, side, where
from llavakit.scenes.world import Scene, make_scene
from llavakit.types import Conversation, Sampling

DETAILED = (
    "What is this?", "Describe the picture.", "What do you see?", "Describe the image in detail.", "What is in this picture?",
)  # fmt: skip
DESCRIBED = 0.8  # usual share of conversations with a description: it names everything, so it teaches most
DESCRIBED_FIRST = 0.25  # share of these that begin with it; questions asked after it could be answered from its words, without sight


@dataclass(frozen=True)
class Drawn:
    """A scene and what is told about it."""

    scene: Scene
    context: Context

    @staticmethod
    def of(scene: Scene) -> Drawn:
        """With the captions and boxes that ``scenes.export`` writes into COCO files."""
        boxes = []
        for thing in scene.things:
            x0, y0, x1, y1 = box(thing, scene)
            boxes.append(Box.of(thing.shape, (x0 / scene.width, y0 / scene.height, x1 / scene.width, y1 / scene.height)))
        seen = tuple(found for found in boxes if found is not None)
        return Drawn(scene, Context(f"{scene.seed:08d}", image_name(scene), tuple(captions(scene)), seen))


def by_seed(name: str) -> Drawn:
    """The scene whose seed is the picture's name. Raises RefusedError."""
    stem = Path(name).stem
    if not stem.isdecimal():
        raise _refused(name)
    scene = make_scene(int(stem))
    if not scene.things:
        raise _refused(name)
    return Drawn.of(scene)


class ScenesTeacher:
    """Answers about drawn scenes. ``turns`` and ``described`` shape conversations; types in ``ask`` are never left out of them."""

    name = "scenes"

    def __init__(
        self,
        prompts: Prompts,
        find: Callable[[str], Drawn] = by_seed,
        *,
        turns: int = 8,
        ask: Collection[str] = (),
        described: float = DESCRIBED,
    ) -> None:
        self._kinds: dict[str, Kind] = {prompts.of(kind).system: kind for kind in KINDS}
        self._find, self._turns, self._ask, self._described = find, turns, ask, described

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        """The reply in one piece. Raises RefusedError where the question is not about a drawn scene."""
        kind = self._kinds.get(conversation.system or "")
        source = conversation.images[-1].source if conversation.images else None
        if kind is None or not isinstance(source, Path):
            raise RefusedError(
                "this teacher answers the three kinds, about a picture that it is shown",
                code="not_a_scene",
                remedy="ask another teacher: --teacher URL",
            )
        drawn = self._find(source.name)
        if not conversation.turns[-1].text.strip().startswith("\n".join(drawn.context.captions)):
            raise _refused(source.name)
        return iter((self._say(kind, drawn.scene),))

    def _say(self, kind: Kind, scene: Scene) -> str:
        if kind == "conversation":
            return write(self.talk(scene))
        return describe(scene) if kind == "detail" else write((reason(scene),))

    def talk(self, scene: Scene) -> Turns:
        """Questions of as many types as the scene allows, with a description before or after them."""
        rng = random.Random(scene.seed + 2)
        pairs = [(q.question, q.answer) for q in pick(scene, rng, self._turns, ask=self._ask)]
        if rng.random() < self._described:
            pairs.insert(0 if rng.random() < DESCRIBED_FIRST else len(pairs), (rng.choice(DETAILED), captions(scene, rng)[3]))
        return tuple(pairs)


def describe(scene: Scene) -> str:
    """Everything on the picture, counted and set in relation."""
    rng = random.Random(scene.seed + 4)
    said = [captions(scene, rng)[3]]
    total = len(scene.things)
    shapes = Counter(thing.shape for thing in scene.things)
    kinds = _list([f"{NUMBERS[n]} {plural(shape, n)}" for shape, n in shapes.items()])
    said.append(f"There {'is' if total == 1 else 'are'} {NUMBERS[total]} thing{'s' if total > 1 else ''} in all: {kinds}.")
    for a, b in zip(scene.things, scene.things[1:], strict=False):
        direction = side(a, b, scene)
        if direction:
            said.append(f"The {a.name} is {direction} the {b.name}.")
    said += [f"The {scene.things[front].name} lies in front of the {scene.things[back].name}." for back, front in scene.overlaps]
    said += [f"The {s.kind} {where(s.place)} reads {s.text}." for s in scene.signs if s.type == "large"]
    return " ".join(said)


def reason(scene: Scene) -> tuple[str, str]:
    """A question about what would be if, and its answer step by step."""
    rng = random.Random(scene.seed + 5)
    total = len(scene.things)
    things = _list([article(f"{t.size} {t.name}") for t in scene.things])
    seen = f"The picture shows {NUMBERS[total]} thing{'s' if total > 1 else ''}: {things}."
    if rng.random() < 0.5:
        color = rng.choice(sorted({thing.color for thing in scene.things}))
        gone = [thing.name for thing in scene.things if thing.color == color]
        left = [thing.name for thing in scene.things if thing.color != color]
        rest = f"{NUMBERS[len(left)]} would be left: {_list([f'the {name}' for name in left])}." if left else "nothing would be left."
        taken = f"Of these, {_list([f'the {name}' for name in gone])} {'is' if len(gone) == 1 else 'are'} {color}."
        return f"How many things would be left if everything {color} were taken away?", f"{seen} {taken} Without that, {rest}"
    big = sum(thing.size == "big" for thing in scene.things)
    small = total - big
    verdict = "as many big as small things" if big == small else f"more {'big' if big > small else 'small'} things"
    answer = f"{seen} {_of(big).capitalize()} of them {'is' if big == 1 else 'are'} big and {_of(small)}"
    return "Are there more big things or more small things?", f"{answer} {'is' if small == 1 else 'are'} small, so there are {verdict}."


def _of(number: int) -> str:
    return NUMBERS[number] if number else "none"


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _refused(name: str) -> RefusedError:
    return RefusedError(
        "the built-in teacher knows drawn scenes only, and this picture is none",
        code="not_a_scene",
        where=name,
        remedy="ask another teacher (--teacher URL), or give a folder of llava scenes export",
    )
