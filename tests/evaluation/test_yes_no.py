"""POPE: the parser against cases worked out by hand from the reference, every file form, every missing piece."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from families import ask, by_name, lines, replied
from hypothesis import given
from hypothesis import strategies as st

from llavakit.errors import DataError
from llavakit.eval import pope
from llavakit.eval.benchmark import SHORT, Answered, Question
from llavakit.eval.yes_no import SPLITS, pope_says, pope_score, pope_scores

# The words of POPE's parser: before the first full stop, commas deleted, blanks part words, No / not / no deny.
POPE = {
    "": "yes",
    "Yes": "yes",
    "No": "no",
    "no": "no",
    "NO": "yes",
    "nO": "yes",
    "No.": "no",
    "No, there is not.": "no",
    "Yes, but not here": "no",
    "There is no dog": "no",
    "Nothing": "yes",
    "None": "yes",
    "I do not know": "no",
    "I know": "yes",
    "Yes. No": "yes",
    ".No": "yes",
    "No\n": "yes",
    "\nNo": "yes",
    "No\tdog": "yes",
    " No": "no",
    "  no  ": "no",
    "No!": "yes",
    "n,o": "no",
    "No,way": "yes",
    "isn't": "yes",
    "cannot": "yes",
    "'no'": "yes",
    "no。": "yes",
    "\u00a0no": "yes",
    "ＮＯ": "yes",
    "1.5 no": "yes",
}


@pytest.mark.parametrize(("text", "said"), POPE.items())
def test_pope_reads_as_its_reference(text: str, said: str) -> None:
    assert pope_says(text) == said


def test_pope_counts_by_hand() -> None:
    texts = ["Yes", "No", "Yes", "No", "Yes", "No", "Yes"]
    labels = ["yes", "yes", "no", "no", "yes", "yes", "yes"]  # tp 3, fn 2, fp 1, tn 1
    counts = pope_score(texts, labels)
    assert (counts.tp, counts.fp, counts.tn, counts.fn) == (3, 1, 1, 2)
    assert counts.accuracy == pytest.approx(100 * 4 / 7)
    assert counts.precision == pytest.approx(75)
    assert counts.recall == pytest.approx(60)
    assert counts.f1 == pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35)
    assert counts.yes_ratio == pytest.approx(100 * 4 / 7)


def test_pope_cuts_what_is_longer_but_counts_every_answer_for_the_share_of_yes() -> None:
    counts = pope_score(["Yes", "Yes", "No", "No"], ["yes"])
    assert (counts.total, counts.accuracy, counts.yes_ratio) == (1, 100, 50)
    assert pope_score(["Yes"], ["yes", "no", "no"]).total == 1


def test_pope_takes_every_label_but_no_for_a_yes() -> None:
    assert pope_score(["yes", "yes"], ["No", "unknown"]).tp == 2


def test_pope_divides_by_nothing_to_nothing() -> None:
    nothing = pope_score(["no", "no"], ["no", "no"])
    assert (nothing.accuracy, nothing.precision, nothing.recall, nothing.f1, nothing.f1_half_width) == (100, 0, 0, 0, None)
    assert pope_score([], []).yes_ratio == 0


def test_a_missing_answer_of_pope_is_wrong_on_either_side_and_says_nothing() -> None:
    counts = pope_score([None, None, "yes"], ["yes", "no", "yes"])
    assert (counts.tp, counts.fp, counts.tn, counts.fn) == (1, 1, 0, 1)
    assert counts.yes_ratio == 100


said = st.sampled_from(["Yes", "No", "no dog", "", "maybe"])


@given(st.lists(st.tuples(said, st.sampled_from(["yes", "no"])), min_size=1))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(rows: list[tuple[str, str]]) -> None:
    counts = pope_score([text for text, _ in rows], [label for _, label in rows])
    p, r = counts.precision, counts.recall
    assert counts.f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0)
    assert counts.total == len(rows)
    if counts.f1_half_width is not None:
        assert 0 < counts.f1_half_width <= 50


@given(st.permutations(list(zip(POPE, ["yes", "no"] * 15 + ["yes"], strict=True))))
def test_pope_does_not_depend_on_order(rows: list[tuple[str, str]]) -> None:
    straight = list(zip(POPE, ["yes", "no"] * 15 + ["yes"], strict=True))
    assert pope_score(*zip(*rows, strict=True)) == pope_score(*zip(*straight, strict=True))  # type: ignore[arg-type]


# --- the files of POPE --------------------------------------------------------------------------------------------------------------


THINGS = ["dog", "orange"]


def official(folder: Path, labels: Sequence[str] = ("yes", "no"), *, ids: Sequence[int] = (1, 2)) -> None:
    for split in SPLITS:
        rows = [
            {"question_id": number, "image": f"{split}.jpg", "text": f"Is there a {thing} in the image?", "label": label}
            for number, thing, label in zip(ids, THINGS, labels, strict=True)
        ]
        lines(folder / f"coco_pope_{split}.json", *rows)


def upstream(folder: Path, things: Sequence[str] = THINGS, *, offsets: Sequence[int] = (10_000_000, 20_000_000, 0)) -> None:
    rows: list[dict[str, object]] = [
        {"question_id": offset + n, "image": f"{split}.jpg", "text": f"Is there a {thing} in the image?\n{SHORT}", "category": split}
        for split, offset in zip(SPLITS, offsets, strict=True)
        for n, thing in enumerate(things, 1)
    ]
    lines(folder / "llava_pope_test.jsonl", *rows)


def read(folder: Path, name: str = "llava-1.5") -> list[Question]:
    return ask(pope.POPE, folder, name)


def test_pope_asks_the_official_files(tmp_path: Path) -> None:
    official(tmp_path)
    asked = read(tmp_path)
    assert [(q.id, q.category, q.truth) for q in asked[:2]] == [("random-1", "random", "yes"), ("random-2", "random", "no")]
    assert asked[0].prompt == f"Is there a dog in the image?\n{SHORT}"
    assert asked[0].image is not None
    assert asked[0].image.source == tmp_path / "val2014" / "random.jpg"
    assert [q.category for q in asked] == ["random", "random", "popular", "popular", "adversarial", "adversarial"]


def test_upstreams_file_asks_the_same_and_keeps_its_ids(tmp_path: Path) -> None:
    official(tmp_path / "coco")
    plain = read(tmp_path)
    upstream(tmp_path)
    asked = read(tmp_path)
    assert [q.given for q in asked] == [10_000_001, 10_000_002, 20_000_001, 20_000_002, 1, 2]
    assert [(q.id, q.prompt, q.truth, q.category) for q in asked] == [(q.id, q.prompt, q.truth, q.category) for q in plain]


def test_labels_follow_the_question_where_order_and_ids_do_not(tmp_path: Path) -> None:
    official(tmp_path, ids=(2, 1))
    upstream(tmp_path, offsets=(10_000_000, 20_000_000, 500))
    assert [q.truth for q in read(tmp_path)] == ["yes", "no"] * 3
    upstream(tmp_path, things=THINGS[::-1])
    assert [q.truth for q in read(tmp_path)] == ["no", "yes"] * 3
    assert [q.truth for q in read(tmp_path, pope.BY_ORDER)] == ["yes", "no"] * 3  # as the reference: the n-th has the n-th


def test_the_slip_of_the_first_revision_is_no_other_question(tmp_path: Path) -> None:
    official(tmp_path)
    text = (tmp_path / "coco_pope_random.json").read_text().replace("orange in the image", "orange in the imange")
    upstream(tmp_path)
    (tmp_path / "coco_pope_random.json").write_text(text)
    assert [q.truth for q in read(tmp_path)][:2] == ["yes", "no"]


def test_labels_of_another_revision_are_noticed(tmp_path: Path) -> None:
    official(tmp_path)
    upstream(tmp_path, things=["cat", "orange"])
    with pytest.raises(DataError, match=r"llava_pope_test\.jsonl:1: no label .*another revision"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ('{"question_id": 1', "not JSON"),
        ("[1]", "not an object"),
        ('{"image": "a.jpg", "text": "?", "label": "yes"}', "no question_id"),
        ('{"question_id": "x", "image": "a.jpg", "text": "?", "label": "yes"}', "no whole number"),
        ('{"question_id": 1, "image": "a.jpg", "text": "?", "label": "maybe"}', "label is 'maybe'"),
        ('{"question_id": 1, "image": 7, "text": "?", "label": "yes"}', "image is not text"),
    ],
)
def test_a_broken_line_of_pope_is_told_with_its_place(tmp_path: Path, broken: str, what: str) -> None:
    official(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    path.write_text("\n" + broken + "\n")
    with pytest.raises(DataError, match=what) as caught:
        read(tmp_path)
    assert caught.value.where == f"{path}:2"


def test_missing_files_of_pope_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"coco_pope_random\.json"):
        read(tmp_path)
    official(tmp_path, ids=(1, 1))
    with pytest.raises(DataError, match="random-1"):
        read(tmp_path)


def test_pope_quotes_the_mean_of_three_splits(tmp_path: Path) -> None:
    official(tmp_path)
    asked = read(tmp_path)
    replies = ["Yes", "No", "Yes", "Yes", "No", None]  # f1: 1; tp 1 fp 1: 2/3; tp 0: 0
    scores = by_name(pope_scores(replied(asked, *replies)))
    assert [round(scores[split].value, 6) for split in SPLITS] == [100, 66.666667, 0]
    assert scores["f1"].value == pytest.approx((100 + 200 / 3) / 3)
    assert (scores["f1"].headline, scores["f1"].count) == (True, 6)
    assert [name for name, score in scores.items() if score.headline] == ["f1"]
    assert scores["adversarial accuracy"].value == 0
    assert scores["yes ratio"].value == pytest.approx((50 + 100 + 0) / 3)
    some = by_name(pope_scores([Answered(question=asked[0], text="Yes")]))
    assert "f1" not in some
    assert not any(score.headline for score in some.values())


def test_the_verdict_is_the_score_of_one_question(tmp_path: Path) -> None:
    official(tmp_path)
    for question in read(tmp_path):
        for text in ("Yes", "No", None):
            assert pope.POPE.verdict is not None
            one = pope.POPE.verdict(Answered(question=question, text=text))
            assert one.points == pope_score([text], [question.truth]).accuracy / 100
            assert one.expected == question.truth


def test_what_is_published_is_a_metric_that_is_scored() -> None:
    asked = [Question(id=f"{s}-{t}", given=1, prompt="", category=s, truth=t) for s in SPLITS for t in ("yes", "no")]
    metrics = {score.metric for score in pope_scores([Answered(question=q, text="no") for q in asked])}
    assert {p.metric for one in pope.POPE.protocols for p in one.published} <= metrics
