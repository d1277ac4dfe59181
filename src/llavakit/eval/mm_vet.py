"""MM-Vet: 218 open questions, each needing some of six capabilities; a judge gives each answer 0.0 to 1.0.

    mm-vet.json   {"v1_0": {imagename, question, answer, capability: ["ocr", "math"]}, ...}        images/v1_0.png

The grader's structure is the official one, in words of our own: a table with examples to be continued by one number,

    Question | Ground truth | Prediction | Correctness
    ...                                                <AND>: all of these, <OR>: one of these
    the question | the ground truth | the answer |

and where the first word of the reply is no number from 0 to 1, the question again with one more line, warmer each time. The official
upload is ``{"v1_0": text, ...}``; grade files are the official grader's, where every list has an item for each run:
``{"v1_0": {"model": [..], "content": [..], "score": [..]}}``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from llavakit.eval import report
from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, Answered, Benchmark, Protocol, Question, Score
from llavakit.eval.files import json_file
from llavakit.eval.judge import sendable
from llavakit.eval.llava_bench import read_answers
from llavakit.eval.official import as_row, bad, read_object
from llavakit.eval.published import with_numbers
from llavakit.eval.resample import bootstrap
from llavakit.responder import Completer, Completion, Ledger, Limits, Outcome, Progress, Query, ask_all
from llavakit.types import Conversation, Image, Sampling, user

PROMPT = """\
A table of predictions that AI models made, each compared with the ground truth. The last column says how right the prediction is, in \
tenths from 0.0 (all of it is wrong) to 1.0 (all of it is right). Where the ground truth has <AND>, a prediction is only all right with \
every part of it; where it has <OR>, any one of the parts is enough. Continue the table with the one number that is missing, and with \
nothing else.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which numbers solve the equation? | 2 <AND> -7 | 4 | 0.0
Which numbers solve the equation? | 2 <AND> -7 | x is 2 | 0.5
Which numbers solve the equation? | 2 <AND> -7 | -7 or 7 | 0.5
Which numbers solve the equation? | 2 <AND> -7 | 2, and also -7 | 1.0
What is the man holding? | umbrella <OR> parasol | It is a parasol. | 1.0
Why is this drawing funny? | The cat wears the collar and holds the leash, so the cat is walking its owner: who belongs to whom is turned \
around. | There is a cat and a person on a leash. | 0.4
Why is this drawing funny? | The cat wears the collar and holds the leash, so the cat is walking its owner: who belongs to whom is turned \
around. | The joke is the exchange of roles. Usually people walk their pets; here the cat leads and the person follows on the leash. | 1.0
"""
AGAIN = "How right is the prediction? One number: "
TRIES = ((False, 0.0), (True, 0.0), (True, 0.5), (True, 1.0), (True, 1.5))  # with the line of AGAIN; temperature
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TOTAL = "total"


def parse_grade(text: str) -> float | None:
    """The grade, or None: the first word, up to a blank, is a number from 0 to 1."""
    try:
        grade = float(text.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What the grader compares with, and what the question takes."""

    answer: str
    capabilities: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    question: str
    truth: Truth
    candidate: str
    image: Image | None = None


@dataclass(frozen=True, kw_only=True)
class Grade:
    """One run's grade of one answer; None: no reply held any (``asked``) or it is still to be asked."""

    value: float | None
    content: str = ""
    model: str = ""
    tries: int = 0
    asked: bool = True


