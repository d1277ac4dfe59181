"""ScienceQA: 4,241 multiple-choice questions of the test split, half of them with a picture (spec 6.4).

    protocol        asks                                             hears
    llava-1.5       question / A. x / B. y / answer with the letter  B
    converted       the same from the converter's lines (CQM-A)      B, The answer is B.
    v1              QCM: question, context, (A) x (B) y              lecture, solution, The answer is B.
    v0, v0-greedy   the same in two passes (``two_pass``)            lecture, solution, The answer is B.
    answer-first    the same                                         The answer is B. BECAUSE: ...

What an answer says is found by ``extract``, counted by ``tally`` in the columns of the papers' tables. Scoring is pure; the files are read
and written by ``scienceqa_files``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavakit.data.scienceqa import BARE, LETTERS, Problem, turns
from llavakit.errors import DataError
from llavakit.eval import scienceqa_files as files
from llavakit.eval.benchmark import LETTER, LLAVA_15, LLAVA_16, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.intervals import mean
from llavakit.eval.published import numbers
from llavakit.types import Image

FAILED = "FAILED"
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
AVERAGE = "Avg"
_SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_GRADES = {f"grade{year}": "G1-6" if year <= 6 else "G7-12" for year in range(1, 13)}
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the last character is any but a line end, as in the reference
_CODES: Mapping[str, tuple[str, str]] = {  # protocol -> how we ask, and the converter's file whose words are taken where it is there
    "llava-1.5": (BARE, "CQM-A"),
    "llava-1.6": (BARE, "CQM-A"),
    "converted": ("CQM-A", ""),
    "v1": ("QCM-LEA", "QCM-LEA"),
    "v0": ("QCM-LEPA", "QCM-LEPA"),
    "v0-greedy": ("QCM-LEPA", "QCM-LEPA"),
    "answer-first": ("QCM-ALE", "QCM-ALE"),
}


@dataclass(frozen=True, kw_only=True)
class Gold:
    """What scoring must know of a question."""

    answer: int
    choices: int
    columns: tuple[str, ...]

    @property
    def letter(self) -> str:
        return LETTERS[self.answer]


# ---- what an answer says


def extract(text: str) -> str:
    """The letter that an answer gives, or FAILED: the text is a letter A-E; begins with one and ``. ``; or says the sentence once."""
    if len(text) == 1 and text in LETTERS:
        return text
    if text[1:3] == ". " and text[0] in LETTERS:
        return text[0]
    return sentence(text)


def sentence(text: str) -> str:
    """The letter of ``The answer is X.`` where that is said exactly once, or FAILED: all that the scripts about GPT-4 look for."""
    found: list[str] = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def index(letter: str, choices: int, dice: random.Random | None = None) -> int:
    """Which choice a letter names; where it names none (FAILED, too far), -1, which is always wrong, or with ``dice`` any choice."""
    place = LETTERS.find(letter) if len(letter) == 1 else -1
    if 0 <= place < choices:
        return place
    return -1 if dice is None else dice.randrange(choices)


def columns(problem: Problem) -> tuple[str, ...]:
    """The columns that a question counts in: its subject, text and picture (both, or neither), its grade. Raises DataError."""
    subject, grade = _SUBJECTS.get(problem.subject), _GRADES.get(problem.grade)
    if subject is None or grade is None:
        what = f"'subject' is {problem.subject!r}" if subject is None else f"'grade' is {problem.grade!r}"
        remedy = f"it is one of {', '.join(_SUBJECTS)}" if subject is None else "it is grade1 to grade12"
        raise DataError(what, code="bad_problem", where=f"problem {problem.id}", remedy=remedy)
    shown = [name for name, there in (("TXT", problem.hint), ("IMG", problem.image)) if there]
    return (subject, *(shown or ["NO"]), grade)


def gold(problem: Problem) -> Gold:
    """Raises DataError."""
    return Gold(answer=problem.answer, choices=len(problem.choices), columns=columns(problem))


# ---- scores


def tally(marks: Iterable[tuple[Gold, bool]], *, headline: str = AVERAGE) -> list[Score]:
    """Percent right in each column that has questions, and of all, in the order of the papers' tables."""
    marks = list(marks)
    of = {name: [right for known, right in marks if name in known.columns] for name in COLUMNS} | {AVERAGE: [right for _, right in marks]}
    return [mean(name, rights, headline=name == headline) for name, rights in of.items() if rights]


def score(answered: Sequence[Answered]) -> list[Score]:
    """The eight columns and the average; a question without an answer is wrong."""
    return tally((one.question.truth, _right(one)) for one in answered)


