"""VQAv2, VizWiz and TextVQA: short answers beside those of ten people.

    what ten people said    soft accuracy of an answer: leave each person out in turn, min(1, as many of the others as said it / 3),
    and what was replied    and average. Three or more others agree: right; nobody does: wrong.

Three scorers, three ways of making spellings one (``normalise``):

    function            the reply                            what people said                 of
    soft_accuracy       vqa_eval                             punctuation, unless all agree    VQAv2's server script
    vizwiz_accuracy     vqa_eval                             as it stands                     VizWiz' own script
    m4c_accuracy        evalai                               evalai                           TextVQA in LLaVA (Pythia's M4C)

What LLaVA uploads has been through ``evalai`` first, so VQAv2 and VizWiz are scored here as their servers see it: on ``evalai(reply)``.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llavakit.eval import vqa_questions as questions
from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, SHORT, Answered, Benchmark, Protocol, Question, Score, Verdict
from llavakit.eval.checks import complete, truths
from llavakit.eval.files import json_file
from llavakit.eval.intervals import all_and_groups
from llavakit.eval.normalise import evalai, punctuation, vqa_eval
from llavakit.eval.official import bad, read_rows
from llavakit.eval.published import with_numbers

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
Scorer = Callable[[str, Sequence[str]], float]


def leave_one_out(answer: str, people: Sequence[str]) -> float:
    """The mean, over each person left out, of min(1, how many of the others said just this / 3)."""
    same = [said == answer for said in people]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(people)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """As the VQA server's script: what people said loses its punctuation only where they differ."""
    people = [punctuation(said) for said in answers] if len(set(answers)) > 1 else answers
    return leave_one_out(vqa_eval(prediction), people)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """As VizWiz' script, which leaves what people said as it is."""
    return leave_one_out(vqa_eval(prediction), answers)


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """As M4C's evaluator of TextVQA: both sides through the answer processor."""
    return leave_one_out(evalai(prediction), [evalai(said) for said in answers])


def uploaded_vqav2(reply: str, answers: Sequence[str]) -> float:
    """What the server would give for an answer uploaded as LLaVA does."""
    return soft_accuracy(evalai(reply), answers)


def uploaded_vizwiz(reply: str, answers: Sequence[str]) -> float:
    return vizwiz_accuracy(evalai(reply), answers)


