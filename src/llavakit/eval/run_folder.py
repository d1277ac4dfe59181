"""The folder of a run: answers on the disk as they come, one process or many, continued after any stop.

    run.json                    what the answers depend on: another model or protocol does not go on here
    answers.jsonl               one process appends to it; at the end it stands in the order of the questions
    answers.rank-0-of-2.jsonl   what one of several processes appends to; whoever ends last puts all of them into answers.jsonl
    failures.jsonl              questions without an answer, and why; they are asked again by the next run

A line is written in one piece and synced. ``kill -9`` can cut the last one: what has no line end is cut away, and its question is asked
again. A process locks the file that it appends to, so two runs never mix, and a merge waits for nobody: it is done by whoever finds
all questions settled and nobody writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from llavakit.errors import ConfigError, DataError
from llavakit.eval import answers
from llavakit.eval.benchmark import Protocol, Question
from llavakit.eval.files import replaced

ANSWERS, FAILURES, RUN, LEDGER = "answers", "failures", "run.json", "ledger.sqlite"
_PART = re.compile(r"\.rank-\d+-of-\d+\.jsonl")
_DOOR = ".settling"
_TOLD = ("date", "versions", "asked")  # in run.json for people; they may differ


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of several processes this is. Started by torchrun, they say so in the environment."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            what = f"process {self.rank} of {self.world}"
            raise ConfigError(what, code="bad_value", where="RANK, WORLD_SIZE", remedy="start with torchrun, or unset both")

    @staticmethod
    def of(environment: Mapping[str, str]) -> Share:
        try:
            return Share(rank=int(environment.get("RANK", "0")), world=int(environment.get("WORLD_SIZE", "1")))
        except ValueError as error:
            raise ConfigError(
                "no numbers", code="bad_value", where="RANK, WORLD_SIZE", remedy="start with torchrun, or unset both"
            ) from error

    def file(self, folder: Path, stem: str) -> Path:
        """Where this process writes."""
        return folder / (f"{stem}.jsonl" if self.world == 1 else f"{stem}.rank-{self.rank}-of-{self.world}.jsonl")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the answers of a run depend on; ``versions``, ``date`` and ``asked`` are told and may change."""

    benchmark: str
    protocol: Protocol
    prompts_sha256: str
    "Of all questions as they are asked, those beyond a limit too, so that a limit can be raised."
    questions: int
    model: str
    template: str | None = None
    aspect: str | None = None
    "As the model was really asked; None where a server decides."
    arithmetic: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    asked: int = 0

    def fields(self) -> dict[str, Any]:
        """The contents of run.json; the report reads it."""
        protocol = self.protocol
        said = {name: getattr(protocol, name) for name in ("suffix", "hints", "max_new_tokens", "temperature", "passes")}
        own = {name: getattr(self, name) for name in ("model", "template", "aspect", "arithmetic", "prompts_sha256", "questions", "asked")}
        return {"benchmark": self.benchmark, "protocol": protocol.name, **said, **own, "versions": dict(self.versions), "date": self.date}

    def hold(self, folder: Path) -> None:
        """Write run.json, or compare with the one that is there. Raises DataError (``other_run``)."""
        path, mine = folder / RUN, self.fields()
        if not path.exists():
            if any(_files(folder, ANSWERS)):
                raise DataError("answers without run.json", code="other_run", where=str(folder), remedy=_REMEDY)
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, mine)
            return
        theirs = read_run(path)
        changed = [name for name in mine if name not in _TOLD and mine[name] != theirs.get(name)]
        if changed:
            what = "; ".join(_difference(name, theirs.get(name), mine[name]) for name in changed)
            raise DataError(f"the answers here were made otherwise ({what})", code="other_run", where=str(path), remedy=_REMEDY)
        if theirs.get("asked") != self.asked:
            _write(path, theirs | {"asked": self.asked})


_REMEDY = "give another folder, or delete this one"


def read_run(path: Path) -> dict[str, Any]:
    """A run.json as it stands. Raises DataError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("this is no description of a run", code="bad_json", where=str(path), remedy=_REMEDY) from error
    if not isinstance(found, dict):
        raise DataError("this is no description of a run", code="bad_json", where=str(path), remedy=_REMEDY)
    return found


def digest(questions: Sequence[Question]) -> str:
    """SHA-256 of all questions as they are asked."""
    asked = hashlib.sha256()
    for question in questions:
        asked.update(json.dumps([question.id, question.given, question.prompt, question.system]).encode() + b"\n")
    return asked.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A question that has no answer, and why."""

    id: str
    code: str
    what: str


