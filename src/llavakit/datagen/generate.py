"""The pipeline: tasks -> queries -> a teacher -> the ledger, and from the ledger alone what became of every task.

    plan --query--> ask_all --paid for--> ledger          ledger --read, check--> Made --> rows, rejects (views)
                       |                    ^                  ^
                       '------ judge -------'                  '-- changed parsers and checks read old replies again, for nothing

A judge sees one reply. What only a whole run can tell (duplicates) is decided when the views are written, in the order of the plan. With
``review`` every accepted row is shown to the teacher once more, with the question whether it may be used at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llavakit.datagen.checks import Rules, check
from llavakit.datagen.kinds import Prompts
from llavakit.datagen.parse import Reject, Turns, read, verdict
from llavakit.datagen.plan import Task
from llavakit.datagen.rows import filled
from llavakit.responder import Completer, Completion, Query
from llavakit.responder.ledger import Ledger
from llavakit.responder.pool import Judge, Limits, Outcome, Settled, ask_all, settled
from llavakit.responder.progress import Progress
from llavakit.types import Image, Sampling

REVIEW = Sampling(max_new_tokens=64)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides the rows; ``tasks`` are gone through more than once.

    ``images`` is where a teacher who sees finds the pictures; None shows none.
    """

    tasks: Iterable[Task]
    prompts: Prompts
    sampling: Sampling
    rules: Rules = field(default_factory=Rules)
    images: Path | None = None
    review: bool = False
    again: int = Limits.again

    def query(self, task: Task) -> Query:
        return task.query(self.prompts, self.sampling, self._picture(task))

    def read(self, task: Task, completion: Completion) -> Turns | Reject:
        """The turns of a reply with the person's words filled in, or why it is not used."""
        turns = read(task.kind, completion.text, completion.finish)
        if isinstance(turns, Reject):
            return turns
        turns = filled(task, turns)
        context = task.context if task.kind != "answer" else None
        return check(task.kind, turns, context, self.rules) or turns

    def judge(self, task: Task) -> Judge:
        """The pool's judge of one task's replies."""

        def judge(query: Query, completion: Completion) -> str | None:
            return _reason(self.read(task, completion))

        return judge

    def reviewed(self, task: Task, turns: Turns) -> Query:
        """The question whether a row may be used."""
        said = "\n\n".join(f"Question: {question}\n\nAnswer: {answer}" for question, answer in turns)
        asked = self.prompts.of("filter").ask(said, self._picture(task))
        return Query(id=f"{task.id}-review", conversation=asked, sampling=REVIEW.but(seed=task.seed))

    def _picture(self, task: Task) -> Image | None:
        return Image(self.images / task.context.image) if self.images is not None else None


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A reply that is not used: which one, why, and its words."""

    attempt: int
    reject: Reject
    text: str


@dataclass(frozen=True, kw_only=True)
class Made:
    """What became of a task. Without turns and without ``settled`` it is still to be asked."""

    task: Task
    turns: Turns | None = None
    attempt: int = 0
    seed: int | None = None
    model: str = ""
    refused: tuple[Refused, ...] = ()
    settled: bool = True


def run(
    job: Job,
    teacher: Completer,
    ledger: Ledger,
    *,
    limits: Limits,
    on_progress: Callable[[Progress], None] | None = None,
    total: int | None = None,
) -> Outcome:
    """Ask what the ledger does not know; the review is a second round over what was accepted."""
    under_way: dict[str, Task] = {}

    def queries() -> Iterator[Query]:
        for task in job.tasks:
            under_way[task.id] = task
            yield job.query(task)

    def judge(query: Query, completion: Completion) -> str | None:
        return job.judge(under_way[query.id])(query, completion)

    def forget(done: Settled) -> None:
        del under_way[done.query.id]

    outcome = ask_all(
        queries(), teacher, ledger, limits=limits, judge=judge, on_settled=forget, on_progress=on_progress, total=total
    )  # fmt: skip
    if not job.review or outcome.exit_code:
        return outcome
    reviews = (job.reviewed(made.task, made.turns) for made in _accepted(job, teacher.name, ledger) if made.turns)
    return ask_all(reviews, teacher, ledger, limits=limits, judge=_verdict_reason, on_progress=on_progress)


def made(job: Job, teacher: str, ledger: Ledger) -> Iterator[Made]:
    """Every task in the order of the plan, as the ledger knows it."""
    for one in _accepted(job, teacher, ledger):
        yield _reviewed(job, one, teacher, ledger) if job.review and one.turns else one


def _accepted(job: Job, teacher: str, ledger: Ledger) -> Iterator[Made]:
    for task in job.tasks:
        found: list[tuple[Turns | Reject, str]] = []

        def judge(query: Query, completion: Completion, task: Task = task, found: list[tuple[Turns | Reject, str]] = found) -> str | None:
            found.append((job.read(task, completion), completion.text))
            return _reason(found[-1][0])

        done = settled(job.query(task), teacher, ledger, judge=judge, again=job.again)
        refused = tuple(
            Refused(attempt=number, reject=read, text=text) for number, (read, text) in enumerate(found) if isinstance(read, Reject)
        )
        turns = found[-1][0] if done is not None and done.accepted else None
        if done is None or done.accepted is None or turns is None or isinstance(turns, Reject):
            yield Made(task=task, refused=refused, settled=done is not None)
            continue
        seed = done.asked.sampling.seed
        yield Made(task=task, turns=turns, attempt=len(done.rejects), seed=seed, model=done.accepted.model, refused=refused)


def _reviewed(job: Job, one: Made, teacher: str, ledger: Ledger) -> Made:
    """The same, or without its turns where the review drops it, cannot tell, or is still to come."""
    assert one.turns
    done = settled(job.reviewed(one.task, one.turns), teacher, ledger, judge=_verdict_reason, again=job.again)
    if done is None:
        return Made(task=one.task, refused=one.refused, settled=False)
    said = verdict(done.accepted.text) if done.accepted else Reject("no_verdict", "the review says neither KEEP nor DROP")
    if said is None:
        return one
    why = said if isinstance(said, Reject) else Reject("dropped", said)
    text = "\n\n".join(answer for _, answer in one.turns)
    return Made(task=one.task, refused=(*one.refused, Refused(attempt=one.attempt, reject=why, text=text)))


def _reason(found: Turns | Reject) -> str | None:
    return f"{found.code}: {found.detail}" if isinstance(found, Reject) else None


def _verdict_reason(query: Query, completion: Completion) -> str | None:
    said = verdict(completion.text) if completion.finish == "stop" else Reject("no_verdict", completion.finish)
    return _reason(said) if isinstance(said, Reject) else None
