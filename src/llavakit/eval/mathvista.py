"""MathVista (testmini): mathematics in pictures; choices, whole numbers, decimals, lists.

    testmini.json + images/, or the Hub's parquet files      query.json: the prompts as MathVista hands them out, if it is there

    reply --quick--> read by rules --------------------------.
            '------> a judge takes the answer out ----------- extraction --normal--> a choice, 12, 1.5, [1, 2] --equal?--> right
                     (none: the reply itself) --------------'

MathVista has a language model take the answer out of each reply that rules cannot read: ``extract`` asks any ``Completer``, in our own
words. Without one, a reply in sentences still means the choice it resembles most, but no number: ``read`` says for how many replies.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.eval import intervals
from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import unique
from llavakit.eval.choices import LETTERS
from llavakit.eval.edit_distance import distance
from llavakit.eval.mathvista_asking import EXAMPLES, NO_ANSWER, hint, query
from llavakit.eval.official import Row, as_row, parquets, picture, read_object, read_rows, there
from llavakit.eval.published import with_numbers
from llavakit.responder import Completer, Ledger, Limits, Outcome, Query, ask_all, settled
from llavakit.types import Conversation, Image, Sampling

CHOICE = "multi_choice"
SHORT_PROMPT = "short-prompt"
GROUPS = ("language", "source", "category", "task", "context", "grade", "skills")
_SAMPLING = Sampling(max_new_tokens=256)
_QUOTED = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What decides whether an answer is right. ``groups``: ("task", "geometry problem solving"), ..., ("skills", ...) several times."""

    question_type: str
    answer_type: str
    answer: str
    choices: tuple[str, ...] = ()
    precision: int | None = None
    query: str = ""
    groups: tuple[tuple[str, str], ...] = ()


def quick(text: str, problem: Problem) -> str | None:
    """An answer that rules can read: nothing, a choice, a number as it is due, what stands in ``The answer is "..."``. None: none."""
    if not text or (problem.question_type == CHOICE and text in problem.choices):
        return text
    kind = {"integer": int, "float": float}.get(problem.answer_type)
    if kind is not None:
        try:
            return str(kind(text))
        except ValueError:
            pass
    found = _QUOTED.search(text)
    return found[1] if found else None


def normal(extraction: str, problem: Problem, *, empty_is_wrong: bool = True) -> str | None:
    """The answer in the form of the truth, or None.

    A choice is named by its letter, alone or in brackets, or else is the one with the fewest edits to it, the first of several: so the
    reference gives even an empty answer the shortest choice, unless told not to.
    """
    if problem.question_type == CHOICE:
        extraction = extraction.strip()
        if not extraction and empty_is_wrong:
            return None
        if bracketed := _LETTER.search(extraction):
            extraction = bracketed[1].upper()
        place = LETTERS.find(extraction) if len(extraction) == 1 else -1
        return problem.choices[place] if 0 <= place < len(problem.choices) else most_similar(extraction, problem.choices)
    try:
        if problem.answer_type == "integer":
            return str(int(float(extraction)))
        if problem.answer_type == "float":
            return None if problem.precision is None else str(round(float(extraction), problem.precision))
    except (ValueError, OverflowError):
        return None
    return extraction


def most_similar(text: str, choices: Sequence[str]) -> str:
    return min(choices, key=lambda choice: distance(choice, text))


def extraction(answered: Answered, judged: Mapping[str, str]) -> str:
    """By rules, else by the judge, else the reply as it is."""
    text = (answered.text or "").strip()
    by_rules = quick(text, answered.question.truth)
    return by_rules if by_rules is not None else judged.get(answered.question.id, text)


def right(answered: Answered, judged: Mapping[str, str] = {}, *, empty_is_wrong: bool = True) -> bool:
    problem: Problem = answered.question.truth
    return normal(extraction(answered, judged), problem, empty_is_wrong=empty_is_wrong) == problem.answer


def scores(answered: Sequence[Answered], judged: Mapping[str, str] = {}, *, empty_is_wrong: bool = True) -> list[Score]:
    """Accuracy, the share of replies that were read by rules or judge, and accuracy by the properties that MathVista reports."""
    if not answered:
        return []
    hits: dict[str, list[bool]] = defaultdict(list)
    every, read = [], []
    for one in answered:
        problem: Problem = one.question.truth
        every.append(right(one, judged, empty_is_wrong=empty_is_wrong))
        read.append(one.question.id in judged or quick((one.text or "").strip(), problem) is not None)
        for key, value in (("question_type", problem.question_type), ("answer_type", problem.answer_type), *problem.groups):
            hits[f"{key}: {value}"].append(every[-1])
    found = [intervals.mean("accuracy", every, headline=True), intervals.mean("read", read)]
    return found + [intervals.mean(name, of) for name, of in sorted(hits.items())]


def verdict(answered: Answered) -> Verdict:
    problem: Problem = answered.question.truth
    parsed = normal(extraction(answered, {}), problem)
    return Verdict(parsed=parsed or "", points=float(parsed == problem.answer), expected=problem.answer)


# --- the judge ----------------------------------------------------------------------------------------------------------------------


