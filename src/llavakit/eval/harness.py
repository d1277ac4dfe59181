"""Questions to answers: by our own model in batches, or by any server, many at once. Nothing answered is lost, nothing is asked twice.

    questions --windows--> batches of like length --dealt to ranks--> [encode, a thread ahead] --> model --> answers.jsonl, batch by batch
                    |<- a window: WINDOW batches, sorted by length ->|
    questions --> responder.ask_all (pace, retries, ledger) --> server --> answers.jsonl, answer by answer

Which questions share a batch follows from the questions and the batch size alone, not from what is answered already or how many processes
there are: a resumed run computes what an uninterrupted one would have, and two ranks compute what one does, bit for bit. No torch here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from llavakit.errors import ConfigError, LlavaError, ResponderError
from llavakit.eval.benchmark import Question
from llavakit.eval.run_folder import LEDGER, Failure, Run, RunFolder, Share
from llavakit.responder import Completer, Completion, Ledger, Limits, Progress, Query, Settled, Spent, ask_all
from llavakit.responder.progress import Meter
from llavakit.types import Conversation, Sampling

WINDOW = 32  # batches among which questions are sorted by length
AHEAD = 2  # batches made ready while the model computes
IN_A_ROW = 100  # questions without an answer one after another: then it is not about questions
Tell = Callable[[Progress], None]
Size = Callable[[Question], int]


class Model(Protocol):
    """Our own model as it is seen from here: ``assistant.Assistant``."""

    def encode(self, conversation: Conversation, sampling: Sampling) -> Any:
        """A question made ready for the model; called in a thread beside it. Raises LlavaError."""
        ...

    def reply_encoded(self, encoded: Sequence[Any], sampling: Sampling) -> list[str]:
        """The replies to some of these, computed together."""
        ...


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is asked, of whom, and where the answers go. ``limit``: only the first so many questions."""

    questions: Sequence[Question]
    run: Run
    out: Path
    limit: int | None = None
    share: Share = field(default_factory=Share)

    @property
    def asked(self) -> Sequence[Question]:
        return self.questions[: self.limit]

    @property
    def sampling(self) -> Sampling:
        """The protocol's; replies that are drawn are drawn alike every time, so that a file can be made again."""
        sampling = self.run.protocol.sampling
        return sampling.but(seed=0) if sampling.temperature else sampling

    def folder(self) -> RunFolder:
        return RunFolder(self.out, replace(self.run, asked=len(self.asked)), self.questions, self.asked, self.share)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended. ``whole``: every question is settled and answers.jsonl is in order; else another rank or another run goes on."""

    answered: int
    "Of all questions asked for, by this run, earlier ones and, as far as they have come, other ranks."
    fresh: int
    "By this process, now."
    failures: Sequence[Failure]
    whole: bool
    exit_code: int = 0


def by_model(job: Job, model: Model, *, batch: int = 16, size: Size | None = None, tell: Tell | None = None) -> Outcome:
    """Ask our own model. ``size``: how long a question is for it, where the length of its prompt does not say.

    A question that fails is recorded, and the others go on. Raises DataError as ``RunFolder`` does, ResponderError (``nobody_answers``)
    after ``IN_A_ROW`` failures one after another.
    """
    with job.folder() as folder:
        mine = batches(job.asked, batch, size)[job.share.rank :: job.share.world]
        todo = [questions for questions in mine if any(question.id not in folder.known for question in questions)]
        counted = _Counted(mine, folder, batch, tell)
        for questions, encoded in _ahead(todo, lambda question: _encoded(model, question, job.sampling)):
            became: dict[str, str | Exception] = {
                q.id: one for q, one in zip(questions, encoded, strict=True) if isinstance(one, Exception)
            }
            fine = [(question, one) for question, one in zip(questions, encoded, strict=True) if question.id not in became]
            if any(question.id not in folder.known for question, _ in fine):
                replies = _replies(model, [one for _, one in fine], job.sampling)
                became |= {question.id: reply for (question, _), reply in zip(fine, replies, strict=True)}
            counted.settle(questions, became)
        return _ended(folder, counted.fresh)


def by_server(job: Job, completer: Completer, *, limits: Limits | None = None, tell: Tell | None = None) -> Outcome:
    """Ask a server, or any ``Completer``, many questions at once; every reply is in the ledger before anything is done with it.

    A reply cut by its allowance or empty is an answer, as for our own model; one that broke off or was withheld is asked for again.
    """
    if job.share.world > 1:
        raise ConfigError("a server is asked by one process", code="bad_value", where="WORLD_SIZE", remedy="start it without torchrun")
    by_id = {question.id: question for question in job.asked}
    fresh = 0
    with job.folder() as folder:

        def queries() -> Iterator[Query]:
            for question in job.asked:
                if question.id not in folder.known:
                    try:
                        yield Query(id=question.id, conversation=question.conversation(), sampling=job.sampling)
                    except LlavaError as error:
                        folder.fail(question, error.code, str(error))

        def settled(done: Settled) -> None:
            nonlocal fresh
            question = by_id[done.query.id]
            if done.accepted is not None:
                folder.add([(question, done.accepted.text)], sync=False)  # the ledger is synced
                fresh += 1
            elif done.failure is not None:
                folder.fail(question, done.failure.code, str(done.failure))
            else:
                folder.fail(question, "rejected", f"the replies were not whole ({', '.join(reject.reason for reject in done.rejects)})")

        left = sum(question.id not in folder.known for question in job.asked)
        with Ledger(job.out / LEDGER) as ledger:
            outcome = ask_all(
                queries(), completer, ledger, limits=limits or Limits(), judge=_unbroken, on_settled=settled, on_progress=tell, total=left
            )  # fmt: skip
        return _ended(folder, fresh, outcome.exit_code)


def batches(questions: Sequence[Question], batch: int, size: Size | None = None) -> list[list[Question]]:
    """All questions in batches of like length: sorted, the longest first, within windows of ``WINDOW`` batches."""
    measure = size or (lambda question: len(question.prompt))
    made = []
    for at in range(0, len(questions), WINDOW * batch):
        window = sorted(questions[at : at + WINDOW * batch], key=measure, reverse=True)
        made += [window[start : start + batch] for start in range(0, len(window), batch)]
    return made


class _Counted:
    """Writes what became of questions, and counts it."""

    def __init__(self, mine: Sequence[Sequence[Question]], folder: RunFolder, batch: int, tell: Tell | None) -> None:
        self.folder, self._tell, self._batch = folder, tell, batch
        questions = [question for one in mine for question in one]
        self._meter = Meter(len(questions), time.monotonic)
        for question in questions:
            if question.id in folder.known:
                self._meter.known += 1
                self._meter.count(accepted=True, failed=False)
        self.fresh = self._in_a_row = 0

    def settle(self, questions: Sequence[Question], became: dict[str, str | Exception]) -> None:
        """A batch. Raises ResponderError when too many questions have failed one after another."""
        fresh = [question for question in questions if question.id not in self.folder.known]
        rows = [(question, text) for question in fresh if isinstance(text := became[question.id], str)]
        self.folder.add(rows)
        self.fresh += len(rows)
        for question in fresh:
            error = became[question.id]
            self._meter.count(accepted=isinstance(error, str), failed=isinstance(error, Exception))
            self._in_a_row = self._in_a_row + 1 if isinstance(error, Exception) else 0
            if isinstance(error, Exception):
                self.folder.fail(question, *_said(error))
                if self._in_a_row >= IN_A_ROW:
                    raise nobody(self._in_a_row, self.folder.failed[-1]) from error
        if self._tell:
            self._tell(self._meter.read(spent=Spent(), money=None, limit=self._batch, under_way=0))


def nobody(count: int, last: Failure) -> ResponderError:
    """So many questions failed that it is not about questions."""
    what = f"{count:,} questions in a row without an answer; the last one, {last.id}: {last.what}"
    return ResponderError(what, code="nobody_answers", remedy="run again when it is mended: answers so far are kept")


def _ahead(todo: Sequence[Sequence[Question]], encode: Callable[[Question], Any]) -> Iterator[tuple[Sequence[Question], list[Any]]]:
    """Every batch with its questions made ready, a few batches ahead of whoever takes them."""
    from llavakit.model.teams import compute_alone

    with ThreadPoolExecutor(1, thread_name_prefix="encode", initializer=compute_alone) as thread:
        rest = iter(todo)
        coming: deque[tuple[Sequence[Question], Future[list[Any]]]] = deque()

        def begin(count: int) -> None:
            coming.extend((questions, thread.submit(lambda q: [encode(one) for one in q], questions)) for questions in islice(rest, count))

        try:
            begin(AHEAD)
            while coming:
                questions, made = coming.popleft()
                ready = made.result()
                begin(1)
                yield questions, ready
        finally:
            for _, made in coming:
                made.cancel()


def _encoded(model: Model, question: Question, sampling: Sampling) -> Any:
    """The question ready for the model, or what is wrong with it."""
    try:
        return model.encode(question.conversation(), sampling)
    except Exception as error:  # a bug met by one question must not cost the others
        return error


def _replies(model: Model, encoded: Sequence[Any], sampling: Sampling) -> list[str | Exception]:
    """The replies; where a batch fails, those of its halves: what was too much at once may fit, and one bad question stands alone."""
    try:
        return [*model.reply_encoded(encoded, sampling)]
    except Exception as error:
        if len(encoded) == 1:
            return [error]
    middle = len(encoded) // 2
    return [*_replies(model, encoded[:middle], sampling), *_replies(model, encoded[middle:], sampling)]


def _said(error: Exception) -> tuple[str, str]:
    if isinstance(error, LlavaError):
        return error.code, str(error)
    return "fault", f"{type(error).__name__}: {error}"


def _unbroken(query: Query, completion: Completion) -> str | None:
    return completion.finish if completion.finish in ("cut", "filter") else None


def _ended(folder: RunFolder, fresh: int, exit_code: int = 0) -> Outcome:
    whole = folder.settle() if exit_code == 0 else False
    failures = folder.failures() if whole else folder.failed
    answered = len(set(folder.asked)) - len(failures) if whole else sum(name in folder.known for name in folder.asked)
    if whole and failures and not answered:
        raise nobody(len(failures), failures[-1])
    return Outcome(answered=answered, fresh=fresh, failures=failures, whole=whole, exit_code=exit_code)
