"""What a training record must be (spec 3.5, 4.5; hardening D5-D9): the owner of every rule about one sample.

What is wrong with a record is one of two kinds:

    fault    the sample cannot be used      bad_record, no_turns, unknown_role, bad_turn_order, open_conversation, empty_reply, bad_content,
                                            image_count, image_outside, image_missing, image_not_from_user, bad_characters
    remark   it is used as the rule says    id_missing (made from the position), id_repeated, leading_reply (dropped, as LLaVA does),
                                            marker_in_reply (stays text)

``examine`` finds all of them; a reader stops at the first fault or leaves the sample out and counts it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavakit.data import messages
from llavakit.errors import DataError, ImageError, LlavaError
from llavakit.types import IMAGE_MARKER, Conversation, Image, decode_data_url

SHOWN = 5  # examples kept of each finding


@dataclass(frozen=True)
class Finding:
    """One thing about one record; ``where`` is file, place and id."""

    fault: bool
    code: str
    what: str
    where: str
    remedy: str = ""

    def error(self) -> DataError:
        return DataError(self.what, code=self.code, where=self.where, remedy=self.remedy)


@dataclass(frozen=True)
class Examined:
    """A record with all that was found. ``conversation`` is None where a fault leaves none; pictures are paths as written, or bytes."""

    id: str
    conversation: Conversation | None
    findings: tuple[Finding, ...]

    @property
    def fault(self) -> Finding | None:
        return next((finding for finding in self.findings if finding.fault), None)


@dataclass
class Report:
    """What was found while reading: how many records stood in the file, and each finding with its count and first places."""

    records: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def fault(self, error: LlavaError, times: int = 1) -> None:
        self.faults[error.code] += times
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


def examine(entry: Any, *, where: str, allow_outside: bool = False) -> Examined:
    """Everything that is to be said about one record, whichever way it is written."""
    if not isinstance(entry, Mapping):
        fault = Finding(True, "bad_record", "the sample is no JSON object", where, 'write {"conversations": [...]}')
        return Examined(where, None, (fault,))
    raw_id = entry.get("id")
    named = raw_id is not None and raw_id != ""
    sample_id = str(raw_id) if named else where
    place = f"{where} (id {sample_id})"
    found: list[Finding] = [] if named else [Finding(False, "id_missing", "no id", where)]
    try:
        conversation = _conversation(entry, place, found, allow_outside)
    except LlavaError as error:
        found.append(Finding(True, error.code, error.what, f"{place} {error.where}".rstrip(), error.remedy))
        return Examined(sample_id, None, tuple(found))
    if conversation.open or len(conversation.turns) < 2:
        found.append(
            Finding(True, "open_conversation", "the conversation ends without a reply", place, "end it with a turn of the assistant")
        )
    for message in conversation.messages:
        if message.role == "assistant" and not message.text.strip():
            found.append(Finding(True, "empty_reply", "an empty reply", place, "remove the sample or write the reply"))
        if message.role == "assistant" and IMAGE_MARKER in message.text:
            found.append(Finding(False, "marker_in_reply", f"a reply spells {IMAGE_MARKER}, which stays text", place))
    return Examined(sample_id, conversation, tuple(found))


def _conversation(entry: Mapping[str, Any], place: str, found: list[Finding], allow_outside: bool) -> Conversation:
    """The conversation as it will be learned. Raises where there is none; what can be passed over goes to ``found``."""
    if messages.is_messages(entry):
        record = messages.normal(entry)
        turns, images = record["messages"], _images(messages.pictures(record), place, found, allow_outside)
        if turns[0]["role"] == "assistant" and len(turns) > 1:
            found.append(_leading(place))
            record = record | {"messages": turns[1:]}
        return messages.conversation(record, images)
    turns = _turns(entry.get("conversations"))
    if turns[0]["from"] == "gpt" and len(turns) > 1:
        found.append(_leading(place))
        turns = turns[1:]
    images = _images(messages.pictures(entry), place, found, allow_outside)
    return Conversation.from_llava({"conversations": turns, "image": images})


def _leading(place: str) -> Finding:
    return Finding(False, "leading_reply", "a reply before the first question is dropped", place)


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        remedy = 'write "conversations": [{"from": "human", "value": "..."}, ...]'
        raise DataError("no conversation", code="no_turns", remedy=remedy)
    for index, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
            what = "a turn without text in 'from' and 'value'"
            raise DataError(what, code="bad_record", where=f"conversations[{index}]", remedy="add them")
    return value


def _images(cells: Sequence[Any], place: str, found: list[Finding], allow_outside: bool) -> list[Image]:
    """Pictures by name, as a data URL, or as a table's cell with its bytes. Raises DataError for anything else."""
    images = []
    for cell in cells:
        embedded = _embedded(cell)
        name = embedded if embedded is not None else cell.get("path") if isinstance(cell, Mapping) else cell
        if not name or not isinstance(name, str | bytes):
            raise DataError("'image' is neither a name nor a list of names", code="bad_record", remedy="give relative paths")
        if isinstance(name, str) and not allow_outside and leaves(name):
            what = f"the image {name!r} leaves the images folder"
            found.append(Finding(True, "image_outside", what, place, "use relative paths inside it, or allow_outside=true"))
        images.append(Image(Path(name) if isinstance(name, str) else name))
    return images


def _embedded(cell: Any) -> bytes | None:
    if isinstance(cell, Mapping):
        held = cell.get("bytes")
        return held if isinstance(held, bytes) else None
    if isinstance(cell, str) and cell.startswith("data:"):
        try:
            return decode_data_url(cell)
        except ImageError as error:
            raise DataError(error.what, code=error.code, remedy=error.remedy) from error
    return cell if isinstance(cell, bytes) else None


def leaves(name: str) -> bool:
    """Whether a relative name leads out of the folder it is relative to."""
    plain = os.path.normpath(name)
    return os.path.isabs(plain) or plain.split(os.sep)[0] == ".."