def extraction_query(answered: Answered) -> Query:
    """What a judge is asked about one reply: examples, the question, the reply, and then only the answer is to follow."""
    asked = f"{EXAMPLES}\n\n{answered.question.truth.query}\n\nModel response: {(answered.text or '').strip()}\n\nExtracted answer: "
    return Query(id=answered.question.id, conversation=Conversation.ask(asked), sampling=_SAMPLING)


def unread(answered: Iterable[Answered]) -> Iterator[Answered]:
    """Those whose reply no rule can read."""
    return (one for one in answered if quick((one.text or "").strip(), one.question.truth) is None)


def extract(answered: Sequence[Answered], judge: Completer, ledger: Ledger, *, limits: Limits | None = None) -> Outcome:
    """Ask the judge about every reply that rules cannot read and the ledger does not know."""
    return ask_all([extraction_query(one) for one in unread(answered)], judge, ledger, limits=limits or Limits())


def judged(answered: Sequence[Answered], judge: str, ledger: Ledger, *, again: int = Limits.again) -> dict[str, str]:
    """id of a question -> the answer that the judge took out, as far as the ledger knows; ``judge`` is the completer's name."""
    found = {}
    for one in unread(answered):
        done = settled(extraction_query(one), judge, ledger, again=again)
        if done is not None and done.accepted is not None:
            text = done.accepted.text.strip()
            found[one.question.id] = "" if text.lower() == NO_ANSWER else text
    return found


# --- the files ----------------------------------------------------------------------------------------------------------------------


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    prompts = there(folder, "query.json", "data/query.json")
    handed_out: Mapping[str, Any] = {} if prompts is None else read_object(prompts)
    return unique([_question(row, image, protocol, handed_out) for row, image in _rows(folder)], folder)


def _rows(folder: Path) -> Iterator[tuple[Row, Image]]:
    """The problems with their pictures."""
    whole = there(folder, "testmini.json", "data/testmini.json")
    if whole is not None:
        for name, values in read_object(whole).items():
            where = f"{whole} problem {name}"
            row = Row({"pid": name, **as_row(values, where)}, where)
            yield row, Image(folder / row.text("image"))
    else:
        tables = parquets(folder, "testmini", instead="testmini.json")
        yield from ((row, picture(row, "decoded_image", path)) for path in tables for row in read_rows(path))


def _question(row: Row, image: Image, protocol: Protocol, handed_out: Mapping[str, Any]) -> Question:
    name, kind = row.text("pid"), row.one_of("question_type", CHOICE, "free_form")
    choices = row.texts("choices") if row.get("choices") is not None else ()
    if (kind == CHOICE) != bool(choices):
        raise row.fail(f"{len(choices)} choices for a question of type {kind}")
    precision = row.get("precision")
    if precision is not None and not isinstance(precision, int | float):
        raise row.fail(f"precision is {precision!r}, no number")
    short = protocol.name == SHORT_PROMPT
    unit, answer_type = row.get("unit"), row.text("answer_type")
    hinted = hint(answer_type, None if precision is None else int(precision), short=short)
    if hinted is None:
        raise row.fail(f"no instruction for an answer of type {answer_type} with precision {precision}")
    built = query(row.text("question"), choices, unit or "", hinted, short=short)
    given = handed_out.get(name, row.get("query"))
    prompt = given if isinstance(given, str) and given and not short else built
    problem = Problem(
        question_type=kind,
        answer_type=answer_type,
        answer=row.text("answer"),
        choices=choices,
        precision=None if precision is None else int(precision),
        query=prompt,
        groups=tuple(_groups(row)),
    )
    return Question(id=name, given=name, prompt=prompt, image=image, category=dict(problem.groups).get("task", ""), truth=problem)


def _groups(row: Row) -> Iterator[tuple[str, str]]:
    metadata = row.get("metadata") or {}
    for key in GROUPS:
        value = metadata.get(key)
        yield from ((key, str(item)) for item in (value if isinstance(value, list) else [value] if value is not None else []))


_NOTE = "MathVista's own prompts; answers were taken out of replies by a language model, so without a judge expect less"
MATHVISTA = Benchmark(
    name="mathvista",
    title="MathVista: mathematics in pictures",
    needs="testmini.json and images/ of MathVista (query.json is used if it is there), or the testmini parquet files of AI4Math/MathVista",
    reference="extract_answer.py and calculate_score.py of lupantech/MathVista. Departures: an empty or missing answer is wrong where there"
    " it is the shortest choice (empty_is_wrong=False); blanks around a reply do not count; without a judge a reply that rules cannot read"
    " is taken as it is; the judge is asked in our own words",
    protocols=with_numbers(
        "mathvista",
        "accuracy",
        LLAVA_16.but(max_new_tokens=1024, judge="gpt-4", note=_NOTE),
        LLAVA_15.but(max_new_tokens=1024, judge="gpt-4", note=_NOTE),
        Protocol(
            name=SHORT_PROMPT,
            max_new_tokens=1024,
            note="asks for the bare answer, as lmms-eval's mathvista_testmini_format: needs no judge",
        ),
    ),
    questions=questions,
    score=scores,
    verdict=verdict,
)
