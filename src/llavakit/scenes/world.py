"""The drawn world: things and signs on a picture, chosen from a seed.

A scene is symbolic first (which shape, colour, size and place) and geometric second (centre, radius). The picture is divided
into nine places; x and y are fractions of width and height, radii are fractions of the long side:

      0        1/3       2/3        1
    0 +---------+---------+---------+
      | top left|   top   |top right|      a thing's place is the cell that holds its centre,
    1/3---------+---------+---------+      and centres keep away from the lines
      |  left   | middle  |  right  |
    2/3---------+---------+---------+      things later in the tuple lie in front of earlier ones
      | bottom  |  bottom | bottom  |
      |  left   |         |  right  |
    1 +---------+---------+---------+

No two things of a scene share both shape and colour, so "the red star" always means one thing. The split of a scene is a function
of its symbolic content alone (``Scene.key``): a training scene and a test scene can never be the same scene.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

Split = Literal["train", "test"]

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
SOLID = ("circle", "square", "triangle", "star", "heart", "cross")  # without holes: what lies in front is plain to see
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "big")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
WORDS = (
    "ant", "bag", "box", "bus", "cat", "cup", "dog", "egg", "fox", "hat", "ink", "jar",
    "key", "lip", "map", "net", "owl", "pen", "pot", "rug", "sun", "van", "web", "zoo",
)  # fmt: skip
ASPECTS = ((1, 1), (1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2))
LONG_SIDES = (224, 280, 336)  # pixels
TEST_SHARE = 20  # one scene in twenty belongs to the test split

RADIUS = {"small": (0.068, 0.082), "big": (0.125, 0.150)}  # of the long side
LETTER = {"large": 0.22, "small": 0.030}  # height of the type, of the long side


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One coloured shape. ``x, y`` in 0..1 of the picture, ``radius`` in 0..1 of its long side, ``tilt`` in degrees."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    tilt: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Printed text on a plate: a word or a number, in large or small type."""

    text: str
    type: Literal["large", "small"]
    x: float
    y: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)

    @property
    def kind(self) -> str:
        return "number" if self.text.isdigit() else "word"

    def half_extent(self) -> tuple[float, float]:
        """Half width and half height of the plate, in fractions of the long side."""
        height = LETTER[self.type]
        return height * (0.38 * len(self.text) + 0.28), height * 0.62


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's truth. ``overlaps`` lists pairs (back, front) of indices of ``things`` that lie over one another."""

    seed: int
    width: int
    height: int
    background: int
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    overlaps: tuple[tuple[int, int], ...]

    @property
    def long_side(self) -> int:
        return max(self.width, self.height)

    @property
    def key(self) -> str:
        """The symbolic content: what stands where, without pixels, jitter or background."""
        things = sorted(f"{t.size} {t.color} {t.shape} @ {t.place}" for t in self.things)
        signs = sorted(f"{s.type} {s.text} @ {s.place}" for s in self.signs)
        order = sorted(f"{self.things[b].name} < {self.things[f].name}" for b, f in self.overlaps)
        return "; ".join((*things, *signs, *order))

    @property
    def split(self) -> Split:
        """Train or test, decided by the hash of the content: equal scenes are always on the same side."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return "test" if int.from_bytes(digest[:4], "big") % TEST_SHARE == 0 else "train"


def place_of(x: float, y: float) -> str:
    return PLACES[3 * min(int(3 * y), 2) + min(int(3 * x), 2)]


def make_scene(seed: int) -> Scene:
    """The scene of a seed: the same on every machine."""
    rng = random.Random(seed)
    across, down = rng.choice(ASPECTS)
    long_side = rng.choice(LONG_SIDES)
    width = long_side * across // max(across, down)
    height = long_side * down // max(across, down)
    room = _Room(width / long_side, height / long_side)
    signs = _place_signs(rng, room)
    wanted = rng.choice((1, 2, 3, 3, 4, 4, 5, 5)) if not signs else rng.choice((1, 2, 2, 3))
    things: list[Thing] = []
    overlaps: tuple[tuple[int, int], ...] = ()
    if wanted >= 2 and rng.random() < 0.4:
        things, overlaps = _place_pair(rng, room)
    kinds = _kinds(rng, wanted, taken=[(t.shape, t.color) for t in things])
    for shape, color in kinds[len(things) :]:
        thing = _place_thing(rng, room, shape, color)
        if thing is not None:
            things.append(thing)
    return Scene(
        seed=seed, width=width, height=height, background=rng.randrange(1 << 30), things=tuple(things), signs=signs, overlaps=overlaps
    )


def scenes(split: Split, *, start: int = 0) -> Iterator[Scene]:
    """The scenes of a split by rising seed from ``start``, without end."""
    seed = start
    while True:
        scene = make_scene(seed)
        seed += 1
        if scene.split == split and scene.things:
            yield scene


class _Room:
    """The boxes already taken, in fractions of the long side, so that nothing overlaps by accident."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.boxes: list[tuple[float, float, float, float]] = []

    def fits(self, x: float, y: float, half_w: float, half_h: float, *, gap: float = 0.015) -> bool:
        """``x, y`` in 0..1 of the picture; the box must lie inside and away from the others."""
        box = self._box(x, y, half_w, half_h)
        left, top, right, bottom = box
        if left < 0.01 or top < 0.01 or right > self.width - 0.01 or bottom > self.height - 0.01:
            return False
        return all(right + gap < b[0] or left - gap > b[2] or bottom + gap < b[1] or top - gap > b[3] for b in self.boxes)

    def take(self, x: float, y: float, half_w: float, half_h: float) -> None:
        self.boxes.append(self._box(x, y, half_w, half_h))

    def _box(self, x: float, y: float, half_w: float, half_h: float) -> tuple[float, float, float, float]:
        cx, cy = x * self.width, y * self.height
        return cx - half_w, cy - half_h, cx + half_w, cy + half_h


