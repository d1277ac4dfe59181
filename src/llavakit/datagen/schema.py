"""Replies as JSON of a wished form: a small part of JSON Schema, enough to describe what is asked about a picture.

    type (object array string integer number boolean null, or a list of them)  properties  required  additionalProperties (true, false)
    items  minItems  maxItems  enum        and, for the reader alone: title  description  $schema

A schema that says more is refused when it is read: a rule that nobody checks is worse than none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavakit.datagen.parse import Reject
from llavakit.errors import ConfigError

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "null": (type(None),),
}  # fmt: skip
_WORDS = {
    "type",
    "properties",
    "required",
    "additionalProperties",
    "items",
    "minItems",
    "maxItems",
    "enum",
    "title",
    "description",
    "$schema",
}
_SHAPES: Mapping[str, type] = {
    "properties": dict,
    "required": list,
    "enum": list,
    "additionalProperties": bool,
    "minItems": int,
    "maxItems": int,
}
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)


def load(path: Path) -> Mapping[str, Any]:
    """The schema in a file. Raises ConfigError for what cannot be read or would not be checked."""
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _bad("no such file", str(path), "give a file with a JSON schema") from error
    except ValueError as error:
        raise _bad("the schema is no JSON", str(path), "write one JSON object") from error
    _look(schema, str(path))
    return dict(schema)


def read(text: str, schema: Mapping[str, Any]) -> Any | Reject:
    """The value that a reply holds: bare JSON, or JSON in one fence. A Reject where there is none, or another than wished for."""
    fenced = _FENCE.findall(text)
    body = fenced[0] if len(fenced) == 1 else text
    try:
        value = json.loads(body.strip(), parse_constant=_no_number)
    except ValueError as error:
        return Reject("no_json", str(error)[:120])
    except RecursionError:
        return Reject("no_json", "nested too deeply")
    wrong = fault(value, schema)
    return Reject("wrong_json", wrong) if wrong else value


def fault(value: Any, schema: Mapping[str, Any], where: str = "it") -> str | None:
    """What is wrong with a value, or None."""
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{where} is no {' or '.join(kinds)}"
    if "enum" in schema and not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in schema["enum"]):
        return f"{where} is none of the choices"
    if isinstance(value, dict):
        return _object_fault(value, schema, where)
    if isinstance(value, list):
        if len(value) < schema.get("minItems", 0) or len(value) > schema.get("maxItems", len(value)):
            return f"{where} has {len(value)} items"
        found = (fault(item, schema.get("items", {}), f"{where}[{number}]") for number, item in enumerate(value))
        return next((wrong for wrong in found if wrong), None)
    return None


def _object_fault(value: dict[str, Any], schema: Mapping[str, Any], where: str) -> str | None:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{where} has no {name!r}"
    for name, held in value.items():
        if name in properties:
            if wrong := fault(held, properties[name], f"{where}.{name}"):
                return wrong
        elif schema.get("additionalProperties", True) is False:
            return f"{where} has a {name!r} that nobody asked for"
    return None


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _look(schema: Any, where: str) -> None:
    """Raises ConfigError where a schema says what is not checked here."""
    if not isinstance(schema, Mapping):
        raise _bad("a schema that is no object", where, "write {...}")
    unknown = sorted(set(schema) - _WORDS)
    if unknown:
        raise _bad(f"{unknown[0]!r} is not checked here", where, f"leave it out; what can be said is {', '.join(sorted(_WORDS))}")
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not set(kinds) <= set(_TYPES):
        raise _bad("an unknown type", where, f"use {', '.join(_TYPES)}")
    for name, shape in _SHAPES.items():
        if name in schema and (not isinstance(schema[name], shape) or (shape is int and isinstance(schema[name], bool))):
            raise _bad(f"{name!r} has not the form it must have", where, "look it up in JSON Schema")
    for name, inner in schema.get("properties", {}).items():
        _look(inner, f"{where} {name}")
    if "items" in schema:
        _look(schema["items"], f"{where} items")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _bad(what: str, where: str, remedy: str) -> ConfigError:
    return ConfigError(what, code="bad_schema", where=where, remedy=remedy)
