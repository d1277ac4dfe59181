"""LLaVA-Bench: open questions about 30 COCO pictures (30 x 3) or 24 pictures In-the-Wild (60), scored by a judge against text-only GPT-4.

    questions.jsonl      {question_id, image, text, category: conv | detail | complex}
    answers_gpt4.jsonl   {question_id, text}        what GPT-4 replies to the question when told the context: the reference
    context.jsonl        {image, captions, instances: [{category, bbox}]}      COCO: five sentences, then one box a line
                         {image, caption}                                      In-the-Wild: sentences by hand
    images/

Two steps: the harness asks the model, then ``judge`` compares its answers with the reference. The files are found under the names of the
release and of its repositories; COCO's also as one file of questions with reference (instruction, output, type).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.data.reading import Records
from llavakit.errors import DataError
from llavakit.eval.benchmark import Benchmark, Protocol, Published, Question
from llavakit.eval.judge import WILD, Case
from llavakit.eval.reviews import Relative, relative_scores  # the scorer: pairs by category -> relative scores
from llavakit.types import Image

__all__ = ["BENCHMARKS", "COCO", "IN_THE_WILD", "Answer", "Relative", "cases", "questions", "read_answers", "relative_scores"]

QUESTIONS = ("questions.jsonl", "qa90_questions.jsonl", "llava_bench_coco_questions.jsonl")
REFERENCES = ("answers_gpt4.jsonl", "qa90_gpt4_answer.jsonl", "llava_bench_coco_gpt4_answers.jsonl")
CONTEXTS = ("context.jsonl", "caps_boxes_coco2014_val_80.jsonl", "coco2014_val_80_captions_boxes.jsonl")
TOGETHER = ("llava_bench_coco_30x3.jsonl",)
PREFIX = "COCO_val2014_"  # before COCO's numbers in the names of the pictures, or not
FOLDERS = ("images", "val2014", ".")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One line of an answers file."""

    text: str
    id: str | int
    model: str = ""


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """The questions in order; ``truth`` is the reference's text where its file is there. Pictures are not opened."""
    rows = _rows(_found(folder, QUESTIONS + TOGETHER, "questions"))
    place = _first(folder, REFERENCES)
    references = {name: answer.text for name, answer in read_answers(place).items()} if place else {}
    found = {}
    for number, (where, row) in enumerate(rows):
        given, text = _given(row, number, where), _word(row, where, "text", "instruction")
        if str(given) in found:
            raise _bad(f"question_id {given} comes twice", where)
        image = Image(_picture(folder, _word(row, where, "image")))
        prompt = f"{text}\n{protocol.suffix}" if protocol.suffix else text
        truth = row["output"] if "output" in row else references.get(str(given))
        category = _word(row, where, "category", "type")
        found[str(given)] = Question(id=str(given), given=given, prompt=prompt, image=image, category=category, truth=truth)
    return list(found.values())


def cases(folder: Path, answers: Path, *, wild: bool) -> list[Case]:
    """What the judge is asked: every question, its context, the reference and the answer of the file ``answers``.

    Raises DataError for a question without context, reference or answer: a score over some of them is another score.
    """
    contexts = {_plain(image): text for image, text in _contexts(_found(folder, CONTEXTS, "contexts"))}
    place = _first(folder, REFERENCES)
    references = read_answers(place) if place else {}
    given = read_answers(answers)
    found = []
    for question in questions(folder, Protocol(name="")):
        assert question.image is not None
        assert isinstance(question.image.source, Path)
        name = question.image.source.name
        reference = Answer(text=question.truth, id=question.given) if question.truth is not None else None
        reference = references.get(question.id, reference)
        candidate, context = given.get(question.id), contexts.get(_plain(name))
        absent = [what for what, one in (("answer", candidate), ("reference", reference), ("context", context)) if one is None]
        if candidate is None or reference is None or context is None:
            remedy = (
                "answer all questions first (the harness goes on where it stopped)" if absent[0] == "answer" else "get the whole release"
            )
            where = str(answers if absent[0] == "answer" else folder)
            raise DataError(f"question {question.given} has no {absent[0]}", code="missing_record", where=where, remedy=remedy)
        found.append(
            Case(
                id=question.id,
                given=question.given,
                category=(WILD if wild else "") + question.category,
                question=question.prompt,
                reference=reference.text,
                candidate=candidate.text,
                context=context,
                reference_id=reference.id,
                candidate_id=candidate.id,
                image=question.image,
            )
        )
    return found


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by question_id as text; upstream's files and ours. Raises DataError with the line, also for an id that comes twice."""
    found: dict[str, Answer] = {}
    for where, row in _rows(path):
        given = row.get("question_id")
        if isinstance(given, bool) or not isinstance(given, str | int):
            raise _bad("no question_id", where)
        if str(given) in found:
            raise _bad(f"question_id {given} comes twice", where)
        text, name = row.get("text"), row.get("answer_id", given)
        if not isinstance(text, str):
            raise _bad("no text", where)
        found[str(given)] = Answer(text=text, id=name if isinstance(name, str | int) else str(name), model=str(row.get("model_id", "")))
    if not found:
        raise DataError("there is no answer", code="empty_file", where=str(path), remedy="ask the model first")
    return found


