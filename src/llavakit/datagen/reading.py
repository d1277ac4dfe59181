"""Contexts from files: one JSON object a line, COCO's captions with its instances, or a folder of drawn scenes.

    FILE.jsonl                        our own form, one picture a line (context.from_record)
    captions.json [instances.json]    COCO: images, annotations, categories; boxes in pixels become fractions
    FOLDER                            both of these COCO files, as ``llava scenes export`` writes them

A record that cannot be used is a DataError with file, place and id: what goes to a teacher is paid for, so nothing is guessed.
What is left out without harm is counted: boxes that hold nothing, boxes of pictures that the captions do not know.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.datagen.context import CROWD, Box, Context, checked, clean, from_record
from llavakit.errors import DataError
from llavakit.scenes.export import DESCRIPTION
from llavakit.types import IMAGE_MARKER

CAPTIONS, INSTANCES = "captions.json", "instances.json"


@dataclass(frozen=True, kw_only=True)
class Known:
    """Contexts in the order of their files, and what was left out, by name."""

    contexts: tuple[Context, ...]
    left_out: Mapping[str, int]
    drawn: bool = False  # by llava scenes export

    def lines(self) -> list[str]:
        return [f"left out: {count} {name}" for name, count in self.left_out.items() if count]


def read_contexts(path: Path, *, instances: Path | None = None) -> Known:
    """Whatever of the three forms ``path`` is, told by its content. Raises DataError."""
    if path.is_dir():
        boxes = instances or path / INSTANCES
        return read_coco(path / CAPTIONS, boxes if boxes.exists() or instances else None)
    if instances is not None or _is_coco(path):
        return read_coco(path, instances)
    return read_jsonl(path)


def read_jsonl(path: Path) -> Known:
    """One context a line; empty lines are passed over. An id may stand once."""
    contexts, empty = [], 0
    places: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        context, lost = from_record(_json(line, where), where=where)
        first = places.setdefault(context.id, number)
        if first != number:
            raise _bad(f"line {first} has this id too", f"{where} (id {context.id})", "give every picture an id of its own")
        contexts.append(context)
        empty += lost
    return _known(path, contexts, Counter({"boxes that hold nothing": empty}))


def read_coco(captions: Path, instances: Path | None = None) -> Known:
    """Every picture of the captions file, with its boxes from the other. Pictures without captions are left out and counted."""
    left_out: Counter[str] = Counter()
    told = _json(_text(captions), str(captions))
    pictures = _pictures(told, captions)
    said: dict[Any, list[str]] = {number: [] for number in pictures}
    for note, where in _notes(told, captions):
        if not isinstance(note.get("caption"), str):
            raise _bad("an annotation without a caption", where, "give the captions file first, the instances with --instances")
        if note["image_id"] not in said:
            raise _bad(f"no picture {note['image_id']!r} in this file", where, "add it to images, or remove the annotation")
        said[note["image_id"]].append(note["caption"])
    boxes = _boxes(instances, pictures, left_out) if instances is not None else {}
    contexts = []
    for number, picture in pictures.items():
        context = Context(_id(picture), picture["file_name"], tuple(clean(said[number])), tuple(boxes.get(number, ())))
        if not context.captions:
            left_out["pictures without a caption"] += 1
            continue
        contexts.append(checked(context, f"{captions} (id {context.id})"))
    info = told.get("info")
    return _known(captions, contexts, left_out, drawn=isinstance(info, Mapping) and info.get("description") == DESCRIPTION)


def read_asked(path: Path) -> list[tuple[Context, str]]:
    """Pictures with what people ask about them, one {"id", "image", "prompt"} a line. Raises DataError."""
    asked = []
    places: dict[str, int] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        record = _json(line, f"{path}:{number}")
        prompt = record.get("prompt") if isinstance(record, Mapping) else None
        where = f"{path}:{number}"
        if not isinstance(prompt, str) or not prompt.strip() or IMAGE_MARKER in prompt:
            raise _bad("no prompt that can be asked", where, f"write what a person says about the picture, without {IMAGE_MARKER}")
        context, _ = from_record({**record, "captions": ["(a picture)"], "instances": []}, where=where)
        if places.setdefault(context.id, number) != number:
            raise _bad(f"line {places[context.id]} has this id too", f"{where} (id {context.id})", "give every question an id of its own")
        asked.append((Context(context.id, context.image, ()), prompt.strip()))
    return asked


def has_prompts(path: Path) -> bool:
    """Is this a file of people's own questions?"""
    first = _first(path)
    return isinstance(first, Mapping) and "prompt" in first


