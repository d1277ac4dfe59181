"""Training files to samples: LLaVA's JSON list or JSONL, plain or gzipped (spec 4.5), checked before a step is spent.

Every record is checked once at the start; the file is then kept as compact bytes, and a sample is built when it is asked for, so a
list of 665,298 records costs its bytes and not its objects. What is wrong is one of two kinds:

    fault    the sample cannot be used      DataError at once, or left out and counted with on_bad="skip"
    remark   the sample is used as the rule says, and counted

    fault     bad_record, no_turns, unknown_role, bad_turn_order, open_conversation, empty_reply, image_count, image_outside,
              image_missing, bad_characters
    remark    id_missing (made from the position), id_repeated, leading_reply (dropped, as LLaVA does: spec 3.5), marker_in_reply
              (stays text)
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from llavakit.errors import DataError, LlavaError
from llavakit.types import IMAGE_MARKER, Conversation

OnBad = Literal["stop", "skip"]
SHOWN = 5  # examples kept of each finding


@dataclass(frozen=True)
class Sample:
    """One closed conversation. ``where`` is file and line (or position), for messages; ``source`` its name in a mixture."""

    id: str
    conversation: Conversation
    where: str
    source: str = ""


@dataclass
class Report:
    """What was found while reading: how many records stood in the file, and each finding with its count and first places."""

    records: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def fault(self, error: LlavaError) -> None:
        self.faults[error.code] += 1
        self._place(error.code, str(error))

    def remark(self, code: str, where: str) -> None:
        self.remarks[code] += 1
        self._place(code, where)

    def _place(self, code: str, text: str) -> None:
        if len(self.places.setdefault(code, [])) < SHOWN:
            self.places[code].append(text)

    def lines(self) -> list[str]:
        """One line a finding, for a person."""
        return [
            f"{kind} {code}: {count} of {self.records} ({'; '.join(self.places[code])}{'; ...' if count > len(self.places[code]) else ''})"
            for kind, found in (("left out", self.faults), ("remark", self.remarks))
            for code, count in found.most_common()
        ]


class Source(Sequence[Sample]):
    """The usable samples of one file. ``fingerprint`` is the SHA-256 of its content: it changes when the file does (D12)."""

    def __init__(self, records: Sequence[tuple[str, bytes]], *, name: str, image_root: Path, report: Report, fingerprint: str) -> None:
        self._records = records
        self._name = name
        self._image_root = image_root
        self.report = report
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Source: ...
    def __getitem__(self, index: int | slice) -> Sample | Source:
        if isinstance(index, slice):
            part = self._records[index]
            return Source(part, name=self._name, image_root=self._image_root, report=self.report, fingerprint=self.fingerprint)
        place, packed = self._records[index]
        record = json.loads(packed)
        return Sample(record["id"], Conversation.from_llava(record, image_root=self._image_root), f"{self._name}:{place}")

    def lengths(self) -> list[tuple[bool, int]]:
        """For each sample: does it hold an image, and its length in words and characters mixed (only used to sort: spec 4.3)."""
        return [(b'"image"' in packed, len(packed)) for _, packed in self._records]


def read_llava(
    path: Path, *, image_root: Path | None = None, on_bad: OnBad = "stop", allow_outside: bool = False, check_images: bool = True
) -> Source:
    """Read and check a LLaVA file. ``image_root`` defaults to the file's folder.

    Raises DataError: ``bad_file`` (unreadable), ``bad_json`` (with line and column), ``no_samples``, or the first fault's code;
    for missing images the message counts all of them.
    """
    root = image_root if image_root is not None else path.parent
    content = _content(path)
    report = Report()
    seen: set[str] = set()
    kept: list[tuple[str, bytes]] = []
    missing: list[str] = []
    for place, entry in _records(content, path):
        report.records += 1
        where = f"{path.name}:{place}"
        try:
            record = _checked(entry, where=where, root=root, report=report, allow_outside=allow_outside)
            absent = [name for name in record.get("image", []) if check_images and not (root / name).is_file()]
            if absent:
                missing.append(f"{where} {absent[0]}")
                raise DataError(f"no image file {absent[0]}", code="image_missing", where=f"{where} (id {record['id']})")
        except LlavaError as error:
            if on_bad == "stop" and error.code != "image_missing":
                raise
            report.fault(error)
            continue
        if record["id"] in seen:
            report.remark("id_repeated", f"{where} (id {record['id']})")
        seen.add(record["id"])
        kept.append((place, json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")))
    if missing and on_bad == "stop":
        raise _all_missing(missing, root, path)
    if not kept:
        raise DataError("no usable sample", code="no_samples", where=str(path), remedy="; ".join(report.lines()) or "the file is empty")
    return Source(kept, name=path.name, image_root=root, report=report, fingerprint=hashlib.sha256(content).hexdigest())


def _all_missing(missing: Sequence[str], root: Path, path: Path) -> DataError:
    shown = "; ".join(missing[:SHOWN]) + ("; ..." if len(missing) > SHOWN else "")
    return DataError(
        f"{len(missing)} samples name images that are not under {root}: {shown}",
        code="image_missing",
        where=str(path),
        remedy="set images=<folder>, or leave them out with on_bad_sample=skip",
    )


def _content(path: Path) -> bytes:
    try:
        packed = path.read_bytes()
        return gzip.decompress(packed) if packed[:2] == b"\x1f\x8b" else packed
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(reason, code="bad_file", where=str(path), remedy="give a LLaVA JSON or JSONL file") from error


def _records(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """Each record with its place: its number in a JSON list, its line in JSONL."""
    text = _text(content, path)
    if text.lstrip().startswith("["):
        for index, entry in enumerate(_json(text, path, 1)):
            yield f"[{index}]", entry
        return
    # split on "\n" alone: U+2028 and its like may stand inside a JSON string
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and not _is_json(lines[0][1]) and isinstance(_json(text, path, 1), dict):
        raise DataError("one object, not a list of samples", code="bad_file", where=str(path), remedy="write a list, or one object a line")
    for number, line in lines:
        yield f"{number}", _json(line, path, number)


def _text(content: bytes, path: Path) -> str:
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"byte {error.start} (line {line}) is not UTF-8", code="bad_json", where=str(path), remedy="save the file as UTF-8"
        ) from error


def _json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = error.lineno + first_line - 1
        comma = "trailing comma" in error.msg or _after_comma(text, error.pos)
        raise DataError(
            f"not JSON: {error.msg}",
            code="bad_json",
            where=f"{path}, line {line}, column {error.colno}",
            remedy="remove the comma before the closing bracket" if comma else "repair it there",
        ) from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _after_comma(text: str, position: int) -> bool:
    return text[:position].rstrip().endswith(",") and text[position : position + 1] in ("]", "}")


def _checked(entry: Any, *, where: str, root: Path, report: Report, allow_outside: bool) -> dict[str, Any]:
    """A record with an id, a list of image names, and turns that make a closed conversation. Raises DataError."""
    if not isinstance(entry, Mapping):
        raise DataError("the sample is no JSON object", code="bad_record", where=where, remedy='write {"conversations": [...]}')
    raw_id = entry.get("id")
    if raw_id is None or raw_id == "":
        report.remark("id_missing", where)
    sample_id = where if raw_id is None or raw_id == "" else str(raw_id)
    place = f"{where} (id {sample_id})"
    turns = _turns(entry.get("conversations"), place, report)
    names = _image_names(entry.get("image", entry.get("images")), place, allow_outside)
    record: dict[str, Any] = {"id": sample_id, "conversations": turns} | ({"image": names} if names else {})
    try:
        conversation = Conversation.from_llava(record, image_root=root)
    except LlavaError as error:
        raise DataError(error.what, code=error.code, where=f"{place} {error.where}".rstrip(), remedy=error.remedy) from error
    if conversation.open or len(conversation.turns) < 2:
        raise DataError(
            "the conversation ends without a reply", code="open_conversation", where=place, remedy="end it with a turn from 'gpt'"
        )
    for turn in turns:
        if turn["from"] == "gpt" and not turn["value"].strip():
            raise DataError("an empty reply", code="empty_reply", where=place, remedy="remove the sample or write the reply")
        if turn["from"] == "gpt" and IMAGE_MARKER in turn["value"]:
            report.remark("marker_in_reply", place)
    return record


def _turns(value: Any, place: str, report: Report) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(
            "no conversation", code="no_turns", where=place, remedy='write "conversations": [{"from": "human", "value": "..."}, ...]'
        )
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            raise DataError(
                "a turn without text in 'from' and 'value'", code="bad_record", where=f"{place} conversations[{index}]", remedy="add them"
            )
    turns = [{"from": turn["from"], "value": turn["value"]} for turn in value]
    if turns[0]["from"] == "gpt" and len(turns) > 1:
        report.remark("leading_reply", place)
        turns = turns[1:]
    return turns


def _image_names(value: Any, place: str, allow_outside: bool) -> list[str]:
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, list) else [] if value is None else None
    if names is None or not all(isinstance(name, str) and name for name in names):
        raise DataError("'image' is neither a name nor a list of names", code="bad_record", where=place, remedy="give relative paths")
    for name in names:
        plain = os.path.normpath(name)
        if not allow_outside and (os.path.isabs(plain) or plain.split(os.sep)[0] == ".."):
            raise DataError(
                f"the image {name!r} leaves the images folder",
                code="image_outside",
                where=place,
                remedy="use relative paths inside it, or allow_outside=true",
            )
    return names
