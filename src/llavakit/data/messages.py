"""The two ways to write a conversation down, and the way from one to the other without loss (spec 4.5; ``messages`` is TRL's and HF's).

    LLaVA      {"id", "image": "a.png" | [...], "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...]}
    messages   {"id", "image": "a.png", or "images": [...],
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\\nWhat?"}]}, ...]}

A marker of LLaVA's is an image part in its place and the reverse; every other key travels as it is. Only one thing has no place in LLaVA's
format: a user's text that spells the marker, which is refused. Where messages say the same in several ways (a string for one text part,
texts divided or empty, pictures before a string) ``normal`` is the one they become.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llavakit.errors import DataError
from llavakit.types import IMAGE_MARKER, Conversation, Image, Message, Text

Record = Mapping[str, Any]
Content = list[dict[str, Any]]
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_FROM = {role: name for name, role in _ROLES.items()}
_IMAGE = {"type": "image"}


def is_messages(record: Record) -> bool:
    """Whether a record is written as messages rather than as LLaVA's."""
    return "messages" in record and "conversations" not in record


def to_messages(record: Record) -> dict[str, Any]:
    """A LLaVA record as messages. Raises DataError: no_turns, bad_record, unknown_role."""
    _only_one(record)
    told = []
    for where, turn in _turns(record, "conversations", "from"):
        value = turn.get("value")
        if not isinstance(value, str):
            raise DataError("a turn without text in 'value'", code="bad_record", where=where, remedy="add it")
        pieces = value.split(IMAGE_MARKER) if turn["from"] == "human" else [value]  # a reply's marker is text
        content = [part for words in pieces for part in (_IMAGE, {"type": "text", "text": words})][1:]
        told.append(_without(turn, "from", "value") | {"role": _role(_ROLES, turn["from"], where), "content": _merged(content)})
    key = "images" if isinstance(record.get("image"), list) else "image"
    return {key if name == "image" else name: value for name, value in _without(record, "conversations").items()} | {"messages": told}


def to_llava(record: Record) -> dict[str, Any]:
    """A record of messages as LLaVA's. Raises what ``normal`` raises, and DataError ``marker_in_text``."""
    _only_one(record)
    record = normal(record)
    told = []
    for where, message in _turns(record, "messages", "role"):
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if message["role"] == "user" and any(IMAGE_MARKER in text for text in texts):
            what = f"text that spells {IMAGE_MARKER} cannot be written in LLaVA's format"
            raise DataError(what, code="marker_in_text", where=where, remedy="reword it, or keep it as messages")
        value = "".join(IMAGE_MARKER if part["type"] == "image" else part["text"] for part in message["content"])
        told.append(_without(message, "role", "content") | {"from": _role(_FROM, message["role"], where), "value": value})
    return {"image" if name == "images" else name: value for name, value in _without(record, "messages").items()} | {"conversations": told}


def normal(record: Record) -> dict[str, Any]:
    """Messages in the one form of many: content as parts, pictures in their places and in reading order, neighbouring texts one.

    Raises DataError: no_turns, bad_record, unknown_role, bad_content, image_count.
    """
    names, order, told = pictures(record), list[Any](), []
    waiting = iter(names)
    messages = _turns(record, "messages", "role")
    before = names if names and not any(_has_image(message.get("content")) for _, message in messages) else []
    for where, message in messages:
        content = message.get("content")
        parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if before and message["role"] == "user" and isinstance(content, str):
            # pictures without a place stand before the first user's words (TRL), on a line of their own as in all of LLaVA's data
            parts, before = [*({"type": "image"} for _ in before), {"type": "text", "text": f"\n{content}"}], []
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise DataError("content is neither text nor a list of parts", code="bad_content", where=where, remedy="write one of them")
        told.append(dict(message) | {"content": _merged([_part(part, names, waiting, order, where) for part in parts])})
        _role(_FROM, message["role"], where)
    if names and len(order) != len(names):
        what = f"{len(order)} image parts but {len(names)} images"
        raise DataError(what, code="image_count", remedy='write one {"type": "image"} for each image')
    if not order:
        return dict(record) | {"messages": told}
    held = {"image": order[0]} if len(order) == 1 and not isinstance(record.get("image"), list | None) else {"images": order}
    return _without(record, "image", "images", "messages") | held | {"messages": told}


def pictures(record: Record) -> list[Any]:
    """What stands in a record's ``image`` or ``images``, as a list."""
    value = record.get("image", record.get("images"))
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def conversation(record: Record, images: Iterable[Image]) -> Conversation:
    """The conversation of a record in ``normal`` form, with its pictures in order. Raises PromptError."""
    queue = iter(images)

    def parts(content: Content) -> tuple[Text | Image, ...]:
        return tuple(Text(part["text"]) if part["type"] == "text" else next(queue) for part in content)

    return Conversation(tuple(Message(message["role"], parts(message["content"])) for message in record["messages"]))


def _only_one(record: Record) -> None:
    if "messages" in record and "conversations" in record:
        raise DataError("'messages' and 'conversations' in one record", code="bad_record", remedy="remove one")


def _turns(record: Record, key: str, role: str) -> list[tuple[str, Record]]:
    """Each turn with its place, each an object that names its role."""
    value = record.get(key)
    if not isinstance(value, list) or not value:
        raise DataError("no conversation", code="no_turns", remedy=f'write "{key}": [{{"{role}": ...}}, ...]')
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(role), str):
            raise DataError(f"a turn without text in '{role}'", code="bad_record", where=f"{key}[{index}]", remedy="add it")
    return [(f"{key}[{index}]", turn) for index, turn in enumerate(value)]


def _role(names: Mapping[str, str], role: str, where: str) -> str:
    if role not in names:
        raise DataError(f"unknown role {role!r}", code="unknown_role", where=where, remedy=f"use one of {sorted(names)}")
    return names[role]


def _part(part: Record, names: list[Any], waiting: Any, order: list[Any], where: str) -> dict[str, Any]:
    """One part in normal form; a picture's name goes to ``order``. Columns of tables give every part every key, most of them null."""
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        given, index = part.get("image", part.get("path")), part.get("index")
        if given is None and isinstance(index, int):
            given = names[index] if 0 <= index < len(names) else None
        elif given is None:
            given = next(waiting, None)
        if given is None:
            what = f"an image part too many for {len(names)} images"
            raise DataError(what, code="image_count", where=where, remedy="name each in 'images', in order")
        order.append(given)
        return _IMAGE
    if kind == "image_url" and isinstance(part.get("image_url"), Mapping):
        order.append(part["image_url"].get("url"))
        return _IMAGE
    raise DataError(f"a part of type {kind!r}", code="bad_content", where=where, remedy="use text and image")


def _has_image(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(part, Mapping) and part.get("type") in ("image", "image_url") for part in content)


def _merged(parts: Iterable[dict[str, Any]]) -> Content:
    """Neighbouring texts as one, none of them empty."""
    merged: Content = []
    for part in parts:
        if part["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        elif part != {"type": "text", "text": ""}:
            merged.append(dict(part))
    return merged


def _without(record: Record, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}
