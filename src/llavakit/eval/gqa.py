"""GQA: exact match, and what the official script computes beside it.

    metric         of which questions                          what it is
    accuracy       balanced                                    prediction == answer, character by character
    binary, open   balanced, structural type query or not      the same
    validity       balanced; needs a choices file              the prediction is a possible answer ("red" to a question of colour)
    plausibility   balanced; needs a choices file              ... and one that occurs in such pictures
    consistency    right ones that entail others               how many of those are right; all entailed questions must be asked
    distribution   balanced, by group of questions             chi-square of predicted against true answers / 100; lower is better

Not computed: grounding, which wants attention maps. The official script asks for scene graphs and choices of test-dev that were never
released, which is why LLaVA's users patch it; here what a file is missing for is left out of the report.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, SHORT, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import complete, truths, unique
from llavakit.eval.files import json_file
from llavakit.eval.intervals import by_group, mean
from llavakit.eval.official import Row, as_row, bad, find, pictures, read_json, there
from llavakit.eval.published import with_numbers
from llavakit.eval.vqa_questions import upstream
from llavakit.types import Image

_FOLDERS = ("", "data/", "questions1.2/", "data/questions1.2/", "questions/", "data/questions/")  # where people unpack it
_KINDS = ("color", "material", "shape")  # the possible answers to "what is common": the script's own
_NO_STEP = ("exist", "query: name", "choose name")  # operations that end a program and are no step of reasoning
ALL_QUESTIONS = "all-questions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What the official file knows of a question; None or empty where it does not say."""

    answer: str
    balanced: bool = True
    structural: str = ""
    semantic: str = ""
    group: str | None = None
    entailed: tuple[str, ...] = ()
    words: int = 0
    steps: int | None = None
    valid: frozenset[str] | None = None
    plausible: frozenset[str] | None = None


def prediction(text: str) -> str:
    """A reply as upstream uploads it: full stops at the end go, lower case. Blanks stay, and count."""
    return text.rstrip(".").lower()


def right(one: Answered) -> bool:
    """Exact match; no answer is wrong."""
    truth: Truth = one.question.truth
    return one.text is not None and prediction(one.text) == truth.answer


def distribution(gold: Mapping[str, Mapping[str, int]], predicted: Mapping[str, Mapping[str, int]]) -> float:
    """Chi-square of each group over its true answers, weighted by the group's size, / 100. 0 is best."""
    total = weighted = 0.0
    for group, answers in gold.items():
        size = sum(answers.values())
        given = predicted.get(group, {})
        weighted += size * sum((given.get(answer, 0) - count) ** 2 / count for answer, count in answers.items())
        total += size
    return weighted / total / 100


def score(answered: Sequence[Answered]) -> list[Score]:
    """All metrics that the files allow, then accuracy by kind of question, by steps of reasoning and by words."""
    known = truths(answered, "testdev_balanced_questions.json")
    balanced = [one for one in known if one.question.truth.balanced]
    if not balanced:
        raise bad("no balanced question", known[0].question.origin or "gqa", "isBalanced must be true for those that count")
    marks = [(one.question.truth, float(right(one))) for one in balanced]
    scores = [mean("accuracy", [mark for _, mark in marks], headline=True)]
    scores += by_group(("open" if truth.structural == "query" else "binary", mark) for truth, mark in marks if truth.structural)
    scores += _consistency(known, balanced)
    scores += _possible(balanced)
    scores += _distribution(balanced)
    scores += by_group(((truth.structural, mark) for truth, mark in marks if truth.structural), prefix="structural/")
    scores += by_group(((truth.semantic, mark) for truth, mark in marks if truth.semantic), prefix="semantic/")
    scores += by_group(((f"{truth.steps:02d}", mark) for truth, mark in marks if truth.steps is not None), prefix="steps/")
    return scores + by_group(((f"{truth.words:02d}", mark) for truth, mark in marks if truth.words), prefix="words/")


def verdict(one: Answered) -> Verdict:
    truth: Truth | None = one.question.truth
    points = float(truth is not None and right(one))
    return Verdict(parsed=prediction(one.text or ""), points=points, expected="" if truth is None else truth.answer)


def submit(answered: Sequence[Answered], folder: Path) -> Path:
    """``testdev_balanced_predictions.json``, which the official script and the server take."""
    entries = [{"questionId": str(question.given), "prediction": prediction(text)} for question, text in complete(answered)]
    return json_file(folder / "testdev_balanced_predictions.json", entries)


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """Balanced test-dev, or all of it. Of LLaVA's own file alone the right answers are not known."""
    every = protocol.name == ALL_QUESTIONS
    tier = "testdev_all" if every else "testdev_balanced"
    names = [f"{place}{tier}_questions.json" for place in _FOLDERS]
    images = pictures(folder, "images", "data/images")
    own = "llava_gqa_testdev_balanced.jsonl"
    path = there(folder, *names) or find(folder, names[0], *([] if every else [own]))
    if path.name == own:
        return unique(upstream(path, images, protocol), path)
    choices = _choices(folder, tier)
    found = read_json(path)
    if not isinstance(found, dict):
        raise bad("not an object of questions by id", path, code="bad_file")
    return unique(
        [_question(given, as_row(value, f"{path} {given}"), choices, path, images, protocol) for given, value in found.items()], path
    )


