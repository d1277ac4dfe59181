"""What is known of a picture, as a teacher who cannot see it reads it (spec 5.1).

    A dog is asleep on a porch.            captions, one a line
    Brown dog lying by a door.
                                           a blank line
    dog: [0.120, 0.540, 0.480, 0.910]      boxes: category: [x1, y1, x2, y2]

    (0,0) ---- x ---->
      |   (x1,y1)-----+
      y      |        |
      v      +-----(x2,y2)

x and y are fractions of width and height, rounded to three decimals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.types import IMAGE_MARKER

DECIMALS = 3
CROWD = "group of "  # said before the category of a box that COCO drew around many


@dataclass(frozen=True, slots=True)
class Box:
    """One object's place in fractions of the picture, clipped to it."""

    category: str
    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def line(self) -> str:
        return f"{self.category}: [{self.x1:.3f}, {self.y1:.3f}, {self.x2:.3f}, {self.y2:.3f}]"

    @staticmethod
    def of(category: str, corners: Iterable[float]) -> Box | None:
        """Rounded and clipped to 0..1; None where nothing is left (NaN included): no width, no height, or outside the picture."""
        x1, y1, x2, y2 = (abs(round(min(max(value, 0.0), 1.0), DECIMALS)) if value == value else 0.0 for value in corners)
        return Box(category, x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


@dataclass(frozen=True, slots=True)
class Context:
    """One picture in words: its file's name, and what people said and drew about it."""

    id: str
    image: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()

    def text(self, *, boxes: bool) -> str:
        """The lines of the module's drawing; without ``boxes`` the captions alone."""
        said = "\n".join(self.captions)
        drawn = "\n".join(box.line for box in self.boxes) if boxes else ""
        return "\n\n".join(part for part in (said, drawn) if part)

    def words(self) -> str:
        """All that is known, for looking words up: captions and categories."""
        return " ".join((*self.captions, *(box.category for box in self.boxes)))


def from_record(record: Any, *, where: str) -> tuple[Context, int]:
    """A context from one line of our JSONL (docs/generate.md), and how many of its boxes hold nothing. Raises DataError.

    {"id": "17", "image": "17.jpg", "captions": ["..."], "instances": [{"category": "dog", "bbox": [x1, y1, x2, y2]}]}
    """
    if not isinstance(record, Mapping):
        raise _bad("no JSON object", where, 'write {"id": ..., "image": ..., "captions": [...]}')
    name, image = record.get("id"), record.get("image")
    where = f"{where} (id {name})" if isinstance(name, str | int) and name != "" else where
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise _bad("no id", where, "give every picture an id of its own")
    if not isinstance(image, str) or not image:
        raise _bad("no image", where, "name the picture's file")
    captions = record.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise _bad("the captions are no list of texts", where, 'write "captions": ["..."]')
    instances = record.get("instances", [])
    if not isinstance(instances, list):
        raise _bad("the instances are no list", where, 'write "instances": [{"category": "dog", "bbox": [x1, y1, x2, y2]}]')
    boxes = [_box(instance, f"{where} instances[{number}]") for number, instance in enumerate(instances)]
    context = Context(str(name), image, tuple(clean(captions)), tuple(box for box in boxes if box is not None))
    return checked(context, where), boxes.count(None)


def checked(context: Context, where: str) -> Context:
    """The context itself. Raises DataError where there is nothing to tell a teacher, or where a caption would be read as a picture."""
    if not context.captions and not context.boxes:
        raise _bad("neither captions nor boxes", where, "give at least one of them")
    if Path(context.image).is_absolute() or ".." in Path(context.image).parts:
        raise _bad(f"the image {context.image!r} may lie outside the folder of pictures", where, "name it from that folder")
    if IMAGE_MARKER in context.words():
        raise _bad(f"a caption or category spells {IMAGE_MARKER}", where, "reword it: in training files that is a picture")
    return context


def clean(captions: Iterable[str]) -> list[str]:
    """Captions as single lines without empty ones: a line is the unit of the teacher's text."""
    lines = (" ".join(caption.split()) for caption in captions)
    return [line for line in lines if line]


def _box(instance: Any, where: str) -> Box | None:
    category, corners = (instance.get("category"), instance.get("bbox")) if isinstance(instance, Mapping) else (None, None)
    if not isinstance(category, str) or not category.strip():
        raise _bad("a box without a category", where, "name what it holds")
    if not isinstance(corners, list) or len(corners) != 4 or not all(_is_number(value) for value in corners):
        raise _bad("a box without four numbers", where, "write [x1, y1, x2, y2]")
    if max(corners) > 1.5:  # a box may hang over the edge a little, but not that far
        raise _bad("a box in pixels", where, "divide by width and height, or give COCO files, which say how large a picture is")
    return Box.of(" ".join(category.split()), corners)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _bad(what: str, where: str, remedy: str) -> DataError:
    return DataError(what, code="bad_context", where=where, remedy=remedy)