def _spot(rng: random.Random, *, jitter: float = 0.085) -> tuple[float, float]:
    """A point near the centre of a random place, never close to a line between places."""
    column, row = rng.randrange(3), rng.randrange(3)
    return (column + 0.5) / 3 + rng.uniform(-jitter, jitter), (row + 0.5) / 3 + rng.uniform(-jitter, jitter)


def _clear(x: float, y: float, *, margin: float = 0.04) -> bool:
    """Is a point at least ``margin`` away from the lines between places?"""
    return all(abs(value - line) >= margin for value in (x, y) for line in (1 / 3, 2 / 3))


def _kinds(rng: random.Random, count: int, *, taken: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """``count`` different (shape, colour) pairs that often share a shape or a colour, so that counting and binding matter."""
    kinds = list(taken)
    while len(kinds) < count:
        shape, color = rng.choice(SHAPES), rng.choice(COLORS)
        if kinds and rng.random() < 0.45:
            shape = rng.choice(kinds)[0]
        elif kinds and rng.random() < 0.35:
            color = rng.choice(kinds)[1]
        if (shape, color) not in kinds:
            kinds.append((shape, color))
    return kinds


def _place_thing(rng: random.Random, room: _Room, shape: str, color: str, *, size: str | None = None) -> Thing | None:
    """A thing on a free spot, or None when the picture is full."""
    for attempt in range(60):
        kind = size or (rng.choice(SIZES) if attempt < 40 else "small")
        radius = rng.uniform(*RADIUS[kind])
        x, y = _spot(rng)
        if room.fits(x, y, radius, radius):
            room.take(x, y, radius, radius)
            return Thing(shape=shape, color=color, size=kind, x=x, y=y, radius=radius, tilt=rng.uniform(-14, 14))
    return None


def _place_pair(rng: random.Random, room: _Room) -> tuple[list[Thing], tuple[tuple[int, int], ...]]:
    """Two big things of different colours, the second partly over the first."""
    shape_a, shape_b = rng.choice(SOLID), rng.choice(SOLID)
    color_a, color_b = rng.choice(COLORS), rng.choice(COLORS)
    if color_a == color_b:
        color_b = rng.choice([c for c in COLORS if c != color_a])
    for _ in range(60):
        x, y = _spot(rng)
        ra, rb = rng.uniform(*RADIUS["big"]), rng.uniform(*RADIUS["big"])
        reach = (ra + rb) * rng.uniform(0.46, 0.58)
        dx, dy = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1), (0.71, 0.71), (-0.71, 0.71), (0.71, -0.71), (-0.71, -0.71)))
        x2, y2 = x + dx * reach / room.width, y + dy * reach / room.height
        if _clear(x2, y2) and room.fits(x, y, ra, ra) and room.fits(x2, y2, rb, rb):
            room.take(x, y, ra, ra)
            room.take(x2, y2, rb, rb)
            back = Thing(shape=shape_a, color=color_a, size="big", x=x, y=y, radius=ra, tilt=rng.uniform(-14, 14))
            front = Thing(shape=shape_b, color=color_b, size="big", x=x2, y=y2, radius=rb, tilt=rng.uniform(-14, 14))
            return [back, front], ((0, 1),)
    return [], ()


def _place_signs(rng: random.Random, room: _Room) -> tuple[Sign, ...]:
    """At most one sign in large type and one in small type."""
    signs = []
    for kind, chance in (("large", 0.45), ("small", 0.25)):
        if rng.random() < chance:
            signs.append(_place_sign(rng, room, kind))  # type: ignore[arg-type]  # literals above
    return tuple(sign for sign in signs if sign is not None)


def _place_sign(rng: random.Random, room: _Room, kind: Literal["large", "small"]) -> Sign | None:
    text = rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randrange(10, 100))
    for _ in range(40):
        x, y = _spot(rng, jitter=0.10)
        sign = Sign(text=text, type=kind, x=x, y=y)
        if room.fits(x, y, *sign.half_extent()):
            room.take(x, y, *sign.half_extent())
            return sign
    return None


def with_small_print(scene: Scene, rng: random.Random, count: int) -> Scene:
    """The scene's things with up to ``count`` signs in small type instead of its own."""
    room = _Room(scene.width / scene.long_side, scene.height / scene.long_side)
    for thing in scene.things:
        room.take(thing.x, thing.y, thing.radius, thing.radius)
    signs = (_place_sign(rng, room, "small") for _ in range(count))
    return replace(scene, signs=tuple(sign for sign in signs if sign is not None))
