"""What a mixture is made of, as a YAML or JSON file: sources with their files, counts and licences (spec 4.5).

    name: my-mixture
    sources:
      - name: vqa                        said in every message about its samples
        title: owner/dataset             what to download, in words; no address is kept here
        file: vqa.json                   relative to the root that the user names
        images: coco/train2017           image root, relative to the same root
        count: 82783                     records the file should hold; a difference is a remark
        share: 0.5                       of its samples; 2.5 takes each twice and every second one a third time
        take: 5000                       or so many samples
        seed: 0                          which ones
        parts:                           what the file was merged from: see ``parts``
          - {name: vqav2, count: 82783, roots: [coco/train2017], suffixes: [Answer the question ...]}

The mixtures of the papers ship with the package (``SHIPPED``, ``shipped``). Counts that were never published are left out, not guessed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llavakit.config import from_dict
from llavakit.errors import ConfigError, DataError

SHIPPED = ("llava-1.5-665k", "llava-instruct-158k", "instruct-80k", "lcs-558k", "cc3m-595k", "next-760k")
MOST_SHARE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One ingredient of a merged file, told from the others by where its images lie and by the format words of its questions."""

    name: str = ""
    count: int | None = None
    "Records; none where the number was never published."
    about: int | None = None
    "The rounded number that was published, where the exact one was not."
    published: bool = True
    "False where the data themselves were never given out."
    roots: tuple[str, ...] = ()
    "Folders below the source's image root; none for text alone."
    suffixes: tuple[str, ...] = ()
    "Words of which each question of this part holds one; none where questions hold no such words."
    pictures: str = ""
    "The title of the image set, to know what to download."
    licence: str = "unknown"
    "Of the records, not of the pictures."
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One file of a mixture, and how much of it is taken."""

    name: str = ""
    file: Path | None = None
    title: str = ""
    images: Path = Path()
    pictures: str = ""
    count: int | None = None
    take: int | None = None
    share: float = 1.0
    seed: int = 0
    licence: str = "unknown"
    note: str = ""
    parts: tuple[Part, ...] = ()

    def wanted(self, held: int) -> int:
        """How many samples are taken of ``held`` usable ones; never none."""
        return self.take if self.take is not None else part_of(held, self.share)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The sources of a mixture, in order."""

    name: str = ""
    about: str = ""
    sources: tuple[SourceSpec, ...] = ()

    @property
    def count(self) -> int | None:
        """The records of all files; None where one of them is not known."""
        counts = [source.count for source in self.sources]
        return None if None in counts else sum(count for count in counts if count is not None)


def part_of(count: int, share: float) -> int:
    """``share`` of ``count``, rounded half up; at least one."""
    return max(1, int(count * share + 0.5))


def shipped(name: str) -> Manifest:
    """A manifest of the package. Raises ConfigError ``unknown_mixture``."""
    if name not in SHIPPED:
        raise ConfigError(f"no mixture {name!r}", code="unknown_mixture", remedy=f"use one of {', '.join(SHIPPED)}, or give a file")
    text = (files("llavakit") / "data" / "manifests" / f"{name}.yaml").read_text(encoding="utf-8")
    return _manifest(yaml.safe_load(text), f"{name}.yaml")


def read_manifest(path: Path) -> Manifest:
    """Raises DataError ``bad_file`` or ``bad_manifest``, or ConfigError for a field that does not exist or does not fit."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", code="bad_file", where=str(path), remedy="give a manifest") from error
    except (yaml.YAMLError, ValueError) as error:
        raise DataError(" ".join(str(error).split()), code="bad_file", where=str(path), remedy="write YAML, or JSON in *.json") from error
    return _manifest(content, str(path))


def _manifest(content: Any, where: str) -> Manifest:
    entries = content.get("sources") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise _bad("no list of sources", where, "write sources: and below it '- name: ...' and 'file: ...' for each")
    sources = tuple(_source(entry, f"{where} sources[{number}]") for number, entry in enumerate(entries))
    _unlike([source.name for source in sources], where, "sources")
    return replace(from_dict(Manifest(), {key: value for key, value in content.items() if key != "sources"}, where=where), sources=sources)


def _source(entry: Any, where: str) -> SourceSpec:
    if not isinstance(entry, Mapping):
        raise _bad("no mapping of names to values", where, "write '- name: ...' and 'file: ...'")
    found = from_dict(SourceSpec(), {key: value for key, value in entry.items() if key != "parts"}, where=where)
    told = entry.get("parts") or []
    if not isinstance(told, list) or not all(isinstance(part, Mapping) for part in told):
        raise _bad("parts is no list of mappings", where, "write '- name: ...' and 'count: ...' for each part")
    parts = tuple(from_dict(Part(), part, where=f"{where} parts[{number}]") for number, part in enumerate(told))
    if not found.name or found.file is None:
        raise _bad("a source without a name or a file", where, "give both")
    if found.take is not None and ("share" in entry or found.take < 1):
        raise _bad(f"take is {found.take}" + (" and share is given too" if "share" in entry else ""), where, "give one of them, above 0")
    if not 0 < found.share <= MOST_SHARE or found.seed < 0 or (found.count is not None and found.count < 1):
        raise _bad("share, seed or count is out of range", where, f"share above 0 and up to {MOST_SHARE:g}, seed from 0, count from 1")
    _separable(parts, where)
    return replace(found, parts=parts)


def _separable(parts: tuple[Part, ...], where: str) -> None:
    """Two parts may share all their roots or suffixes or none of them; else a record could not be told to belong to one count."""
    _unlike([part.name for part in parts], where, "parts")
    for what, groups in (("roots", {part.roots for part in parts}), ("suffixes", {part.suffixes for part in parts})):
        twice = [name for name, times in Counter(name for group in groups for name in group).items() if times > 1]
        if twice:
            raise _bad(f"'{twice[0]}' stands in two different lists of {what}", where, f"parts share all of their {what} or none")


def _unlike(names: list[str], where: str, what: str) -> None:
    twice = [name for name, times in Counter(names).items() if times > 1 or not name]
    if twice:
        raise _bad(f"{what} without a name or of the same name: {twice[0]!r}", where, "name each of them differently")


def _bad(what: str, where: str, remedy: str) -> DataError:
    return DataError(what, code="bad_manifest", where=where, remedy=remedy)
