"""AI2D: four choices about diagrams of school books; the test split.

    questions/0.png.json  {"imageName", "questions": {text: {"answerTexts", "correctAnswer", "abcLabel", "questionId"}}}
    ai2d_test_ids.csv     the numbers of the test pictures, one a line
    images/, abc_images/  diagrams; in the second one the labels are letters, which questions with ``abcLabel`` speak of

A folder with the parquet files of lmms-lab/ai2d instead (question, options, answer, image) is read as well.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from pathlib import Path

from llavakit.eval import intervals
from llavakit.eval.benchmark import LETTER, LLAVA_15, LLAVA_16, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import unique
from llavakit.eval.choices import LETTERS, lettered
from llavakit.eval.official import Row, as_row, bad, find, picture, read_object, read_rows, read_text, there
from llavakit.eval.published import with_numbers
from llavakit.types import Image

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def same(text: str, letter: str) -> bool:
    """Exact match after case and ASCII punctuation are gone; blanks around the answer do not count."""
    return text.strip().lower().translate(_NO_PUNCTUATION) == letter.lower()


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    home = folder / "questions"
    rows = _official(folder, home) if home.is_dir() else _tables(folder)
    found = []
    for name, row, options, answer, image in rows:
        if not 0 <= answer < len(options):
            raise row.fail(f"the answer is {answer} of {len(options)} options", "it counts from 0")
        prompt = protocol.asked(lettered(row.text("question"), options))
        found.append(Question(id=name, given=name, prompt=prompt, image=image, truth=LETTERS[answer]))
    return unique(found, folder)


_Read = tuple[str, Row, tuple[str, ...], int, Image]  # id, row, options, index of the right one, picture


def _official(folder: Path, home: Path) -> Iterator[_Read]:
    ids = {line.strip() for line in read_text(find(folder, "ai2d_test_ids.csv")).split("\n") if line.strip()}
    for path in sorted(home.glob("*.json")):
        whole = read_object(path)
        name, asking = whole.text("imageName"), whole.get("questions")
        if name.split(".")[0] not in ids:
            continue
        if not isinstance(asking, dict):
            raise whole.fail("questions is no object")
        for question, values in asking.items():
            where = f"{path} {question!r}"
            row = Row({"question": question, **as_row(values, where)}, where)
            lettered_one = there(folder, f"abc_images/{name}") if row.get("abcLabel") else None
            shown = Image(lettered_one or folder / "images" / name)
            yield row.text("questionId"), row, row.texts("answerTexts"), row.whole("correctAnswer"), shown


def _tables(folder: Path) -> Iterator[_Read]:
    tables = sorted(folder.rglob("*.parquet"))
    if not tables:
        raise bad("no questions/", folder, "put AI2D's folders or the parquet files there", code="missing_file")
    number = 0
    for path in tables:
        for row in read_rows(path):
            yield str(number), row, row.texts("options"), row.whole("answer"), picture(row, "image", path)
            number += 1


def scores(answered: Sequence[Answered]) -> list[Score]:
    return [intervals.mean("accuracy", [_right(one) for one in answered], headline=True)] if answered else []


def verdict(answered: Answered) -> Verdict:
    return Verdict(parsed=(answered.text or "").strip(), points=float(_right(answered)), expected=answered.question.truth)


def _right(answered: Answered) -> bool:
    return answered.text is not None and same(answered.text, answered.question.truth)


AI2D = Benchmark(
    name="ai2d",
    title="AI2D: choices about diagrams",
    needs="questions/, images/ (and abc_images/) and ai2d_test_ids.csv of AI2D, or the parquet files of lmms-lab/ai2d",
    reference="lmms-eval's task ai2d: exact match without case and punctuation. No judge, no departure",
    protocols=with_numbers(
        "ai2d",
        "accuracy",
        LLAVA_16.but(
            suffix=LETTER,
            max_new_tokens=16,
            note="the prompt format is the checkpoint's own; published in May 2024 with lmms-eval",
        ),
        LLAVA_15.but(suffix=LETTER, max_new_tokens=16),
    ),
    questions=questions,
    score=scores,
    verdict=verdict,
)