class Column(NamedTuple):
    """One capability, or one mix of them, in percent: mean over runs."""

    mean: float
    runs: tuple[float, ...]
    questions: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides the grades. ``upstream`` counts an answer without a grade as 0, as the official grader does."""

    cases: Sequence[Case]
    runs: int = 1
    prompt: str = PROMPT
    max_tokens: int = 3
    upstream: bool = False

    def query(self, case: Case, run: int, number: int) -> Query:
        again, temperature = TRIES[number]
        truth = case.truth.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        row = " | ".join((case.question, truth, case.candidate, ""))
        text = f"{self.prompt}\n{row}" + (f"\n{AGAIN}" if again else "")
        sampling = Sampling(temperature=temperature, max_new_tokens=self.max_tokens, seed=run)
        return Query(id=f"{case.id}-{run}", conversation=Conversation((user(sendable(text)),)), sampling=sampling)

    @property
    def digest(self) -> str:
        """Stands for the prompt."""
        return hashlib.sha256(json.dumps([self.prompt, AGAIN]).encode()).hexdigest()[:12]


def run(job: Job, judge: Completer, ledger: Ledger, *, limits: Limits, on_progress: Callable[[Progress], None] | None = None) -> Outcome:
    """Ask what the ledger does not know: all once, then those without a grade once more in the next way, and so on."""
    open_ = [(case, number) for number in range(job.runs) for case in job.cases]
    outcome: Outcome | None = None
    for number in range(len(TRIES)):
        queries: Iterator[Query] = (job.query(case, turn, number) for case, turn in open_)
        outcome = ask_all(
            queries, judge, ledger, limits=replace(limits, again=0), judge=_take, on_progress=on_progress, total=len(open_)
        )  # fmt: skip
        open_ = [one for one in open_ if _refused(job.query(*one, number), judge.name, ledger)]
        if outcome.exit_code or not open_:
            break
    assert outcome
    return outcome


def grades(job: Job, judge: str, ledger: Ledger) -> dict[str, list[Grade]]:
    """Every answer's grades, run by run, as the ledger knows them."""
    return {case.id: [_grade(job, case, number, judge, ledger) for number in range(job.runs)] for case in job.cases}


def values(grades: Mapping[str, Sequence[Grade]]) -> dict[str, list[float]]:
    """The grades of answers that have one in every run."""
    found = {name: [one.value for one in told if one.value is not None] for name, told in grades.items()}
    return {name: told for name, told in found.items() if len(told) == len(grades[name])}


def _take(query: Query, completion: Completion) -> str | None:
    """Every reply counts as one: what is no grade is asked differently, not again."""
    return None


def _refused(query: Query, judge: str, ledger: Ledger) -> bool:
    completion = ledger.get(query.key(judge))
    return completion is not None and parse_grade(completion.text) is None


def _grade(job: Job, case: Case, run: int, judge: str, ledger: Ledger) -> Grade:
    said = Completion(text="", finish="stop", model="")
    for number in range(len(TRIES)):
        completion = ledger.get(job.query(case, run, number).key(judge))
        if completion is None:
            return Grade(value=None, content=said.text, model=said.model, tries=number, asked=False)
        said = completion
        if (value := parse_grade(said.text)) is not None:
            return Grade(value=value, content=said.text, model=said.model, tries=number + 1)
    return Grade(value=0.0 if job.upstream else None, content=said.text, model=said.model, tries=len(TRIES))


# --- from grades to numbers -----------------------------------------------------------------------------------------------------------


def columns(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Collection[str]]) -> dict[str, Column]:
    """Mean grades x 100 of every capability, most frequent first, and ``total``. A question counts in each of its capabilities."""
    return _columns(grades, {name: set(capabilities[name]) for name in grades})


def mixes(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Collection[str]]) -> dict[str, Column]:
    """The same of the questions that take exactly the same capabilities (``ocr_math``), and ``total``."""
    return _columns(grades, {name: {"_".join(sorted(set(capabilities[name])))} for name in grades})


def _columns(grades: Mapping[str, Sequence[float]], groups: Mapping[str, Collection[str]]) -> dict[str, Column]:
    counts = Counter(group for name in grades for group in groups[name])
    found = {}
    for group, count in [*sorted(counts.items(), key=lambda one: (-one[1], one[0])), (TOTAL, len(grades))]:
        rows = [told for name, told in grades.items() if group == TOTAL or group in groups[name]]
        if not rows:
            continue
        runs = tuple(100 * math.fsum(run) / count for run in zip(*rows, strict=True))
        found[group] = Column(mean=statistics.fmean(runs), runs=runs, questions=count)
    return found


def scores(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Collection[str]], *, seed: int = 0) -> list[Score]:
    """The columns with intervals by bootstrap over questions."""
    found = []
    for name, column in columns(grades, capabilities).items():
        rows = [statistics.fmean(told) for one, told in grades.items() if name == TOTAL or name in capabilities[one]]
        half = bootstrap(rows, statistics.fmean, seed=seed).half_width
        half = None if half is None else 100 * half
        found.append(Score(metric=name, value=column.mean, count=column.questions, half_width=half, headline=name == TOTAL))
    return found


