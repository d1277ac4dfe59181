"""ChartQA and DocVQA: answers read off charts and pages, with a mercy for numbers, and one for spelling.

    relaxed   numbers within 5 % of the right one, anything else letter by letter (case aside)      ChartQA: human, augmented
    anls      1 - edits / length, if at least one half, else 0; the best of the right answers       DocVQA

Asked as for the published numbers of LLaVA-1.6, which lmms-eval made (2024-05).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from llavakit.eval.benchmark import LLAVA_16, SHORT, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import complete, truths, unique
from llavakit.eval.edit_distance import distance
from llavakit.eval.files import json_file
from llavakit.eval.intervals import all_and_groups, mean
from llavakit.eval.official import Row, find, parquets, picture, pictures, read_rows, there
from llavakit.eval.published import with_numbers
from llavakit.types import Image

ONE_WORD = "Answer the question with a single word."
_SPLITS = ("human", "augmented")


def relaxed(prediction: str, target: str, *, margin: float = 0.05) -> bool:
    """ChartQA's relaxed correctness as pix2struct and lmms-eval have it.

    A number is what Python's ``float`` reads, or that before a percent sign, as a hundredth: "50%" is 0.5, "1,000" and "$5" are words.
    A right answer of 0 is compared as a word. Nothing is trimmed.
    """
    said, true = _number(prediction), _number(target)
    if said is not None and true:
        return abs(said - true) / abs(true) <= margin
    return prediction.lower() == target.lower()


def anls(prediction: str, answers: Sequence[str], *, threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question, as the official script of DocVQA (and lmms-eval).

    Case, outer blanks and runs of blanks do not count as edits; but the length that edits are divided by is of the texts as they came.
    """
    score = 1 - min(_distance(prediction, answer) for answer in answers)
    return score if score >= threshold else 0.0


def _distance(prediction: str, answer: str) -> float:
    length = max(len(answer.upper()), len(prediction.upper()))
    return distance(_plain(answer), _plain(prediction)) / length if length else 0.0


