"""Settings as values: a frozen dataclass, a YAML file and ``key=value`` words are three spellings of one thing.

    base value  <-  file.yaml  <-  key=value ...   ->   one frozen value   ->   config.yaml, the echo that reruns it

The type of a field says how its text is read, the string under a field is its help, and a wrong name is answered with the nearest
right one. No torch here: ``--help`` must be instant.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from llavakit.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One line of help: the name to type, what it takes, what it is when left out, and the string under the field."""

    name: str
    kind: str
    default: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A field that has another value than before."""

    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} -> {self.after!r}"


def parse(base: T, words: Sequence[str] = (), *, file: Path | None = None) -> T:
    """``base`` with the fields of ``file`` and then of ``key=value`` words changed; nested fields are spelled ``outer.inner``.

    Raises ConfigError: ``bad_word`` (no '='), ``unknown_option`` (with the nearest name), ``bad_value`` (with what is wanted).
    """
    value = load(base, file) if file is not None else base
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not key=value", code="bad_word", remedy="write the name, '=', and the value without spaces")
        value = _assign(value, name.strip().lstrip("-").split("."), text, name)
    return value


def load(base: T, path: Path) -> T:
    """``base`` with the fields of a YAML file changed. Raises ConfigError naming the file and the field."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(error.strerror or "cannot be read", code="bad_file", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"not YAML: {line}", code="bad_file", where=str(path), remedy="compare it with a config.yaml of a run") from error
    if content is None:
        return base
    if not isinstance(content, dict):
        raise ConfigError("no mapping of names to values", code="bad_file", where=str(path), remedy="write one 'name: value' a line")
    return from_dict(base, content, where=str(path))


def save(value: Any, path: Path) -> None:
    """Write every field as YAML; ``load`` on any base gives the value back. The file is replaced in one move."""
    import yaml

    draft = path.with_name(path.name + ".tmp")
    draft.write_text(yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(draft, path)


def to_dict(value: Any) -> dict[str, Any]:
    """The fields as plain YAML values: paths become text, tuples lists, nested dataclasses mappings."""
    return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}


def from_dict(base: T, content: Mapping[str, Any], *, where: str = "") -> T:
    """``base`` with the given fields changed; the inverse of ``to_dict``."""
    hints = get_type_hints(type(base))
    prefix = f"{where}: " if where else ""
    changes: dict[str, Any] = {}
    for name, entry in content.items():
        _known(base, str(name), f"{prefix}{name}")
        changes[name] = _convert(entry, hints[name], f"{prefix}{name}", getattr(base, name))
    return _changed(base, changes)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The fields of two ``to_dict`` results that differ, in the order of the second."""
    names = list(after) + [name for name in before if name not in after]
    return tuple(
        Difference(name=name, before=before.get(name), after=after.get(name)) for name in names if before.get(name) != after.get(name)
    )


def describe(base: Any) -> tuple[Option, ...]:
    """The options of a config value with their defaults; the string written under each field is its help, inner options follow theirs."""
    help_of = _strings_under_fields(type(base))
    hints = get_type_hints(type(base))
    found: list[Option] = []
    for field in fields(base):
        name, value = field.name, getattr(base, field.name)
        inner = value if value is not None else _fresh(hints[name])
        found.append(Option(name=name, kind=_spell(hints[name]), default=_show(value), help=help_of.get(name, "")))
        found += [replace(option, name=f"{name}.{option.name}") for option in (describe(inner) if is_dataclass(inner) else ())]
    return tuple(found)


def _assign(value: T, path: Sequence[str], text: str, where: str) -> T:
    name = path[0]
    _known(value, name, where)
    hint, old = get_type_hints(type(value))[name], getattr(value, name)
    if len(path) > 1:
        old = _fresh(hint) if old is None else old
        if not is_dataclass(old):
            raise ConfigError(f"'{name}' has no inner options", code="unknown_option", where=where, remedy=f"write {name}=value")
        return _changed(value, {name: _assign(old, path[1:], text, where)})
    return _changed(value, {name: _convert(_read(text, hint, where), hint, where, old)})


def _changed(value: T, changes: Mapping[str, Any]) -> T:
    result: T = replace(value, **changes)  # type: ignore[type-var]  # a dataclass by contract
    return result


def _known(value: Any, name: str, where: str) -> None:
    names = [field.name for field in fields(value)]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else f"the options are {', '.join(names)}"
        raise ConfigError(f"no option '{name}'", code="unknown_option", where=where, remedy=remedy)


def _read(text: str, hint: Any, where: str) -> Any:
    """Words of text types are taken as they stand; all else is read as YAML."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if NoneType in members and text in ("", "none", "null", "None"):
        return None
    if any(member in (str, Path) or get_origin(member) is Literal for member in members):
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} cannot be read", code="bad_value", where=where, remedy=f"give {_spell(hint)}") from error


