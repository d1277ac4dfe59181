"""POPE: is such a thing in the picture? The official files, as LLaVA asked them; ``yes_no`` scores.

    coco_pope_{random,popular,adversarial}.json   picture, question, label       here or in coco/
    llava_pope_test.jsonl                         how LLaVA asked, no labels     here, if at all
    val2014/                                      the pictures of COCO

LLaVA's scorer gives the n-th answer of a split the n-th label. Here labels are found by id, picture and wording, so that files of two
revisions are noticed, which that scorer cannot; the protocol ``by-order`` does as it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavakit.eval.benchmark import LLAVA_15, LLAVA_16, SHORT, Benchmark, Protocol, Question
from llavakit.eval.checks import unique
from llavakit.eval.official import Row, find, pictures, read_rows, there
from llavakit.eval.published import with_numbers
from llavakit.eval.yes_no import SPLITS, pope_scores, pope_verdict
from llavakit.types import Image

BY_ORDER = "by-order"
_OFFSET = 10_000_000  # what upstream's file adds to ids so that three splits share one file


def questions(folder: Path, protocol: Protocol) -> list[Question]:
    """As upstream's file asks them, where it lies there, else the official ones, split by split."""
    official = {split: _labels(folder, split) for split in SPLITS}
    upstream = there(folder, "llava_pope_test.jsonl")
    if upstream is None:
        pairs = [(row, split, row) for split, rows in official.items() for row in rows]
    else:
        rows = [(row, row.one_of("category", *SPLITS)) for row in read_rows(upstream)]
        align = _in_order if protocol.name == BY_ORDER else _by_id
        pairs = [
            pair
            for split in dict.fromkeys(split for _, split in rows)
            for pair in align([row for row, own in rows if own == split], split, official[split])
        ]
    place = pictures(folder, "val2014", "images", "coco/val2014")
    found = []
    for row, split, labelled in pairs:
        given = row.whole("question_id")
        found.append(
            Question(
                id=f"{split}-{given % _OFFSET}",
                given=given,
                prompt=protocol.asked(_bare(row)),
                image=Image(place / row.text("image")),
                category=split,
                truth=labelled.one_of("label", "yes", "no"),
            )
        )
    return unique(found, folder)


def _labels(folder: Path, split: str) -> list[Row]:
    name = f"coco_pope_{split}.json"
    return list(read_rows(find(folder, name, f"coco/{name}", f"output/coco/{name}"), lines=True))


_Aligned = tuple[Row, str, Row]  # as asked, split, with its label


def _in_order(rows: Sequence[Row], split: str, labels: Sequence[Row]) -> list[_Aligned]:
    """The reference's way: the n-th question of a split has the n-th label."""
    if len(rows) > len(labels):
        raise rows[len(labels)].fail(f"{len(rows)} {split} questions, but {len(labels)} labels")
    return [(row, split, label) for row, label in zip(rows, labels, strict=False)]


def _by_id(rows: Sequence[Row], split: str, labels: Sequence[Row]) -> list[_Aligned]:
    """The label of the same id if it is about the same question, else of the same question."""
    ids = {label.whole("question_id"): label for label in labels}
    topics = {_topic(label): label for label in labels}
    aligned = []
    for row in rows:
        label = ids.get(row.whole("question_id") % _OFFSET)
        if label is None or _topic(label) != _topic(row):
            label = topics.get(_topic(row))
        if label is None:
            remedy = f"coco_pope_{split}.json is of another revision of POPE: take the one that this file was made from"
            raise row.fail(f"no label for {_bare(row)!r} about {row.text('image')}", remedy)
        aligned.append((row, split, label))
    return aligned


def _topic(row: Row) -> tuple[str, str]:
    """Picture and question; the first revision of POPE wrote "imange" here and there."""
    return row.text("image"), _bare(row).replace("imange", "image")


def _bare(row: Row) -> str:
    return row.text("text").removesuffix(f"\n{SHORT}")


_ASKED = with_numbers(
    "pope",
    "f1",
    LLAVA_15.but(suffix=SHORT, note="papers quote the mean F1 of the three splits"),
    LLAVA_16.but(suffix=SHORT, note="the prompt format is the checkpoint's own"),
)
POPE = Benchmark(
    name="pope",
    title="POPE: things that are, or are not, in pictures of COCO",
    needs="coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json (also in coco/), the pictures of COCO in val2014/;"
    " LLaVA's llava_pope_test.jsonl is used if it is there",
    reference="llava/eval/eval_pope.py of haotian-liu/LLaVA, which is POPE's evaluate.py split by split. Departures: labels are found by"
    " id, picture and wording, not by order; a missing answer is wrong where there it moves all later ones up; 0 / 0 is 0",
    protocols=(*_ASKED, _ASKED[0].but(name=BY_ORDER, note="labels by their order in each split, as upstream's scorer finds them")),
    questions=questions,
    score=pope_scores,
    verdict=pope_verdict,
)
