"""A judge gives two answers to one question a score each, told what the picture shows but not shown it (spec 6.6).

    [Context]      what the picture shows, in words            system   one line: who the judge is
    [Question]                                                 user     these blocks
    [Assistant 1]  the reference  [End of Assistant 1]
    [Assistant 2]  the candidate  [End of Assistant 2]         reply    8 6
    [System]       the rule of the question's category                  Assistant 1 names ...

The structure is upstream's, the words are ours; ``Rules.load`` takes upstream's own rule file. A reply whose first line does not hold two
scores is asked for again with another seed and reported, where upstream counts it as -1 : -1, which is a perfect 100 %; ``upstream=True``
does as upstream does. All replies are in the ledger, and what becomes of a case follows from it alone (``responder.pool``).
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llavakit.errors import DataError
from llavakit.eval.official import as_row, read_object
from llavakit.eval.resample import Pair
from llavakit.responder import Completer, Completion, Ledger, Limits, Outcome, Progress, Query, Settled, ask_all, settled
from llavakit.types import Conversation, Image, Sampling, system, user

SAMPLING = Sampling(temperature=0.2, max_new_tokens=1024, seed=0)
LOWEST, HIGHEST = 1.0, 10.0
UNPARSABLE: Pair = (-1.0, -1.0)  # upstream's scores for a review without any
AGAIN = 4
WILD = "llava_bench_"  # before the category where the picture is told in sentences
SYSTEM = "You check how good answers are; you do it helpfully and with precision."
_BOTH = "Two AI assistants have answered the question above, and your opinion of their answers is wanted."
_BOXES = (
    " Who asked was looking at an image. What it shows is told to you twice: in five sentences that describe it, and as the objects in it,"
    " each with its bounding box (x1, y1, x2, y2): left, top, right and bottom in fractions of the image, from 0 to 1."
)
_WORDS = " Who asked was looking at an image. What it shows is told to you in a few sentences that describe it."
_SCORES = (
    "\nJudge how helpful, relevant, accurate and detailed each answer is, and give each assistant one score for all of that, from 1 to 10;"
    " the better the answer, the higher the score.\nYour first line holds the two scores and nothing else: that of Assistant 1, one space,"
    " that of Assistant 2.\nFrom the second line on, give your reasons in full. Be fair to both: which answer stands first must not matter."
)
_MATH = " Before you look at their answers, solve the problem yourself. Then check every step of each, and count the steps as well."
_CODE = " They were asked for a program. See whether it does what is wanted, how it goes about it, and whether it reads well."


@dataclass(frozen=True)
class Rule:
    """What the judge is told of one category, and what the two who answered are called."""

    prompt: str
    role: str = "Assistant"


_SEEN, _TOLD = Rule(_BOTH + _BOXES + _SCORES), Rule(_BOTH + _WORDS + _SCORES)
RULES: Mapping[str, Rule] = {
    "default": Rule(_BOTH + _SCORES),
    "coding": Rule(_BOTH + _CODE + _SCORES),
    "math": Rule(_BOTH + _MATH + _SCORES),
    **dict.fromkeys(("conv", "detail", "complex"), _SEEN),
    **dict.fromkeys((f"{WILD}conv", f"{WILD}detail", f"{WILD}complex"), _TOLD),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Two answers to one question. ``given`` is the official question_id; the ids of the answers are for the review file."""

    id: str
    given: str | int
    category: str
    question: str
    reference: str
    candidate: str
    context: str = ""
    reference_id: str | int = ""
    candidate_id: str | int = ""
    image: Image | None = field(default=None, repr=False)
    "For the page of reviews; the judge sees none."


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All that a judge is told beside the case."""

    system: str = SYSTEM
    table: Mapping[str, Rule] = field(default_factory=lambda: RULES)

    @staticmethod
    def load(path: Path, *, system: str = SYSTEM) -> Rules:
        """From a file like upstream's: {category: {"role", "prompt"}}. Raises DataError."""
        whole = read_object(path)
        rows = {name: as_row(value, f"{path}: {name}") for name, value in whole.items()}
        table = {name: Rule(row.text("prompt"), row.text("role") if "role" in row else "Assistant") for name, row in rows.items()}
        return Rules(system=system, table=table)

    def ask(self, case: Case, *, swapped: bool = False) -> Conversation:
        """The open conversation. ``swapped``: the candidate stands first. Raises DataError for a category without a rule."""
        rule = self.table.get(case.category)
        if rule is None:
            remedy = f"the rules are for {', '.join(sorted(self.table))}"
            raise DataError(f"no rule for category {case.category!r}", code="bad_record", where=f"question {case.given}", remedy=remedy)
        first, second = (case.candidate, case.reference) if swapped else (case.reference, case.candidate)
        context = f"[Context]\n{case.context}\n\n" if case.context else ""
        answers = "".join(
            f"[{rule.role} {number}]\n{text}\n\n[End of {rule.role} {number}]\n\n" for number, text in enumerate((first, second), 1)
        )
        asked = f"{context}[Question]\n{case.question}\n\n{answers}[System]\n{rule.prompt}\n\n"
        return Conversation((system(self.system), user(sendable(asked))))

    def digest(self, category: str) -> str:
        """Twelve digits that stand for the prompt of a category: another wording is another judge."""
        case = Case(id="", given="", category=category, question="Q", reference="R", candidate="C", context="X")
        said = [message.text for message in self.ask(case).messages]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def parse_scores(text: str) -> Pair | None:
    """The two scores of a review, or None: first line, commas are blanks, one blank between exactly two numbers (spec 6.6).

    As strict and as lenient as upstream: ``8, 6`` has two blanks and is no score, ``8,6`` is one, and so is whatever Python calls a number.
    """
    words = text.split("\n")[0].replace(",", " ").split(" ")
    if len(words) != 2:
        return None
    try:
        return float(words[0]), float(words[1])
    except ValueError:
        return None


