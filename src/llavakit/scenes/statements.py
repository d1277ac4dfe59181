"""What is true of a scene, in words.

``statements`` is the closed set of short true statements; anything of that form outside it is false, so a batch of pictures and
statements has an exact truth table (no false negatives in contrastive training). ``near_misses`` are false statements that keep the
scene's own words and swap one attribute between its things: they can only be told apart by binding shape, colour, size and place.
``captions`` are full sentences as people write under pictures, five wordings a scene.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from llavakit.scenes.world import COLORS, PLACES, SHAPES, SIZES, WORDS, Scene, Sign, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
ORDER = ("first", "second", "third", "fourth")
LETTERS = {"word": "letter", "number": "digit"}
SIDES = ("left of", "right of", "above", "below")


def where(place: str) -> str:
    """A place as an adverb: 'at the top left', 'in the middle'."""
    return f"in the {place}" if place == "middle" else f"on the {place}" if place in ("left", "right") else f"at the {place}"


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape: str, count: int) -> str:
    return shape if count == 1 else shape + ("es" if shape == "cross" else "s")


def side(a: Thing, b: Thing, scene: Scene) -> str | None:
    """Where ``a`` lies seen from ``b``, or None when the direction is not plain (spread in fractions of the long side)."""
    dx = (a.x - b.x) * scene.width / scene.long_side
    dy = (a.y - b.y) * scene.height / scene.long_side
    if abs(dx) > 0.12 and abs(dx) > 1.6 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 0.12 and abs(dy) > 1.6 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _of_thing(t: Thing) -> list[str]:
    at = where(t.place)
    return [
        article(t.name),
        f"{article(t.shape)} {at}",
        f"something {t.color} {at}",
        f"{article(t.name)} {at}",
        article(f"{t.size} {t.name}"),
        f"something {t.size} {at}",
        f"{article(f'{t.size} {t.name}')} {at}",
    ]


def _of_sign(s: Sign) -> list[str]:
    if s.type == "small":  # unreadable without high resolution; its place can be seen
        return [f"small print {where(s.place)}"]
    whole = [f"the {s.kind} {s.text}", f"the {s.kind} {s.text} {where(s.place)}", f"{article(s.kind)} {where(s.place)}"]
    return whole + [f"{order} {LETTERS[s.kind]} {letter}" for order, letter in zip(ORDER, s.text, strict=False)]


def _of_pairs(scene: Scene) -> list[str]:
    said = []
    for a in scene.things:
        for b in scene.things:
            direction = side(a, b, scene) if a is not b else None
            if direction:
                said.append(f"{article(a.name)} {direction} {article(b.name)}")
    said += [f"{article(scene.things[f].name)} in front of {article(scene.things[b].name)}" for b, f in scene.overlaps]
    return said


def _of_counts(scene: Scene) -> list[str]:
    shapes, colors = Counter(t.shape for t in scene.things), Counter(t.color for t in scene.things)
    said = [f"{NUMBERS[n]} {plural(shape, n)}" for shape, n in shapes.items()]
    said += [f"{NUMBERS[n]} {color} thing{'s' if n > 1 else ''}" for color, n in colors.items()]
    total = len(scene.things)
    return [*said, f"{NUMBERS[total]} thing{'s' if total > 1 else ''} in all"]


def statement_groups(scene: Scene) -> tuple[list[str], list[str], list[str], list[str]]:
    """True statements about things, signs, pairs and counts."""
    things = [words for t in scene.things for words in _of_thing(t)]
    signs = [words for s in scene.signs for words in _of_sign(s)]
    return things, signs, _of_pairs(scene), _of_counts(scene)


def statements(scene: Scene) -> frozenset[str]:
    """Every short true statement of a scene."""
    return frozenset(words for group in statement_groups(scene) for words in group)


def near_misses(scene: Scene, rng: random.Random, count: int, truth: frozenset[str]) -> list[str]:
    """``count`` false statements, each one attribute away from a true one (fewer when the scene allows fewer)."""
    wrong: list[str] = []
    for _ in range(4 * count):
        words = _twist(scene, rng)
        if words not in truth and words not in wrong:
            wrong.append(words)
        if len(wrong) == count:
            break
    return wrong


def _twist(scene: Scene, rng: random.Random) -> str:
    """One statement about the scene with one attribute taken from elsewhere; it may still be true."""
    choice = rng.random()
    if scene.signs and (choice < 0.45 or not scene.things):
        return rng.choice(_of_sign(_other_sign(rng.choice(scene.signs), rng)))
    if len(scene.things) > 1 and choice < 0.57:
        a, b = rng.sample(scene.things, 2)
        if scene.overlaps and rng.random() < 0.5:
            back, front = scene.overlaps[0]
            return f"{article(scene.things[back].name)} in front of {article(scene.things[front].name)}"
        return f"{article(a.name)} {rng.choice(SIDES)} {article(b.name)}"
    if choice < 0.65:
        return _wrong_count(scene, rng)
    thing = rng.choice(scene.things)
    other = rng.choice(scene.things) if rng.random() < 0.7 else None
    return rng.choice(_of_thing(_other_thing(thing, other, rng)))


def _other_thing(t: Thing, other: Thing | None, rng: random.Random) -> Thing:
    """``t`` with one attribute of ``other`` (or of no thing at all)."""
    field = rng.choice(("shape", "color", "size", "place"))
    values = {"shape": t.shape, "color": t.color, "size": t.size, "x": t.x, "y": t.y}
    if field == "place":
        x, y = (other.x, other.y) if other else _centre(rng.choice(PLACES))
        values |= {"x": x, "y": y}
    elif field == "size":
        values["size"] = SIZES[1 - SIZES.index(t.size)]
    else:
        pool: Sequence[str] = SHAPES if field == "shape" else COLORS
        values[field] = getattr(other, field) if other else rng.choice(pool)
    return Thing(**values, radius=t.radius, tilt=t.tilt)  # type: ignore[arg-type]


def _centre(place: str) -> tuple[float, float]:
    row, column = divmod(PLACES.index(place), 3)
    return (column + 0.5) / 3, (row + 0.5) / 3


def _other_sign(s: Sign, rng: random.Random) -> Sign:
    if rng.random() < 0.3:
        x, y = _centre(rng.choice(PLACES))
        return Sign(text=s.text, type=s.type, x=x, y=y)
    if s.kind == "word":
        text = rng.choice(WORDS)
    else:
        text = rng.choice((s.text[::-1], s.text[0] + str(rng.randrange(10)), str(rng.randrange(1, 10)) + s.text[1]))
    return Sign(text=text, type=s.type, x=s.x, y=s.y)


def _wrong_count(scene: Scene, rng: random.Random) -> str:
    n = rng.randrange(1, 6)
    kind = rng.random()
    thing = rng.choice(scene.things)
    if kind < 0.4:
        return f"{NUMBERS[n]} {plural(thing.shape, n)}"
    if kind < 0.8:
        return f"{NUMBERS[n]} {thing.color} thing{'s' if n > 1 else ''}"
    return f"{NUMBERS[n]} thing{'s' if n > 1 else ''} in all"


def captions(scene: Scene, rng: random.Random | None = None) -> list[str]:
    """Five captions, from brief to full, each true; orders and wordings vary with ``rng`` (default: the scene's seed)."""
    rng = rng or random.Random(scene.seed)
    full = [f"{article(f'{t.size} {t.name}')} {where(t.place)}" for t in scene.things]
    short = [article(t.name) for t in scene.things]
    placed = [f"{article(t.name)} {where(t.place)}" for t in scene.things]
    for words in (full, short, placed):
        rng.shuffle(words)
    signs = [f"the {s.kind} {s.text} {where(s.place)}" if s.type == "large" else f"small print {where(s.place)}" for s in scene.signs]
    pairs = _of_pairs(scene)
    total = len(scene.things)
    count = f"{NUMBERS[total]} thing{'s' if total > 1 else ''} in all: "
    return [
        _list(full + signs) + ".",
        _list(placed + signs) + ".",
        count + _list(short) + ".",
        "The picture shows " + _list(full + signs) + ".",
        (rng.choice(pairs) if pairs else _list(full)) + ".",
    ]


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