def _question(
    given: str, row: Row, choices: Mapping[str, Mapping[str, Sequence[str]]], path: Path, images: Path, protocol: Protocol
) -> Question:
    truth = _truth(given, row, choices.get(given))
    picture = images / f"{row.id('imageId')}.jpg"
    return Question(
        id=given, given=given, prompt=protocol.asked(row.text("question")), image=Image(picture), category=truth.structural,
        truth=truth, origin=path,
    )  # fmt: skip


def _truth(given: str, row: Row, choices: Mapping[str, Sequence[str]] | None) -> Truth:
    types, groups = row.get("types") or {}, row.get("groups") or {}
    common = "Common" in (types.get("detailed") or "")
    possible = {key: frozenset(_KINDS if common else choices[key]) if choices else None for key in ("valid", "plausible")}
    return Truth(
        answer=row.text("answer"),
        balanced=bool(row.get("isBalanced", True)),
        structural=types.get("structural") or "",
        semantic=types.get("semantic") or "",
        group=groups.get("global"),
        entailed=tuple(other for other in row.get("entailed") or () if other != given),
        words=len(row.text("question").split()),
        steps=_steps(row["semantic"]) if row.get("semantic") else None,
        valid=possible["valid"],
        plausible=possible["plausible"],
    )


def _steps(program: Sequence[Mapping[str, Any]]) -> int:
    """Operations that are reasoning."""
    return sum(not any(end in f"{step.get('operation')}: {step.get('argument')}" for end in _NO_STEP) for step in program)


def _choices(folder: Path, tier: str) -> Mapping[str, Mapping[str, Sequence[str]]]:
    path = there(folder, *(f"{place}{name}_choices.json" for name in (tier, "testdev") for place in _FOLDERS))
    found: Mapping[str, Mapping[str, Sequence[str]]] = read_json(path) if path else {}
    return found


def _consistency(known: Sequence[Answered], balanced: Sequence[Answered]) -> list[Score]:
    """Left out unless every question that a right one entails was asked."""
    marks = {one.question.id: float(right(one)) for one in known}
    implied = [one.question.truth.entailed for one in balanced if right(one) and one.question.truth.entailed]
    if not implied or any(other not in marks for others in implied for other in others):
        return []
    return [mean("consistency", [sum(marks[other] for other in others) / len(others) for others in implied])]


def _possible(balanced: Sequence[Answered]) -> list[Score]:
    scores = []
    for metric, key in (("validity", "valid"), ("plausibility", "plausible")):
        pairs = [(getattr(one.question.truth, key), prediction(one.text or "")) for one in balanced]
        if all(possible is not None for possible, _ in pairs):
            scores.append(mean(metric, [float(said in possible) for possible, said in pairs]))
    return scores


def _distribution(balanced: Sequence[Answered]) -> list[Score]:
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for one in balanced:
        truth: Truth = one.question.truth
        if truth.group is not None:
            gold[truth.group][truth.answer] += 1
            predicted[truth.group][prediction(one.text or "")] += 1
    if not gold:
        return []
    return [Score(metric="distribution", value=distribution(gold, predicted), count=sum(map(Counter.total, gold.values())))]


_SEEN = "the training pictures of GQA are in the model's instruction data"
GQA = Benchmark(
    name="gqa",
    title="GQA, test-dev balanced",
    needs="testdev_balanced_questions.json (testdev_all_questions.json for --protocol all-questions), in the folder or in data/; "
    "pictures in images/ or data/images/; a testdev_balanced_choices.json adds validity and plausibility",
    reference="LLaVA's convert_gqa_for_eval and the official eval.py. Without grounding; metrics whose files or questions are missing are "
    "left out, where the script stops; a question without an answer is wrong, where the script stops.",
    protocols=with_numbers(
        "gqa",
        "accuracy",
        LLAVA_15.but(suffix=SHORT, note=_SEEN),
        LLAVA_16.but(suffix=SHORT, note=_SEEN),
        LLAVA_15.but(
            name=ALL_QUESTIONS,
            suffix=SHORT,
            note="as llava-1.5, all of test-dev: adds consistency; accuracy is of the balanced questions as ever",
        ),
    ),
    questions=questions,
    score=score,
    verdict=verdict,
    submit=submit,
)  # fmt: skip
