"""A folder of photographs -> a line of text or JSON for each, by any teacher who sees. Stopped and started again it goes on.

    FOLDER/**/*.jpg ... --question--> teacher --> ledger --> captions.jsonl (+ captions.rejects.jsonl)

A picture's bytes are part of its question: a file that was renamed is not asked again, one that was changed is.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.datagen import schema as schemas
from llavakit.datagen.files import line, whole
from llavakit.datagen.parse import Reject, read
from llavakit.errors import DataError, ImageError
from llavakit.responder import Completion, Query
from llavakit.responder.ledger import Ledger
from llavakit.responder.pool import Limits
from llavakit.types import Conversation, Sampling

ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
NO_REPLY = "no_reply"
QUESTION = "Describe this picture in one or two sentences."


@dataclass(frozen=True, kw_only=True)
class Library:
    """What is asked about which pictures. With a ``schema`` every reply must be JSON of that form."""

    folder: Path
    names: Sequence[str]
    questions: Sequence[str]
    sampling: Sampling
    schema: Mapping[str, Any] | None = None
    again: int = Limits.again

    def __len__(self) -> int:
        return len(self.names) * len(self.questions)

    def queries(self) -> Iterator[Query]:
        return (self.query(name, question) for name in self.names for question in self.questions)

    def query(self, name: str, question: str) -> Query:
        asked = question
        if self.schema is not None:
            asked += f"\nReply with one JSON value and nothing else. It must fit this JSON schema:\n{json.dumps(self.schema)}"
        seed = random.Random(f"{self.sampling.seed}/{question}").randrange(1 << 31)
        return Query(
            id=f"{name}\n{question}", conversation=Conversation.ask(asked, self.folder / name), sampling=self.sampling.but(seed=seed)
        )

    def judge(self, query: Query, completion: Completion) -> str | None:
        found = self.read(completion)
        return f"{found.code}: {found.detail}" if isinstance(found, Reject) else None

    def read(self, completion: Completion) -> Any | Reject:
        """The text or value of a reply, or why it is not used."""
        found = read("answer", completion.text, completion.finish)
        if isinstance(found, Reject):
            return found
        return found[0][1] if self.schema is None else schemas.read(found[0][1], self.schema)


def pictures(folder: Path) -> list[str]:
    """Every picture below a folder, by its name from there, in the order of names; hidden ones are passed over."""
    if not folder.is_dir():
        raise DataError("no such folder", code="bad_file", where=str(folder), remedy="give a folder of pictures")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    names = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise DataError("no picture", code="bad_file", where=str(folder), remedy=f"pictures end in {', '.join(sorted(ENDINGS))}")
    return names


def write(library: Library, teacher: str, ledger: Ledger, out: Path) -> Counter[str]:
    """The lines for all pictures that have a reply, in the order of names; what is not used goes beside it. Returns counts."""
    counts: Counter[str] = Counter()
    failures = {failure.key: failure.what for failure in ledger.failures()}
    with whole(out) as lines, whole(rejects_of(out)) as rejects:
        for name in library.names:
            for question in library.questions:
                asked = {"image": name} | ({"question": question} if len(library.questions) > 1 else {})
                outcome, wrong = _look(library, library.query(name, question), teacher, ledger, failures)
                for row in wrong:
                    counts["rejected"] += row["reason"] != NO_REPLY
                    counts["failed"] += row["reason"] == NO_REPLY
                    line(rejects, asked | row)
                if outcome is not None:
                    counts["answered"] += 1
                    line(lines, asked | outcome | {"teacher": teacher})
    return counts


def _look(
    library: Library, query: Query, teacher: str, ledger: Ledger, failures: Mapping[str, str]
) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """What the ledger has for one question: the accepted value, and everything that is not used."""
    wrong: list[dict[str, Any]] = []
    for number in range(library.again + 1):
        try:
            key = query.attempt(number).key(teacher)
        except ImageError as error:  # the picture went away meanwhile
            return None, [*wrong, {"reason": NO_REPLY, "detail": str(error), "text": ""}]
        completion = ledger.get(key)
        if completion is None:
            fault = [{"reason": NO_REPLY, "detail": failures[key], "text": ""}] if key in failures else []
            return None, wrong + fault
        found = library.read(completion)
        if not isinstance(found, Reject):
            return {"text" if library.schema is None else "answer": found}, wrong
        wrong.append({"attempt": number, "reason": found.code, "detail": found.detail, "text": completion.text})
    return None, wrong


def rejects_of(out: Path) -> Path:
    return out.with_name(out.stem + ".rejects.jsonl")
