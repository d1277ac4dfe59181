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

from dataclasses import dataclass
from pathlib import Path

from llavakit.data.reading import Records
from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, Benchmark, Protocol, Question
from llavakit.eval.judge import WILD, Case
from llavakit.eval.official import Row, as_row, bad, find, there
from llavakit.eval.published import with_numbers
from llavakit.eval.reviews import ALL, Relative, relative_scores  # the scorer: pairs by category -> relative scores
from llavakit.types import Image

__all__ = ["COCO", "IN_THE_WILD", "Answer", "Relative", "cases", "questions", "read_answers", "relative_scores"]

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
    rows = _rows(find(folder, *QUESTIONS, *TOGETHER))
    place = there(folder, *REFERENCES)
    references = {name: answer.text for name, answer in read_answers(place).items()} if place else {}
    found = {}
    for number, row in enumerate(rows):
        given = _given(row, number)
        if str(given) in found:
            raise row.fail(f"question_id {given} comes twice")
        found[str(given)] = Question(
            id=str(given),
            given=given,
            prompt=protocol.asked(row.text("text", "instruction")),
            image=Image(_picture(folder, row.text("image"))),
            category=row.text("category", "type"),
            truth=row["output"] if "output" in row else references.get(str(given)),
        )
    return list(found.values())


def cases(folder: Path, answers: Path, *, wild: bool) -> list[Case]:
    """What the judge is asked: every question, its context, the reference and the answer of the file ``answers``.

    Raises DataError for a question without context, reference or answer: a score over some of them is another score.
    """
    contexts = {_plain(image): text for image, text in _contexts(find(folder, *CONTEXTS))}
    place = there(folder, *REFERENCES)
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
            where, remedy, code = folder, "get the whole release", "missing_record"
            if candidate is None:
                where, remedy, code = answers, "answer all questions first (the harness goes on where it stopped)", "unanswered"
            raise bad(f"question {question.given} has no {absent[0]}", where, remedy, code=code)
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
    for row in _rows(path):
        given = row.id("question_id")
        if str(given) in found:
            raise row.fail(f"question_id {given} comes twice")
        name = row.get("answer_id", given)
        model = str(row.get("model_id", ""))
        found[str(given)] = Answer(text=row.text("text"), id=name if isinstance(name, str | int) else str(name), model=model)
    if not found:
        raise bad("there is no answer", path, "ask the model first", code="empty_file")
    return found


def _contexts(path: Path) -> list[tuple[str, str]]:
    """Image -> what the judge is told: sentences, then boxes as ``category: [x1, y1, x2, y2]`` after an empty line."""
    found = []
    for row in _rows(path):
        told = row.get("captions", row.get("caption"))
        sentences = [told] if isinstance(told, str) else told
        if not isinstance(sentences, list) or not all(isinstance(one, str) for one in sentences):
            raise row.fail("no captions")
        boxes = row.get("instances")
        if boxes is None:
            found.append((row.text("image"), "\n".join(sentences)))
            continue
        try:
            lines = [f"{box['category']}: {box['bbox']}" for box in boxes]
        except (TypeError, KeyError) as error:
            raise row.fail(f"an instance without category or bbox ({error!r})") from error
        found.append((row.text("image"), "\n".join(sentences) + "\n\n" + "\n".join(lines)))
    return found


def _rows(path: Path) -> list[Row]:
    """The objects of a file: a list or lines, whatever its name."""
    records = Records(path)
    return [as_row(value, f"{path}:{records.place(number)}") for number, value in records]


def _given(row: Row, number: int) -> str | int:
    return number if "instruction" in row and "question_id" not in row else row.id("question_id")


def _plain(image: str) -> str:
    return image.removeprefix(PREFIX)


def _picture(folder: Path, name: str) -> Path:
    """Where the picture lies; where it would lie if it were there."""
    places = [folder / inside / spelt for inside in FOLDERS for spelt in (name, PREFIX + name, _plain(name))]
    return next((place for place in places if place.is_file()), folder / FOLDERS[0] / name)


_JUDGE = "gpt-4-0314"
_V0 = Protocol(name="v0", max_new_tokens=1024, judge=_JUDGE)
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
    protocols=with_numbers(
        "llava-bench-coco",
        ALL,
        _V0.but(note="the paper's models, in the checkpoint's own prompt format; 90 questions judged against text-only GPT-4"),
        LLAVA_15.but(max_new_tokens=1024, judge=_JUDGE, note="no published numbers"),
    ),
)

IN_THE_WILD = Benchmark(
    name="llava-bench",
    title="LLaVA-Bench (In-the-Wild)",
    needs="questions.jsonl, answers_gpt4.jsonl, context.jsonl, images/ of liuhaotian/llava-bench-in-the-wild",
    reference=_REFERENCE,
    questions=questions,
    protocols=with_numbers(
        "llava-bench",
        ALL,
        LLAVA_15.but(max_new_tokens=1024, judge=_JUDGE),
        LLAVA_16.but(max_new_tokens=1024, judge=_JUDGE, note="each model in its own prompt format"),
        LLAVA_16.but(
            name="llava-1.6-0613",
            max_new_tokens=1024,
            judge="gpt-4-0613",
            note="the same models judged again in May 2024, since gpt-4-0314 is gone: another judge gives other values",
        ),
        _V0.but(note="the first paper's models, in the checkpoint's own prompt format; the deviations are the table's"),
        _V0.but(name="without-people", note="questions about pictures with people left out (--ignore): Bard does not answer them"),
    ),
)
