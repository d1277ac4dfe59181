"""What must hold of questions before they are asked, and of answers before they are scored or uploaded. Raises DataError."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavakit.eval.benchmark import Answered, Question
from llavakit.eval.official import bad


def unique(questions: list[Question], path: Path) -> list[Question]:
    """The same questions, if there are any and no two have one id."""
    if not questions:
        raise bad("no question", path, "the file is empty: get it again")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise bad(f"two questions have the id {question.id}", path)
        seen.add(question.id)
    return questions


def truths(answered: Sequence[Answered], needs: str) -> Sequence[Answered]:
    """The same answers, if there are any and the right ones are known. ``needs``: the file that has them."""
    if not answered:
        raise bad("no question", needs, "there is nothing to score")
    unknown = next((one.question for one in answered if one.question.truth is None), None)
    if unknown is not None:
        raise bad(f"no right answer is known for question {unknown.id}", unknown.origin or needs, f"put {needs} beside it")
    return answered


def complete(answered: Sequence[Answered]) -> Sequence[tuple[Question, str]]:
    """Every question with its answer; without one of them the server would refuse the upload."""
    pairs = [(one.question, one.text) for one in answered if one.text is not None]
    if len(pairs) < len(answered):
        first = next(one.question.id for one in answered if one.text is None)
        what = f"{len(answered) - len(pairs)} of {len(answered)} questions have no answer, the first is {first}"
        raise bad(what, "answers", "let the run go on to its end first", code="unanswered")
    return pairs