def _convert(entry: Any, hint: Any, where: str, old: Any) -> Any:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return _convert_union(entry, hint, where, old)
    if origin is Literal and entry in get_args(hint):
        return entry
    if origin is tuple and isinstance(entry, list | tuple):
        kinds = get_args(hint)
        kinds = kinds[:1] * len(entry) if kinds[1:] == (...,) else kinds
        if len(kinds) == len(entry):
            return tuple(_convert(item, kind, f"{where}[{i}]", None) for i, (item, kind) in enumerate(zip(entry, kinds, strict=True)))
    if is_dataclass(hint) and isinstance(entry, Mapping):
        return from_dict(_fresh(hint) if old is None else old, entry, where=where)
    if hint in _SCALARS:
        converted = _SCALARS[hint](entry)
        if converted is not None:
            return converted
    raise ConfigError(f"{entry!r} does not fit", code="bad_value", where=where, remedy=f"give {_spell(hint)}")


def _convert_union(entry: Any, hint: Any, where: str, old: Any) -> Any:
    members = get_args(hint)
    if entry is None and NoneType in members:
        return None
    for member in members:
        if is_dataclass(member) and isinstance(entry, Mapping):
            return _convert(entry, member, where, old)
        if member is not NoneType:
            try:
                return _convert(entry, member, where, old)
            except ConfigError:
                continue
    raise ConfigError(f"{entry!r} does not fit", code="bad_value", where=where, remedy=f"give {_spell(hint)}")


def _fresh(hint: Any) -> Any:
    """The value a field begins with when an inner option turns it on: its dataclass's own defaults; None where it holds none."""
    kinds = [kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)]
    return kinds[0]() if kinds else None  # type: ignore[operator]


def _as_float(entry: Any) -> float | None:
    """YAML 1.1 reads 1e-3 as text, so text that spells a number is one."""
    try:
        number = float(entry) if isinstance(entry, int | float | str) and not isinstance(entry, bool) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_SCALARS: Mapping[Any, Any] = {
    bool: lambda entry: entry if isinstance(entry, bool) else None,
    int: lambda entry: entry if isinstance(entry, int) and not isinstance(entry, bool) else None,
    float: _as_float,
    str: lambda entry: entry if isinstance(entry, str) else None,
    Path: lambda entry: Path(entry) if isinstance(entry, str | Path) and str(entry) else None,
}


def _spell(hint: Any) -> str:
    """A type in words a person can act on."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_spell(member) for member in get_args(hint))
    if origin is Literal:
        return "|".join(str(value) for value in get_args(hint))
    if origin is tuple:
        return "[" + ", ".join("..." if kind is ... else _spell(kind) for kind in get_args(hint)) + "]"
    words = {bool: "true|false", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "none"}
    return words.get(hint, "options")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _show(value: Any) -> str:
    plain = _plain(value)
    return "none" if plain is None else str(plain).lower() if isinstance(plain, bool) else str(plain)


def _strings_under_fields(kind: type) -> dict[str, str]:
    """Each field's name with the string literal that follows it in the class body, inherited ones too."""
    if not is_dataclass(kind):
        return {}
    found = dict(chain.from_iterable(_strings_under_fields(base).items() for base in kind.__bases__))
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            constant = below.value
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                found[field.target.id] = " ".join(constant.value.split())
    return found


def in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ConfigError(f"{value} is out of range", code="bad_value", where=name, remedy=f"give a number {limit}")