def _boxes(path: Path, wanted: Mapping[Any, Mapping[str, Any]], left_out: Counter[str]) -> dict[Any, list[Box]]:
    """Boxes by picture: pixels [x, y, width, height] become clipped fractions; crowds say so."""
    told = _json(_text(path), str(path))
    pictures = _pictures(told, path) if told.get("images") else {}
    names = {c.get("id"): c.get("name") for c in told.get("categories") or () if isinstance(c, Mapping)}
    found: dict[Any, list[Box]] = {}
    for note, where in _notes(told, path):
        number, extent, name = note["image_id"], note.get("bbox"), names.get(note.get("category_id"))
        if number not in wanted:
            left_out["boxes of pictures that the captions do not know"] += 1
            continue
        if not isinstance(name, str):
            raise _bad(f"no category {note.get('category_id')!r}", where, "add it to categories")
        if not isinstance(extent, list) or len(extent) != 4 or not all(isinstance(value, int | float) for value in extent):
            raise _bad("a box without four numbers", where, "write [x, y, width, height] in pixels")
        width, height = _size(pictures.get(number) or wanted[number], where)
        x, y, across, down = extent
        crowd = CROWD if note.get("iscrowd") else ""
        box = Box.of(crowd + name, (x / width, y / height, (x + across) / width, (y + down) / height))
        if box is None:
            left_out["boxes that hold nothing"] += 1
        else:
            found.setdefault(number, []).append(box)
    return found


def _pictures(told: Any, path: Path) -> dict[Any, Mapping[str, Any]]:
    """The pictures of a COCO file by number."""
    images = told.get("images") if isinstance(told, Mapping) else None
    if not isinstance(images, list):
        raise _bad("no list of images", str(path), "this is no COCO file: it needs images and annotations")
    found: dict[Any, Mapping[str, Any]] = {}
    for place, image in enumerate(images):
        where = f"{path} images[{place}]"
        if not isinstance(image, Mapping) or not isinstance(image.get("id"), int | str) or not isinstance(image.get("file_name"), str):
            raise _bad("an image without id or file_name", where, "write both")
        if image["id"] in found:
            raise _bad("an id that an earlier image has", f"{where} (id {image['id']})", "give every picture an id of its own")
        found[image["id"]] = image
    return found


def _notes(told: Mapping[str, Any], path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    notes = told.get("annotations")
    if not isinstance(notes, list):
        raise _bad("no list of annotations", str(path), "this is no COCO file: it needs images and annotations")
    for place, note in enumerate(notes):
        where = f"{path} annotations[{place}]"
        if not isinstance(note, Mapping) or not isinstance(note.get("image_id"), int | str):
            raise _bad("an annotation without an image_id", where, "write it")
        yield note, f"{where} (id {note.get('id')}, picture {note['image_id']})"


def _size(picture: Mapping[str, Any], where: str) -> tuple[float, float]:
    width, height = picture.get("width"), picture.get("height")
    if not isinstance(width, int | float) or not isinstance(height, int | float) or width <= 0 or height <= 0:
        raise _bad("the picture's width and height are not known", where, "write them in images: boxes are given in pixels")
    return width, height


def _id(picture: Mapping[str, Any]) -> str:
    """The file's own name without folder and ending: COCO's padded number, a scene's seed."""
    return Path(picture["file_name"]).stem


def _is_coco(path: Path) -> bool:
    """One JSON object that has images in it; JSONL begins with an object that ends on its line."""
    first = _first(path)
    return "images" in first if isinstance(first, Mapping) else first == "{" and path.suffix.lower() == ".json"


def _first(path: Path) -> Any:
    """The value on a file's first line, or the line's first character where it is no whole value."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.readline().strip()
        return json.loads(head)
    except json.JSONDecodeError:
        return head[:1]
    except (OSError, UnicodeDecodeError):
        return ""  # the reader says what is wrong


def _known(path: Path, contexts: list[Context], left_out: Counter[str], *, drawn: bool = False) -> Known:
    if not contexts:
        raise _bad("no picture", str(path), "the file is empty")
    counts = Counter(context.id for context in contexts)
    name, times = counts.most_common(1)[0]
    if times > 1:
        raise _bad(f"{times} pictures whose files are called {name}", str(path), "rename them: ids come from the files' names")
    return Known(contexts=tuple(contexts), left_out=dict(left_out), drawn=drawn)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError("no such file", code="bad_file", where=str(path), remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", code="bad_file", where=str(path), remedy="save the file as UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DataError(f"no JSON: {error.msg} ({place})", code="bad_json", where=where, remedy="write one JSON object") from error


def _bad(what: str, where: str, remedy: str) -> DataError:
    return DataError(what, code="bad_context", where=where, remedy=remedy)