def table(grades: Mapping[str, Sequence[float]], capabilities: Mapping[str, Collection[str]]) -> str:
    """Markdown: capability, questions, mean x 100 with its interval; the runs of the total and their deviation (of n, as officially)."""
    told = scores(grades, capabilities)
    rows: report.Rows = [("capability", "questions", "score (95 %)"), *((one.metric, str(one.count), report.shown(one)) for one in told)]
    runs = columns(grades, capabilities)[TOTAL].runs
    spread = f"\n\nruns: {', '.join(f'{run:.1f}' for run in runs)}; sd {statistics.pstdev(runs):.1f}" if len(runs) > 1 else ""
    return report.markdown(rows) + spread


# --- files ----------------------------------------------------------------------------------------------------------------------------


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """The questions of mm-vet.json in its order. Pictures are not opened."""
    found = []
    path = folder / "mm-vet.json"
    for name, value in read_object(path).items():
        row = as_row(value, f"{path}: {name}")
        truth = Truth(answer=row.text("answer"), capabilities=frozenset(map(str, row.list("capability"))))
        number = re.fullmatch(r"v1_(\d+)", name)
        found.append(
            Question(
                id=name,
                given=int(number[1]) if number else name,
                prompt=protocol.asked(row.text("question")),
                image=Image(folder / "images" / row.text("imagename")),
                category="_".join(sorted(truth.capabilities)),
                truth=truth,
            )
        )
    return found


def cases(folder: Path, answers: Path) -> list[Case]:
    """Every question with its answer: from an answers file (by number or name) or an official upload.

    Raises DataError where one is missing.
    """
    given = _answers(answers)
    found = []
    for question in questions(folder, Protocol(name="")):
        text = given.get(question.id, given.get(str(question.given)))
        if text is None:
            remedy = "answer all questions first (the harness goes on where it stopped)"
            raise bad(f"question {question.id} has no answer", answers, remedy, code="unanswered")
        found.append(Case(id=question.id, question=question.prompt, truth=question.truth, candidate=text, image=question.image))
    return found


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """The official upload: {"v1_0": text}. A question without an answer is an empty text there, as a person can see."""
    rows = {one.question.id: one.text or "" for one in answered}
    return json_file(folder / "mm-vet-answers.json", rows, indent=2)


def write_grades(path: Path, grades: Mapping[str, Sequence[Grade]]) -> Path:
    """The official grader's file, of answers that have a grade in every run."""
    rows = {
        name: {"model": [one.model for one in grades[name]], "content": [one.content for one in grades[name]], "score": told}
        for name, told in values(grades).items()
    }
    return json_file(path, rows, indent=2)


def read_grades(path: Path) -> dict[str, list[float]]:
    """Grades by question, a run each. Raises DataError where questions have been graded a different number of times."""
    found: dict[str, list[float]] = {}
    whole = read_object(path)
    for name, value in whole.items():
        row = as_row(value, f"{path}: {name}")
        told = row.list("score")
        if not told or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in told):
            raise row.fail("no scores")
        found[name] = [float(one) for one in told]
    if len({len(told) for told in found.values()}) != 1:
        raise whole.fail("no grades, or some questions graded more often than others")
    return found


def _answers(path: Path) -> dict[str, str]:
    if path.suffix == ".jsonl":
        return {name: answer.text for name, answer in read_answers(path).items()}
    whole = read_object(path)
    return {name: whole.text(name) for name in whole}


MM_VET = Benchmark(
    name="mm-vet",
    title="MM-Vet",
    needs="mm-vet.json and images/ of mm-vet.zip (yuweihao/MM-Vet, release v1)",
    reference="mm-vet_evaluator.py of yuweihao/MM-Vet and its server whyu/MM-Vet_Evaluator: rows, tries and columns. We depart: prompt and"
    " examples are our own (--rules takes a text file with others); an answer without a grade after five tries is left out and told, the"
    " official grader counts 0 (--upstream does); NaN is no grade",
    questions=questions,
    submit=submit,
    protocols=with_numbers(
        "mm-vet",
        TOTAL,
        LLAVA_15.but(max_new_tokens=1024, judge="gpt-4-0613", note="graded by the official server"),
        LLAVA_16.but(max_new_tokens=1024, judge="gpt-4-0613", note="each model in its own prompt format; graded by the official server"),
    ),
)
