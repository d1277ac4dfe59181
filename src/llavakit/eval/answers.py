"""One line an answer, in the fields of LLaVA's own answer files (spec 6.1), and how any such file finds its questions again.

    {"question_id": 17, "prompt": "...", "text": "red", "answer_id": "5f0c...", "model_id": "tiny@1f0c", "metadata": {"id": "17-color"}}

Official ids repeat (TextVQA, POPE, MME), so our lines carry our own id. Files of LLaVA's runners do not: their lines are matched by
question_id and prompt, those of one id and prompt in the order of the file. Whatever does not fit is reported, never scored by guess.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.errors import DataError
from llavakit.eval.benchmark import Answered, Question
from llavakit.types import IMAGE_MARKER

FIELDS = ("question_id", "prompt", "text", "answer_id", "model_id", "metadata")
_FEW = 3  # of those that do not fit, so many are named


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of an answers file. ``id`` is ours, None where another program wrote it; ``raw`` is the line as it stands."""

    number: int
    question_id: str
    prompt: str
    text: str
    id: str | None
    raw: str


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Questions with their answers, in the order of the questions, and all that did not fit."""

    answered: list[Answered]
    missing: list[Question]
    unknown: list[Line]
    "Lines whose question is not in the benchmark."
    duplicates: list[Line]
    "Further lines about a question; the first one counts."
    reworded: list[Line]
    "Lines whose id is known and whose prompt is another: asked under another protocol?"

    def remarks(self) -> Iterator[str]:
        """One line for each kind of misfit."""
        if self.missing:
            yield f"{len(self.missing):,} of {len(self.answered):,} questions have no answer: {_some(q.id for q in self.missing)}"
        for lines, what in (
            (self.unknown, "answers are to questions that this benchmark does not have"),
            (self.duplicates, "answers are further ones to the same question; the first one counts"),
            (
                self.reworded,
                "answers are to other words than this protocol's; matched by question_id and first line, or by question_id alone",
            ),
        ):
            if lines:
                yield f"{len(lines):,} {what}: {_some(f'line {line.number} ({line.question_id})' for line in lines)}"


def written(question: Question, text: str, model: str) -> str:
    """The line of an answer. The same question, text and model give the same bytes, whenever and wherever."""
    extra = dict(question.extra)
    assert not set(extra) & set(FIELDS), extra
    return json.dumps(
        {
            "question_id": question.given,
            "prompt": question.prompt,
            "text": text,
            "answer_id": hashlib.blake2b(json.dumps([model, question.id, text]).encode(), digest_size=11).hexdigest(),
            "model_id": model,
            "metadata": {"id": question.id},
            **extra,
        }
    )


def read(path: Path) -> list[Line]:
    """All lines. A last line that was cut off by the end of a run counts as not written. Raises DataError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        remedy = "give the answers.jsonl of a run"
        raise DataError(error.strerror or "cannot be read", code="bad_file", where=str(path), remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8", code="bad_json", where=str(path), remedy="save the file as UTF-8") from error
    return lines(text, path)


def lines(text: str, path: Path) -> list[Line]:
    """The lines of a file's text; ``path`` is for messages."""
    *whole, last = text.split("\n")
    found = [_line(raw, number, path) for number, raw in enumerate(whole, 1) if raw.strip()]
    if last.strip() and _is_json(last):  # the last line end is not everybody's habit
        found.append(_line(last, len(whole) + 1, path))
    return found


def match(questions: Sequence[Question], found: Sequence[Line], *, limit: int | None = None) -> Matched:
    """Every question with its answer. Our own ids first, then question_id and prompt, then question_id alone; each pass in file order.

    ``limit``: only the first so many questions are asked for; answers to the others are known and left out.
    """
    texts: dict[str, str] = {}
    known = {question.id for question in questions}
    assert len(known) == len(questions), "a benchmark names its questions once each"
    duplicates, others = [], []
    for line in found:
        if line.id not in known:
            others.append(line)
        elif line.id in texts:
            duplicates.append(line)
        else:
            texts[line.id] = line.text
    unknown, again, reworded = _by_official_id(questions, others, texts)
    return Matched(
        answered=[Answered(question=question, text=texts.get(question.id)) for question in questions[:limit]],
        missing=[question for question in questions[:limit] if question.id not in texts],
        unknown=unknown,
        duplicates=sorted([*duplicates, *again], key=lambda line: line.number),
        reworded=reworded,
    )


def _by_official_id(
    questions: Sequence[Question], found: Sequence[Line], texts: dict[str, str]
) -> tuple[list[Line], list[Line], list[Line]]:
    """Fill ``texts`` from lines without our id. Returns the lines that are unknown, too many, and taken although the prompt differs."""
    of: dict[str, list[Question]] = defaultdict(list)
    if found:
        for question in questions:
            of[str(question.given)].append(question)
    left, reworded = list(found), list[Line]()
    for alike in (_same, _begins, _first_line, _any):
        rest: list[Line] = []
        for line in left:
            free = (q for q in of.get(line.question_id, ()) if q.id not in texts)
            fits = next((q for q in free if alike(_bare(line.prompt), _bare(q.prompt))), None)
            if fits is None:
                rest.append(line)
            else:
                texts[fits.id] = line.text
                reworded += [line] if alike in (_first_line, _any) else []
        left = rest
    unknown = [line for line in left if line.question_id not in of]
    return unknown, [line for line in left if line.question_id in of], sorted(reworded, key=lambda line: line.number)


def _same(said: str, asked: str) -> bool:
    return said == asked


def _begins(said: str, asked: str) -> bool:
    """LLaVA's MMBench runner leaves the suffix out of the prompt that it writes down."""
    return bool(said) and asked.startswith(said)


def _first_line(said: str, asked: str) -> bool:
    """Asked with other hints or another suffix."""
    return said.partition("\n")[0] == asked.partition("\n")[0]


def _any(said: str, asked: str) -> bool:
    return True


def _bare(prompt: str) -> str:
    """A prompt without the picture's place, which some runners write down."""
    return prompt.replace(IMAGE_MARKER, "").strip()


def _line(raw: str, number: int, path: Path) -> Line:
    where = f"{path}:{number}"
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        remedy = "one JSON object a line; delete this one to have its question asked again"
        raise DataError(f"no JSON ({error})", code="bad_json", where=where, remedy=remedy) from error
    if not isinstance(value, dict) or "question_id" not in value or "text" not in value:
        remedy = "write question_id, prompt and text, as LLaVA's runners do"
        raise DataError("no answer: question_id or text is missing", code="bad_answer", where=where, remedy=remedy)
    given, text, prompt = value["question_id"], value["text"], value.get("prompt", "")
    if isinstance(given, bool) or not isinstance(given, str | int) or not isinstance(text, str) or not isinstance(prompt, str):
        remedy = "question_id is a number or text, prompt and text are text"
        raise DataError("no answer: a field is of another type", code="bad_answer", where=where, remedy=remedy)
    metadata = value.get("metadata")
    own = metadata.get("id") if isinstance(metadata, dict) else None
    return Line(number=number, question_id=str(given), prompt=prompt, text=text, id=own if isinstance(own, str) else None, raw=raw)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_FEW]) + (", ..." if len(listed) > _FEW else "")