class RunFolder:
    """The files of one process of a run, open for appending. A context manager.

    ``questions``: all of the benchmark; ``asked``: those of them that this run is about. Raises DataError: ``other_run``,
    ``answers_in_use`` where another process appends to the same file, ``bad_json`` where a line in the middle is broken.
    """

    def __init__(self, folder: Path, run: Run, questions: Sequence[Question], asked: Sequence[Question], share: Share) -> None:
        run.hold(folder)
        self.folder, self.model, self.share = folder, run.model, share
        self.order = [question.id for question in questions]
        self.asked = [question.id for question in asked]
        self.failed: list[Failure] = []
        with ExitStack() as opened:
            self._answers = opened.enter_context(closing(_Appended(share.file(folder, ANSWERS))))
            self._failures = opened.enter_context(closing(_Appended(share.file(folder, FAILURES), anew=True)))
            self.known = set(_kept(folder))
            self._opened = opened.pop_all()

    def add(self, rows: Sequence[tuple[Question, str]], *, sync: bool = True) -> None:
        """Answers, on the disk when this returns. One to a question that has one is left out."""
        fresh = {question.id: answers.written(question, text, self.model) for question, text in rows if question.id not in self.known}
        self._answers.append(fresh.values(), sync=sync)
        self.known |= fresh.keys()

    def fail(self, question: Question, code: str, what: str) -> None:
        """Why a question has no answer."""
        failure = Failure(id=question.id, code=code, what=what)
        self.failed.append(failure)
        self._failures.append([json.dumps(asdict(failure))], sync=False)

    def settle(self) -> bool:
        """Put the files into order if every question is settled and nobody else writes; whether it is so. Ends the appending."""
        with _one_at_a_time(self.folder / _DOOR, self.share):
            self.close()
            with _others(self.folder) as free:
                done = free and self._ordered()
        if done:
            (self.folder / _DOOR).unlink(missing_ok=True)  # those who wait have it open; what is done twice comes out the same
        return done

    def _ordered(self) -> bool:
        known, failed = _kept(self.folder), _failed(self.folder)
        if any(name not in known and name not in failed for name in self.asked):
            return False
        place = {name: number for number, name in enumerate(self.order)}
        text = "".join(known[name] + "\n" for name in sorted(known, key=lambda name: place.get(name, len(place))))
        answered = self.folder / f"{ANSWERS}.jsonl"
        if not answered.exists() or answered.read_bytes() != text.encode():
            replaced(answered, text)
        lost = [failed[name] for name in self.order if name in failed and name not in known]
        if lost:
            replaced(self.folder / f"{FAILURES}.jsonl", "".join(line + "\n" for line in lost))
        for path in [*_files(self.folder, ANSWERS), *_files(self.folder, FAILURES)]:
            if _PART.search(path.name) or (path.name == f"{FAILURES}.jsonl" and not lost):
                path.unlink(missing_ok=True)
        return True

    def failures(self) -> list[Failure]:
        """Those of all processes, in the order of the questions."""
        failed = _failed(self.folder)
        return [Failure(**json.loads(failed[name])) for name in self.order if name in failed and name not in self.known]

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Appended:
    """A file of lines that this process alone appends to. What stands behind its last line end is cut away."""

    def __init__(self, path: Path, *, anew: bool = False) -> None:
        self._file = _own(path)
        try:
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(0)
            whole = 0 if anew else self._file.read().rfind(b"\n") + 1
            if whole != size:
                self._file.truncate(whole)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Any, *, sync: bool) -> None:
        text = "".join(f"{row}\n" for row in rows)
        if text:
            self._file.write(text.encode())
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _own(path: Path) -> Any:
    """The file, locked. It may have been replaced between opening and locking, so it is looked at again."""
    while True:
        file = path.open("a+b")
        if not _lock(file):
            file.close()
            raise DataError(
                "another process writes here", code="answers_in_use", where=str(path), remedy="wait for it, or give another folder"
            )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _lock(file: Any, *, wait: bool = False) -> bool:
    """Whether the file is ours until it is closed. Where there are no such locks nobody is kept out."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def _one_at_a_time(path: Path, share: Share) -> Iterator[None]:
    """Of several processes one is inside; the next one waits with its own file still locked, so that whoever is last sees all ended."""
    if share.world == 1:
        yield
        return
    with path.open("a+b") as file:
        _lock(file, wait=True)
        yield


@contextmanager
def _others(folder: Path) -> Iterator[bool]:
    """Whether nobody appends to any of the answers; nobody begins to meanwhile."""
    held = [path.open("a+b") for path in _files(folder, ANSWERS)]
    try:
        yield all(_lock(file) for file in held)
    finally:
        for file in held:
            file.close()


def _files(folder: Path, stem: str) -> Iterator[Path]:
    """The whole file first, then the parts."""
    yield from (path for path in (folder / f"{stem}.jsonl",) if path.exists())
    yield from sorted(path for path in folder.glob(f"{stem}.rank-*.jsonl") if _PART.search(path.name))


def _kept(folder: Path) -> dict[str, str]:
    """Our id -> line, of all files; the first line of an id counts. Others may be writing: an unfinished line is not looked at."""
    found: dict[str, str] = {}
    for path in _files(folder, ANSWERS):
        whole, _, _ = path.read_bytes().rpartition(b"\n")
        for line in answers.lines(whole.decode("utf-8", "replace") + "\n", path):
            if line.id is None:
                remedy = "give an empty folder; llava eval score reads answers of other programs"
                raise DataError("this answer is not ours", code="bad_answer", where=f"{path}:{line.number}", remedy=remedy)
            found.setdefault(line.id, line.raw)
    return found


def _failed(folder: Path) -> dict[str, str]:
    """Our id -> line of a failure."""
    found: dict[str, str] = {}
    for path in _files(folder, FAILURES):
        for raw in path.read_text("utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a torn last line: its question is asked again
                found[json.loads(raw)["id"]] = raw
    return found


def _write(path: Path, values: Mapping[str, Any]) -> None:
    replaced(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def _difference(name: str, before: Any, now: Any) -> str:
    return "the questions have other words" if name == "prompts_sha256" else f"{name} {before!r}, now {now!r}"