def _contexts(path: Path) -> list[tuple[str, str]]:
    """Image -> what the judge is told: sentences, then boxes as ``category: [x1, y1, x2, y2]`` after an empty line."""
    found = []
    for where, row in _rows(path):
        told = row.get("captions", row.get("caption"))
        sentences = [told] if isinstance(told, str) else told
        if not isinstance(sentences, list) or not all(isinstance(one, str) for one in sentences):
            raise _bad("no captions", where)
        boxes = row.get("instances")
        if boxes is None:
            found.append((_word(row, where, "image"), "\n".join(sentences)))
            continue
        try:
            lines = [f"{box['category']}: {box['bbox']}" for box in boxes]
        except (TypeError, KeyError) as error:
            raise _bad(f"an instance without category or bbox ({error!r})", where) from error
        found.append((_word(row, where, "image"), "\n".join(sentences) + "\n\n" + "\n".join(lines)))
    return found


def _rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The objects of a file with where each stands."""
    records = Records(path)
    found: list[tuple[str, Mapping[str, Any]]] = []
    for number, row in records:
        where = f"{path}:{records.place(number)}"
        if not isinstance(row, dict):
            raise _bad("no JSON object", where)
        found.append((where, row))
    return found


def _given(row: Mapping[str, Any], number: int, where: str) -> str | int:
    given = row.get("question_id", number if "instruction" in row else None)
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise _bad("no question_id", where)
    return given


def _word(row: Mapping[str, Any], where: str, *names: str) -> str:
    value = next((row[name] for name in names if name in row), None)
    if not isinstance(value, str):
        raise _bad(f"no {names[0]}", where)
    return value


def _plain(image: str) -> str:
    return image.removeprefix(PREFIX)


def _picture(folder: Path, name: str) -> Path:
    """Where the picture lies; where it would lie if it were there."""
    places = [folder / inside / spelt for inside in FOLDERS for spelt in (name, PREFIX + name, _plain(name))]
    return next((place for place in places if place.is_file()), folder / FOLDERS[0] / name)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _found(folder: Path, names: tuple[str, ...], what: str) -> Path:
    place = _first(folder, names)
    if place is None:
        raise DataError(f"there are no {what}", code="file_missing", where=str(folder), remedy=f"it is expected as {' or '.join(names)}")
    return place


def _bad(what: str, where: str) -> DataError:
    return DataError(what, code="bad_record", where=where, remedy="give the release's own file, JSON lines")


_PAPER = "Visual Instruction Tuning, "
_PAGE = "LLaVA repository, LLaVA-Bench page"
_CATEGORIES = ("conv", "detail", "complex", "all")


def _published(model: str, numbers: tuple[float, ...], source: str, within: tuple[float, ...] = (2.0,) * 4) -> tuple[Published, ...]:
    """A row of a table. Where it prints no deviation, two points: what three decodings of one model differ by (LLaVA, 67.3 ± 2.0)."""
    found = zip(_CATEGORIES, numbers, within, strict=True)
    return tuple(Published(model=model, metric=name, value=value, tolerance=sd, source=source) for name, value, sd in found)


def _overall(source: str, numbers: Mapping[str, float]) -> tuple[Published, ...]:
    return tuple(Published(model=model, metric="all", value=value, tolerance=2.0, source=source) for model, value in numbers.items())


_DATA = _PAPER + "LLaVA-Bench (COCO), training data"
_WILD = _PAPER + "LLaVA-Bench (In-the-Wild)"
_JUDGE, _LATER = "gpt-4-0314", "gpt-4-0613"
_REFERENCE = (
    "eval_gpt_review_visual.py, eval_gpt_review_bench.py and summarize_gpt_review.py of LLaVA: blocks, parser, ratio of means. We depart:"
    " the prompts are in our own words (--rules takes upstream's file); a review without two scores from 1 to 10 is asked for again and"
    " left out if it stays so, upstream counts -1 : -1 (--upstream does); a caption that is one string is one paragraph"
)

COCO = Benchmark(
    name="llava-bench-coco",
    title="LLaVA-Bench (COCO)",
    needs="questions.jsonl (or qa90_questions.jsonl), answers_gpt4.jsonl (qa90_gpt4_answer.jsonl),"
    " context.jsonl (caps_boxes_coco2014_val_80.jsonl), images/ or val2014/",
    reference=_REFERENCE,
    questions=questions,
    protocols=(
        Protocol(
            name="v0",
            max_new_tokens=1024,
            judge=_JUDGE,
            note="the paper's models, in the checkpoint's own prompt format; 90 questions judged against text-only GPT-4",
            published=(
                *_published("LLaVA, full 158K", (83.1, 75.3, 96.5, 85.1), _DATA),
                *_published("LLaVA, detail + complex", (81.5, 73.3, 90.8, 81.9), _DATA),
                *_published("LLaVA, conv + 5 % detail + 10 % complex", (81.0, 68.4, 91.5, 80.5), _DATA),
                *_published("LLaVA, conv only", (76.5, 59.8, 84.9, 73.8), _DATA),
                *_published("LLaVA, no instruction tuning", (22.0, 24.0, 18.5, 21.5), _DATA),
            ),
        ),
        Protocol(name="llava-1.5", template="vicuna_v1", aspect="pad", max_new_tokens=1024, judge=_JUDGE, note="no published numbers"),
    ),
)  # fmt: skip

IN_THE_WILD = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench (In-the-Wild)",
    needs="questions.jsonl, answers_gpt4.jsonl, context.jsonl, images/ of liuhaotian/llava-bench-in-the-wild",
    reference=_REFERENCE,
    questions=questions,
    protocols=(
        Protocol(
            name="llava-1.5", template="vicuna_v1", aspect="pad", max_new_tokens=1024, judge=_JUDGE,
            published=_overall(
                "Improved Baselines with Visual Instruction Tuning, and model zoo",
                {
                    "LLaVA-7B": 62.8, "llava-v1.5-7b": 65.4, "llava-v1.5-13b": 72.5, "LLaVA-1.5-13B-HD": 72.0,
                    "llava-v1.5-7b-lora": 67.9, "llava-v1.5-13b-lora": 69.5,
                },
            ),
        ),
        Protocol(
            name="llava-1.6", aspect="anyres", max_new_tokens=1024, judge=_JUDGE,
            note="each model in its own prompt format",
            published=_overall(
                "LLaVA-NeXT blog and model zoo",
                {"llava-v1.6-vicuna-7b": 81.6, "llava-v1.6-vicuna-13b": 87.3, "llava-v1.6-mistral-7b": 83.2, "llava-v1.6-34b": 89.6},
            ),
        ),
        Protocol(
            name="llava-1.6-0613", aspect="anyres", max_new_tokens=1024, judge=_LATER,
            note="the same models judged again in May 2024, since gpt-4-0314 is gone: another judge gives other values",
            published=_overall(
                "LLaVA-NeXT blog, May 2024",
                {"llava-v1.6-vicuna-7b": 72.3, "llava-v1.6-vicuna-13b": 72.3, "llava-v1.6-mistral-7b": 71.7, "llava-v1.6-34b": 88.8},
            ),
        ),
        Protocol(
            name="v0", max_new_tokens=1024, judge=_JUDGE,
            note="the first paper's models, in the checkpoint's own prompt format; the deviations are the table's",
            published=(
                *_published("OpenFlamingo", (19.3, 19.0, 19.1, 19.1), _WILD, (0.5, 0.5, 0.7, 0.4)),
                *_published("BLIP-2", (54.6, 29.1, 32.9, 38.1), _WILD, (1.4, 1.2, 0.7, 1.0)),
                *_published("LLaVA (3 decodings)", (57.3, 52.5, 81.7, 67.3), _WILD, (1.9, 6.3, 1.8, 2.0)),
                *_published("LLaVA (1 decoding, judged 3 times)", (58.8, 49.2, 81.4, 66.7), _WILD, (0.6, 0.8, 0.3, 0.3)),
                *_published("Bard-0718", (83.7, 69.7, 78.7, 77.8), _PAGE),
                *_published("Bing-Chat-0629", (59.6, 52.2, 90.1, 71.5), _PAGE),
                *_published("llava-v1-13b-336px-0719, beam 1", (64.3, 55.9, 81.7, 70.1), _PAGE),
                *_published("llava-v1-13b-336px-0719, beam 5", (68.4, 59.9, 84.3, 73.5), _PAGE),
                *_published("llava-llama-2-13b-chat preview", (56.7, 58.6, 80.0, 67.9), "LLaVA repository, LLaMA-2 page"),
                *_published("llava-llama-2-7b-chat lora preview", (51.2, 58.9, 71.6, 62.8), "LLaVA repository, LLaMA-2 page"),
            ),
        ),
        Protocol(
            name="without-people", max_new_tokens=1024, judge=_JUDGE,
            note="questions about pictures with people left out (--ignore): Bard does not answer them",
            published=(
                *_published("Bard-0718", (94.9, 74.3, 84.3, 84.6), _PAGE),
                *_published("Bing-Chat-0629", (55.8, 53.6, 93.5, 72.6), _PAGE),
                *_published("llava-v1-13b-336px-0719, beam 1", (62.2, 56.4, 82.2, 70.0), _PAGE),
                *_published("llava-v1-13b-336px-0719, beam 5", (65.6, 61.7, 85.0, 73.6), _PAGE),
            ),
        ),
    ),
)  # fmt: skip

BENCHMARKS = (IN_THE_WILD, COCO)