def _plain(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def score_chartqa(answered: Sequence[Answered]) -> list[Score]:
    """Relaxed accuracy, all and by who wrote the question."""
    known = truths(answered, "test_human.json and test_augmented.json")
    points = [float(one.text is not None and relaxed(one.text, one.question.truth)) for one in known]
    return all_and_groups("accuracy", points, [one.question.category for one in known])


def score_docvqa(answered: Sequence[Answered]) -> list[Score]:
    """Mean ANLS; no answer is no point."""
    points = [0.0 if one.text is None else anls(one.text, one.question.truth) for one in truths(answered, "val_v1.0.json")]
    return [mean("anls", points, headline=True)]


def verdict_chartqa(one: Answered) -> Verdict:
    truth: str = one.question.truth
    return Verdict(parsed=one.text or "", points=float(one.text is not None and relaxed(one.text, truth)), expected=truth)


def verdict_docvqa(one: Answered) -> Verdict:
    truth: Sequence[str] = one.question.truth or ()
    points = anls(one.text, truth) if one.text is not None and truth else 0.0
    return Verdict(parsed=_plain(one.text or ""), points=points, expected=" / ".join(truth))


def submit_docvqa(answered: Sequence[Answered], folder: Path) -> Path:
    """``docvqa-test.json`` as the server of the Robust Reading Competition takes it."""
    entries = [{"questionId": question.given, "answer": text} for question, text in complete(answered)]
    return json_file(folder / "docvqa-test.json", entries)


def chartqa(folder: Path, protocol: Protocol) -> list[Question]:
    """From the official JSON files, or from parquet as on the Hub. The id is who wrote the question, and its place among theirs."""
    found: list[Question] = []
    counts: Counter[str] = Counter()
    for path in _chartqa_files(folder):
        for split, row, image in _chartqa_rows(path):
            name = f"{split}-{counts[split]}"
            counts[split] += 1
            prompt = protocol.asked(row.text("question", "query"))
            found.append(Question(id=name, given=name, prompt=prompt, image=image, category=split, truth=_label(row), origin=path))
    return unique(found, folder)


def _chartqa_files(folder: Path) -> list[Path]:
    if there(folder, *(f"test_{split}.json" for split in _SPLITS)):
        return [find(folder, f"test_{split}.json") for split in _SPLITS]
    return parquets(folder, "test", instead="test_human.json and test_augmented.json")


def _chartqa_rows(path: Path) -> Iterator[tuple[str, Row, Image]]:
    """(human or augmented, the row, its picture)."""
    official = path.suffix == ".json"
    place = pictures(path.parent, "png", "test/png")
    for row in read_rows(path):
        if official:
            yield path.stem.removeprefix("test_"), row, Image(place / row.text("imgname"))
        else:
            yield _split(row), row, picture(row, "image", path)


def _split(row: Row) -> str:
    """lmms-lab/ChartQA names it, HuggingFaceM4/ChartQA numbers it."""
    if "human_or_machine" in row:
        return _SPLITS[int(row.id("human_or_machine"))]
    return row.text("type").removesuffix("_test")


def _label(row: Row) -> str:
    """One answer; HuggingFaceM4/ChartQA has it in a list."""
    key = "answer" if "answer" in row else "label"
    if isinstance(row.get(key), list) and len(row[key]) == 1:
        return str(row[key][0])
    return row.text(key)


def docvqa_val(folder: Path, protocol: Protocol) -> list[Question]:
    return _docvqa(folder, protocol, ("val_v1.0_withQT.json", "val_v1.0.json"), "validation")


def docvqa_test(folder: Path, protocol: Protocol) -> list[Question]:
    return _docvqa(folder, protocol, ("test_v1.0.json",), "test")


def _docvqa(folder: Path, protocol: Protocol, names: Sequence[str], split: str) -> list[Question]:
    path = there(folder, *names)
    files = [path] if path else parquets(folder, split, instead=names[0])
    return unique([_page(row, path, protocol) for path in files for row in read_rows(path, "data")], folder)


def _page(row: Row, path: Path, protocol: Protocol) -> Question:
    given = row.id("questionId")
    if not str(given).isdecimal():
        raise row.fail(f"questionId {given!r} is not a number")
    kinds, answers = row.get("question_types") or (), row.get("answers") or ()
    return Question(
        id=str(given),
        given=int(given),
        prompt=protocol.asked(row.text("question")),
        image=picture(row, "image", path) if path.suffix == ".parquet" else Image(path.parent / row.text("image")),
        category=", ".join(map(str, kinds)),
        truth=tuple(map(str, answers)) or None,
        origin=path,
    )


CHARTQA = Benchmark(
    name="chartqa",
    title="ChartQA, test",
    needs="test_human.json and test_augmented.json, pictures in png/; or the Hub's test-*.parquet",
    reference="Relaxed correctness of pix2struct, as in lmms-eval's chartqa: 5 %. A question without an answer is wrong.",
    protocols=with_numbers("chartqa", "accuracy", LLAVA_16.but(suffix=ONE_WORD, max_new_tokens=16)),
    questions=chartqa,
    score=score_chartqa,
    verdict=verdict_chartqa,
)
DOCVQA = Benchmark(
    name="docvqa",
    title="DocVQA, val",
    needs="val_v1.0_withQT.json or val_v1.0.json, pictures in documents/; or the Hub's validation-*.parquet",
    reference="ANLS of the official script, threshold 0.5, as in lmms-eval's docvqa. A question without an answer has no point.",
    protocols=with_numbers("docvqa", "anls", LLAVA_16.but(suffix=SHORT, note="which split the published numbers are of is not stated")),
    questions=docvqa_val,
    score=score_docvqa,
    verdict=verdict_docvqa,
)
DOCVQA_TEST = Benchmark(
    name="docvqa-test",
    title="DocVQA, test (the server scores)",
    needs="test_v1.0.json, pictures in documents/; or the Hub's test-*.parquet",
    reference="[{questionId, answer}]: the reply as it came, as in lmms-eval's docvqa_test; every question must be answered.",
    protocols=(LLAVA_16.but(suffix=SHORT, note="no number is known to be of this split"),),
    questions=docvqa_test,
    submit=submit_docvqa,
)