def score_pictured(answered: Sequence[Answered]) -> list[Score]:
    """The questions with a picture alone: one number, IMG."""
    marks = [_right(one) for one in answered if "IMG" in one.question.truth.columns]
    return [mean("IMG", marks, headline=True)] if marks else []


def verdict(one: Answered) -> Verdict:
    """The letter found, the right one."""
    return Verdict(parsed=extract(one.text or FAILED), points=float(_right(one)), expected=one.question.truth.letter)


def _right(one: Answered) -> bool:
    known: Gold = one.question.truth
    return index(extract(one.text or FAILED), known.choices) == known.answer


# ---- the benchmark


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """The questions of the test split as the protocol asks them: in the words of the converter's file where it lies in the folder."""
    code, named = _CODES[protocol.name]
    problems, pictures = files.load(folder), files.pictures(folder)
    path = folder / f"llava_{files.SPLIT}_{named}.json"
    asked = files.read_converted(path, problems) if named and path.is_file() else {one.id: turns(one, code)[0] for one in problems}
    return [_question(problem, asked[problem.id], pictures, protocol) for problem in problems]


def questions_pictured(folder: Path, protocol: Protocol) -> list[Question]:
    """Those with a picture."""
    return [question for question in questions(folder, protocol) if question.image is not None]


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """The result file of the original's script: acc, correct, count, results {id: index}, outputs {id: text}."""
    outputs = {one.question.id: FAILED if one.text is None else one.text for one in answered}
    golds: dict[str, Gold] = {one.question.id: one.question.truth for one in answered}
    results = {name: index(extract(text), golds[name].choices) for name, text in outputs.items()}
    return files.write_result(folder, outputs, results, correct=sum(results[name] == known.answer for name, known in golds.items()))


def _question(problem: Problem, asked: str, pictures: Path, protocol: Protocol) -> Question:
    return Question(
        id=problem.id,
        given=problem.id,
        prompt=protocol.asked(asked),
        image=Image(pictures / problem.id / problem.image) if problem.image else None,
        category=problem.subject,
        truth=gold(problem),
    )


_FINE_TUNED = Protocol(
    name="v1", template="llava_v1", aspect="square", max_new_tokens=1024,
    note="For a model that was fine-tuned on ScienceQA: it reasons first. Its prediction file scores 91.09, the paper says 90.92.",
)  # fmt: skip
_TWICE = _FINE_TUNED.but(
    name="v0", template="llava_v0", temperature=0.7, passes=2,
    note="Two passes: the reasoning until ###, then the letter; both drawn at temperature 0.7, as published.",
)  # fmt: skip
_ZERO_SHOT = LLAVA_15.but(suffix=LETTER, max_new_tokens=1024, note="Not fine-tuned on ScienceQA: the letter alone is asked for.")
_WAYS = (
    _ZERO_SHOT,
    LLAVA_16.but(suffix=LETTER, max_new_tokens=1024, note=_ZERO_SHOT.note),
    _ZERO_SHOT.but(name="converted", note="As llava-1.5, in the lines that the original's converter writes (CQM-A)."),
    _FINE_TUNED,
    _TWICE,
    _TWICE.but(name="v0-greedy", temperature=0.0, note="As v0, but greedy: the same each time."),
    _FINE_TUNED.but(name="answer-first", note="For a model that was fine-tuned on QCM-ALE: the answer, then the reasons."),
)  # fmt: skip
PROTOCOLS = tuple(
    way.but(published=(*numbers("scienceqa", way.name, headline=AVERAGE), *numbers("scienceqa-img", way.name, headline="IMG")))
    for way in _WAYS
)
_NEEDS = (
    "problems.json and pid_splits.json of ScienceQA, pictures as images/test/ID/image.png (or test/ID/image.png); "
    "llava_test_CQM-A.json, llava_test_QCM-LEA.json and the like are used where they are there"
)
_REFERENCE = (
    "eval_science_qa.py of haotian-liu/LLaVA: a letter A-E alone, a letter and '. ' in front, or 'The answer is X.' exactly once; "
    "all else, and a letter beyond the choices, is wrong. The columns are those of lupantech/ScienceQA. "
    "Departure: whether a question has a picture is read from problems.json, not from the prompt"
)
SCIENCEQA = Benchmark(
    name="scienceqa", title="ScienceQA, test", needs=_NEEDS, reference=_REFERENCE, protocols=PROTOCOLS, questions=questions, score=score,
    verdict=verdict, submit=submit,
)  # fmt: skip
SCIENCEQA_IMG = Benchmark(
    name="scienceqa-img", title="ScienceQA, test, the questions with a picture", needs=_NEEDS, reference=_REFERENCE, protocols=PROTOCOLS,
    questions=questions_pictured, score=score_pictured, verdict=verdict, submit=submit,
)  # fmt: skip