def problem(completion: Completion) -> str | None:
    """Why a reply is no review; None where it is one. An explanation cut at the allowance does no harm, a first line that is cut may."""
    if completion.finish not in ("stop", "length") or (completion.finish == "length" and "\n" not in completion.text):
        return completion.finish
    scores = parse_scores(completion.text)
    if scores is None:
        return "unparsable"
    return None if all(LOWEST <= score <= HIGHEST for score in scores) else "out_of_range"


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A reply that is not used, and why."""

    reason: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one order of the answers came to. ``scores`` are (reference, candidate) whichever stood first; None: no review."""

    scores: Pair | None
    text: str = ""
    model: str = ""
    "The version that the server says it is."
    seed: int | None = None
    refused: tuple[Refused, ...] = ()
    asked: bool = True
    "False: still to be asked."


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A case with its readings: one, or two with the order swapped. ``scores`` is their mean, None unless all have some."""

    case: Case
    readings: tuple[Reading, ...]

    @property
    def scores(self) -> Pair | None:
        found = [reading.scores for reading in self.readings if reading.scores is not None]
        if len(found) < len(self.readings):
            return None
        return statistics.fmean(a for a, _ in found), statistics.fmean(b for _, b in found)

    @property
    def asked(self) -> bool:
        return all(reading.asked for reading in self.readings)

    @property
    def refused(self) -> tuple[Refused, ...]:
        return tuple(one for reading in self.readings for one in reading.refused)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides the reviews.

    ``swap`` asks each case in both orders; ``upstream`` takes the first reply as it is, -1 : -1 where it holds no two numbers.
    """

    cases: Sequence[Case]
    rules: Rules = field(default_factory=Rules)
    sampling: Sampling = SAMPLING
    swap: bool = False
    upstream: bool = False
    again: int = AGAIN

    @property
    def tries(self) -> int:
        """How often a reply that is no review is asked for anew."""
        return 0 if self.upstream else self.again

    def __len__(self) -> int:
        return len(self.cases) * (2 if self.swap else 1)

    def query(self, case: Case, *, swapped: bool = False) -> Query:
        name = f"{case.id}-swapped" if swapped else case.id
        return Query(id=name, conversation=self.rules.ask(case, swapped=swapped), sampling=self.sampling)

    def queries(self) -> Iterator[Query]:
        for case in self.cases:
            for swapped in self.orders:
                yield self.query(case, swapped=swapped)

    @property
    def orders(self) -> tuple[bool, ...]:
        return (False, True) if self.swap else (False,)

    def accept(self, query: Query, completion: Completion) -> str | None:
        """The pool's judge of the judge's replies."""
        return None if self.upstream else problem(completion)


def run(job: Job, judge: Completer, ledger: Ledger, *, limits: Limits, on_progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Ask what the ledger does not know."""
    limits = replace(limits, again=job.tries)
    return ask_all(job.queries(), judge, ledger, limits=limits, judge=job.accept, on_progress=on_progress, total=len(job))


def judged(job: Job, judge: str, ledger: Ledger) -> list[Judged]:
    """Every case in order, as the ledger knows it; ``judge`` is the completer's name."""
    return [
        Judged(case=case, readings=tuple(_reading(job, job.query(case, swapped=swapped), judge, ledger, swapped) for swapped in job.orders))
        for case in job.cases
    ]


def first_bias(found: Sequence[Judged]) -> float | None:
    """By how many points the answer that stands first is favoured, of cases judged in both orders; None where there are none."""
    both = [(a.scores, b.scores) for a, b in (one.readings for one in found if len(one.readings) == 2) if a.scores and b.scores]
    gains = [gain for plain, swapped in both for gain in (plain[0] - swapped[0], swapped[1] - plain[1])]
    return statistics.fmean(gains) if gains else None


def _reading(job: Job, query: Query, judge: str, ledger: Ledger, swapped: bool) -> Reading:
    refused: list[Refused] = []

    def accept(asked: Query, completion: Completion) -> str | None:
        reason = job.accept(asked, completion)
        if reason is not None:
            refused.append(Refused(reason=reason, text=completion.text))
        return reason

    done: Settled | None = settled(query, judge, ledger, judge=accept, again=job.tries)
    if done is None or done.accepted is None:
        return Reading(scores=None, refused=tuple(refused), asked=done is not None)
    scores = parse_scores(done.accepted.text) or UNPARSABLE
    return Reading(
        scores=(scores[1], scores[0]) if swapped else scores,
        text=done.accepted.text,
        model=done.accepted.model,
        seed=done.asked.sampling.seed,
        refused=tuple(refused),
    )


def sendable(text: str) -> str:
    """Without what no prompt can hold: a model under evaluation may have said it."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()