def recovered_question(prompt: str) -> str:
    """The question of a TextVQA prompt, lower case, told by its lines as upstream does: three with OCR tokens, two without.

    Also of M4C's own form, ``OCR tokens: ... Question: ... Short answer:``.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    what = f"no question can be told from a prompt of {len(lines)} lines"
    raise bad(what, repr(prompt[:80]), "it has two lines, or three with a line 'Reference OCR token: '")


def match_textvqa(asked: Sequence[Question], answers: Iterable[Mapping[str, Any]]) -> list[Answered]:
    """Lines of upstream's TextVQA answer file to our questions, by picture and recovered question: question_id is the picture's there."""
    replies: dict[tuple[str | int, str], list[str]] = defaultdict(list)
    for line in answers:
        replies[line["question_id"], recovered_question(line["prompt"])].append(line["text"])
    found = []
    for question in asked:
        waiting = replies.get((question.given, question.prompt.split("\n")[0].lower()))
        found.append(Answered(question=question, text=waiting.pop(0) if waiting else None))
    surplus = next((key for key, waiting in replies.items() if waiting), None)
    if surplus is not None:
        what = f"an answer to {surplus[1]!r} about picture {surplus[0]}, which is not asked (again)"
        raise bad(what, "answers", "take the answers and the questions of the same split")
    return found


def score_vqav2(answered: Sequence[Answered]) -> list[Score]:
    """Soft accuracy, all and by type of answer. What was not answered is uploaded as the empty text, and scored as that."""
    return _scores(
        [Answered(question=one.question, text=one.text or "") for one in answered], uploaded_vqav2, "v2_mscoco_val2014_annotations.json"
    )


def score_vizwiz(answered: Sequence[Answered]) -> list[Score]:
    """Soft accuracy, all and by type of answer; no answer is no point."""
    return _scores(answered, uploaded_vizwiz, "val.json")


def score_textvqa(answered: Sequence[Answered]) -> list[Score]:
    """Soft accuracy; no answer is no point."""
    return _scores(answered, m4c_accuracy, "TextVQA_0.5.1_val.json")


def submit_vqav2(answered: Sequence[Answered], folder: Path) -> Path:
    """``vqav2-test2015.json``: an answer to every question of test2015, empty for those that were not asked."""
    if not answered:
        raise bad("no question", folder, "there is nothing to upload")
    origin = answered[0].question.origin
    assert origin is not None  # vqav2_test_dev says where its questions stand
    listing = questions.vqav2_listing(origin.parent)
    replies = {one.question.given: evalai(one.text or "") for one in answered}
    listed = [row.id("question_id") for row in read_rows(listing, None if listing.suffix == ".jsonl" else "questions")]
    strange = replies.keys() - set(listed)
    if strange:
        raise bad(f"question {min(map(str, strange))} is not listed", listing, "take both files of the same release")
    return json_file(folder / "vqav2-test2015.json", [{"question_id": given, "answer": replies.get(given, "")} for given in listed])


def submit_vizwiz(answered: Sequence[Answered], folder: Path) -> Path:
    """``vizwiz-test.json``: every picture with its answer."""
    entries = [{"image": question.id, "answer": evalai(text)} for question, text in complete(answered)]
    return json_file(folder / "vizwiz-test.json", entries)


def _scores(answered: Sequence[Answered], scorer: Scorer, needs: str) -> list[Score]:
    known = truths(answered, needs)
    points = [0.0 if one.text is None else scorer(one.text, one.question.truth) for one in known]
    return all_and_groups("accuracy", points, [one.question.category for one in known])


def _verdict(scorer: Scorer) -> Callable[[Answered], Verdict]:
    def verdict(one: Answered) -> Verdict:
        people: Sequence[str] = one.question.truth or ()
        points = scorer(one.text, people) if one.text is not None and people else 0.0
        return Verdict(parsed=evalai(one.text or ""), points=points, expected=tally(people))

    return verdict


def tally(people: Sequence[str]) -> str:
    """What people said, the most frequent first: 'yes (8), no (2)'."""
    return ", ".join(f"{said} ({count})" if count > 1 else said for said, count in Counter(people).most_common())


_VIZWIZ_SUFFIX = f"{UNANSWERABLE}\n{SHORT}"
_SEEN = "the training pictures of VQAv2 are in the model's instruction data"
_VQAV2 = with_numbers("vqav2", "accuracy", LLAVA_15.but(suffix=SHORT, note=_SEEN), LLAVA_16.but(suffix=SHORT, note=_SEEN))
_VIZWIZ = with_numbers("vizwiz", "accuracy", LLAVA_15.but(suffix=_VIZWIZ_SUFFIX), LLAVA_16.but(suffix=_VIZWIZ_SUFFIX))
_TEXTVQA = with_numbers(
    "textvqa",
    "accuracy",
    LLAVA_15.but(suffix=SHORT, hints=True, note="with Rosetta's OCR tokens in the question"),
    LLAVA_16.but(suffix=SHORT, note="without OCR tokens"),
    LLAVA_15.but(
        name="no-ocr",
        suffix=SHORT,
        note="as llava-1.5 without OCR tokens: 1.5-7B has about 46 to 48 then; do not compare with numbers that had them",
    ),
)


def _unscored(protocols: Sequence[Protocol], split: str) -> tuple[Protocol, ...]:
    """The same ways of asking without the numbers, which are of another split."""
    note = f"the published numbers are of {split}"
    return tuple(one.but(note=note, published=()) for one in protocols)


VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2, test-dev (the server scores)",
    needs="llava_vqav2_mscoco_test-dev2015.jsonl and llava_vqav2_mscoco_test2015.jsonl (LLaVA's eval.zip), or "
    "v2_OpenEnded_mscoco_test-dev2015_questions.json and v2_OpenEnded_mscoco_test2015_questions.json; pictures in test2015/",
    reference="LLaVA's convert_vqav2_for_submission: M4C's answer processor; all of test2015 is listed, what was not asked is empty.",
    protocols=_VQAV2,
    questions=questions.vqav2_test_dev,
    verdict=_verdict(uploaded_vqav2),
    submit=submit_vqav2,
)
VQAV2_VAL = Benchmark(
    name="vqav2-val",
    title="VQAv2, val (scored here)",
    needs="v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json; pictures in val2014/",
    reference="vqaEval of GT-Vision-Lab/VQA, on the answer as LLaVA uploads it. Not rounded; questions without an answer count as empty.",
    protocols=_unscored(_VQAV2, "test-dev"),
    questions=questions.vqav2_val,
    score=score_vqav2,
    verdict=_verdict(uploaded_vqav2),
)
VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz, test (the server scores)",
    needs="llava_test.jsonl (LLaVA's eval.zip) or test.json; pictures in test/",
    reference="LLaVA's convert_vizwiz_for_submission: M4C's answer processor; every question must be answered.",
    protocols=_VIZWIZ,
    questions=questions.vizwiz_test,
    verdict=_verdict(uploaded_vizwiz),
    submit=submit_vizwiz,
)
VIZWIZ_VAL = Benchmark(
    name="vizwiz-val",
    title="VizWiz, val (scored here)",
    needs="val.json; pictures in val/",
    reference="The accuracy of VizWiz' vqaEval, on the answer as LLaVA uploads it. Its table of contractions has typographic apostrophes; "
    "ours has plain ones, which makes no difference after the answer processor. A question without an answer is wrong.",
    protocols=_unscored(_VIZWIZ, "test"),
    questions=questions.vizwiz_val,
    score=score_vizwiz,
    verdict=_verdict(uploaded_vizwiz),
)
TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA, val v0.5.1",
    needs="TextVQA_0.5.1_val.json; for OCR tokens llava_textvqa_val_v051_ocr.jsonl (LLaVA's eval.zip) or "
    "TextVQA_Rosetta_OCR_v0.2_val.json; pictures in train_images/",
    reference="LLaVA's eval_textvqa with M4C's TextVQAAccuracyEvaluator. Not answered is wrong, where upstream leaves it out of the mean.",
    protocols=_TEXTVQA,
    questions=questions.textvqa,
    score=score_textvqa,
    verdict=_verdict(m4c_accuracy),
)
