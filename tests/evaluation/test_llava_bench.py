"""LLaVA-Bench: files as they are released, ratios of means, and the way from answers to numbers, offline on drawn scenes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from families import lines
from hypothesis import given
from hypothesis import strategies as st
from judging import LIMITS, Scripted
from judging import command as _judge

from llavakit.cli.judge import reviews as reviews_command
from llavakit.errors import ConfigError, DataError, ResponderError
from llavakit.eval import scenes_bench
from llavakit.eval.benchmark import Answered, Protocol, Question
from llavakit.eval.judge import Job, judged, run
from llavakit.eval.llava_bench import COCO, IN_THE_WILD, Answer, cases, questions, read_answers, relative_scores
from llavakit.eval.reviews import across, by_category, read_reviews, scores, table, unparsable
from llavakit.responder import InTurn, Ledger

POINT = st.integers(1, 20).map(lambda n: n / 2)
PAIRS = st.lists(st.tuples(POINT, POINT), min_size=1, max_size=12)
SAYS = Protocol(name="")


def coco(folder: Path) -> Path:
    """Two pictures, three questions each, under the names of the LLaVA repository."""
    names, kinds = ("000000000001.jpg", "000000000002.jpg"), ("conv", "detail", "complex")
    rows = [(3 * n + k, name, kind) for n, name in enumerate(names) for k, kind in enumerate(kinds)]
    lines(folder / "qa90_questions.jsonl", *({"question_id": i, "image": n, "text": f"Q{i}?", "category": k} for i, n, k in rows))
    lines(folder / "qa90_gpt4_answer.jsonl", *({"question_id": i, "text": f"R{i}", "category": k} for i, _, k in rows))
    box = {"category": "dog", "bbox": [0.37, 0.584, 0.504, 0.7]}
    told = ({"id": n[:-4], "image": n, "captions": ["A dog.", "Dog!"], "instances": [box, {**box, "category": "cat"}]} for n in names)
    lines(folder / "caps_boxes_coco2014_val_80.jsonl", *told)
    return folder


def wild(folder: Path) -> Path:
    lines(folder / "questions.jsonl", {"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What?"},
          {"question_id": 1, "image": "002.jpg", "category": "complex", "text": "Why?"})  # fmt: skip
    lines(folder / "answers_gpt4.jsonl", *({"question_id": i, "text": f"R{i}", "answer_id": f"gpt{i}", "model_id": "gpt4"} for i in (1, 0)))
    lines(folder / "context.jsonl", {"id": "001", "image": "001.jpg", "caption": ["A volcano.", "Seen from above."]},
          {"id": "002", "image": "002.jpg", "caption": "One paragraph."})  # fmt: skip
    return folder


def given_answers(path: Path, count: int) -> Path:
    return lines(path, *({"question_id": i, "text": f"C{i}", "answer_id": f"a{i}", "model_id": "m", "metadata": {}} for i in range(count)))


# --- numbers --------------------------------------------------------------------------------------------------------------------------


def test_relative_scores_are_ratios_of_means_and_all_is_over_questions() -> None:
    found = relative_scores({"detail": [(10, 5), (2, 4)], "conv": [(8, 8)]})
    assert list(found) == ["conv", "detail", "all"]
    assert found["detail"] == (75, 60, 45, 2)
    assert found["conv"] == (100, 80, 80, 1)
    assert found["all"].relative == 85  # 17 of 20; the mean over categories would be 87.5
    assert found["all"].questions == 3


def test_what_upstream_prints_comes_from_means_of_three_decimals() -> None:
    found = relative_scores({"conv": [(8, 7), (8, 8), (7, 7)]})["conv"]
    assert found.relative == pytest.approx(95.652, abs=1e-3)
    assert found.printed == (95.6, 76.7, 73.3)  # 7.333 / 7.667 is 95.644 %


def test_minus_ones_are_a_perfect_score_upstream_and_can_be_counted(tmp_path: Path) -> None:
    """What users.md 41 is about: a judge that failed always."""
    rows = [{"category": "conv", "tuple": [-1, -1], "content": "error", "question_id": i} for i in range(3)]
    found = read_reviews(lines(tmp_path / "r.jsonl", *rows))
    assert relative_scores(by_category(found))["all"].relative == 100
    assert unparsable(found) == 3


def test_nothing_below_the_line_is_no_number() -> None:
    assert relative_scores({}) == {}
    assert relative_scores({"conv": []}) == {}
    assert math.isnan(relative_scores({"conv": [(0, 5)]})["conv"].relative)
    assert math.isnan(relative_scores({"conv": [(0, 5)]})["conv"].printed[0])


@given(st.dictionaries(st.sampled_from(("conv", "detail", "complex")), PAIRS, min_size=1))
def test_all_lies_between_the_categories_and_order_is_no_matter(pairs: dict[str, list[tuple[float, float]]]) -> None:
    found = relative_scores(pairs)
    each = [numbers.relative for name, numbers in found.items() if name != "all"]
    assert min(each) - 1e-9 <= found["all"].relative <= max(each) + 1e-9
    turned = relative_scores({name: pairs[name][::-1] for name in reversed(list(pairs))})
    assert {name: tuple(map(pytest.approx, one)) for name, one in found.items()} == turned


@given(PAIRS, st.sampled_from((2.0, 0.5)))
def test_a_judge_of_another_scale_gives_the_same_relative_score(pairs: list[tuple[float, float]], factor: float) -> None:
    assert relative_scores({"conv": [(a * factor, b * factor) for a, b in pairs]})["all"].relative == pytest.approx(
        relative_scores({"conv": pairs})["all"].relative
    )


def test_scores_have_intervals_and_one_headline() -> None:
    found = scores({"conv": [(8, 6), (9, 3), (7, 8)], "detail": [(8, 4)]})
    assert [score.metric for score in found if score.headline] == ["all"]
    by_name = {score.metric: score for score in found}
    assert by_name["conv"].half_width is not None
    assert by_name["conv"].half_width > 0
    assert by_name["detail"].half_width is None  # one question cannot tell
    assert "| all | 4 | 65.6 ±" in table({"conv": [(8, 6), (9, 3), (7, 8)], "detail": [(8, 4)]})


def test_several_runs_have_a_mean_and_a_deviation() -> None:
    runs = [relative_scores({"conv": [(10, value)]}) for value in (6, 7, 8)]
    assert (across(runs)["all"].mean, across(runs)["all"].sd) == pytest.approx((70, 10))


# --- files ----------------------------------------------------------------------------------------------------------------------------


def test_review_files_of_upstream_are_read(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "r.jsonl",
        {"id": 1, "question_id": 0, "category": "llava_bench_conv", "content": "8 6", "tuple": [8.0, 6.0]},
        {"id": 2, "question_id": 1, "category": "llava_bench_detail", "content": "x", "tuple": [-1, -1]},
        {"id": 3, "question_id": 2, "score": [9, 3]},
    )
    found = read_reviews(path)
    assert by_category(found) == {"conv": [(8, 6)], "detail": [(-1, -1)], "all": [(9, 3)]}
    assert relative_scores(by_category(found))["all"].questions == 3
    assert [review.given for review in read_reviews(path, ignore=[1])] == [0, 2]


@pytest.mark.parametrize("row", ['{"category": "conv"}', '{"tuple": [1]}', '{"tuple": ["8", "6"]}', '{"tuple": [true, 1]}', "[8, 6]", "{"])
def test_a_broken_review_file_is_told_with_its_line(tmp_path: Path, row: str) -> None:
    (tmp_path / "r.jsonl").write_text('{"tuple": [8, 6]}\n' + row + "\n")
    with pytest.raises(DataError, match=r"r\.jsonl(:|, line )2"):
        read_reviews(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there is no review"):
        read_reviews(tmp_path / "r.jsonl")


def test_coco_is_told_in_captions_and_boxes(tmp_path: Path) -> None:
    found = cases(coco(tmp_path), given_answers(tmp_path / "a.jsonl", 6), wild=False)
    assert [case.category for case in found] == ["conv", "detail", "complex"] * 2
    assert found[4].context == "A dog.\nDog!\n\ndog: [0.37, 0.584, 0.504, 0.7]\ncat: [0.37, 0.584, 0.504, 0.7]"
    assert (found[4].question, found[4].reference, found[4].candidate) == ("Q4?", "R4", "C4")
    assert (found[4].reference_id, found[4].candidate_id) == (4, "a4")


def test_in_the_wild_is_told_in_sentences(tmp_path: Path) -> None:
    found = cases(wild(tmp_path), given_answers(tmp_path / "a.jsonl", 2), wild=True)
    assert [case.context for case in found] == ["A volcano.\nSeen from above.", "One paragraph."]
    assert [case.category for case in found] == ["llava_bench_conv", "llava_bench_complex"]
    assert [case.reference for case in found] == ["R0", "R1"]  # by id: the file has another order
    assert found[1].reference_id == "gpt1"


def test_questions_name_their_picture_and_reference(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"x")
    found = questions(coco(tmp_path), COCO.protocols[0])
    assert [question.id for question in found] == ["0", "1", "2", "3", "4", "5"]
    assert [question.given for question in found] == list(range(6))
    assert [question.truth for question in found] == [f"R{i}" for i in range(6)]
    places = [question.image.source for question in found if question.image]
    assert places[0] == tmp_path / "images" / "000000000001.jpg"  # where it would lie
    assert places[5] == tmp_path / "val2014" / "COCO_val2014_000000000002.jpg"


def test_questions_with_their_reference_in_one_file(tmp_path: Path) -> None:
    coco(tmp_path)
    for name in ("qa90_questions.jsonl", "qa90_gpt4_answer.jsonl"):
        (tmp_path / name).unlink()
    row = {"id": "000000000001", "image": "COCO_val2014_000000000001.jpg", "instruction": "Q?", "output": "R", "type": "conv"}
    lines(tmp_path / "llava_bench_coco_30x3.jsonl", row, {**row, "type": "detail"})
    found = cases(tmp_path, given_answers(tmp_path / "a.jsonl", 2), wild=False)
    assert [(case.id, case.category, case.reference) for case in found] == [("0", "conv", "R"), ("1", "detail", "R")]
    assert found[0].context.startswith("A dog.")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no questions\.jsonl, "):
        questions(tmp_path, SAYS)
    coco(tmp_path)
    with pytest.raises(DataError, match="question 5 has no answer"):
        cases(tmp_path, given_answers(tmp_path / "a.jsonl", 5), wild=False)
    given_answers(tmp_path / "a.jsonl", 6)
    lines(tmp_path / "caps_boxes_coco2014_val_80.jsonl", {"image": "000000000001.jpg", "captions": []})
    with pytest.raises(DataError, match="question 3 has no context"):
        cases(tmp_path, tmp_path / "a.jsonl", wild=False)
    lines(tmp_path / "qa90_gpt4_answer.jsonl", {"question_id": 0, "text": "R"})
    with pytest.raises(DataError, match="question 1 has no reference"):
        cases(tmp_path, tmp_path / "a.jsonl", wild=False)


@pytest.mark.parametrize(
    "rows", [[{"question_id": 0}], [{"text": "a"}], [{"question_id": True, "text": "a"}], [{"question_id": 0, "text": "a"}] * 2, ["a"]]
)
def test_a_broken_answers_file_is_told_with_its_line(tmp_path: Path, rows: list[object]) -> None:
    lines(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError, match=rf"a\.jsonl:{len(rows)}"):
        read_answers(tmp_path / "a.jsonl")


def test_published_numbers_are_those_of_the_tables() -> None:
    told = {(b.name, p.name, n.model, n.metric): n.value for b in (COCO, IN_THE_WILD) for p in b.protocols for n in p.published}
    assert told["llava-bench-coco", "v0", "full data, 158K", "all"] == 85.1
    assert told["llava-bench", "v0", "LLaVA, decoded three times", "complex"] == 81.7
    assert told["llava-bench", "llava-1.5", "1.5-13B", "all"] == 72.5
    assert told["llava-bench", "llava-1.6", "1.6-34B", "all"] == 89.6
    assert told["llava-bench", "llava-1.6-0613", "1.6-vicuna-7B", "all"] == 72.3
    assert {p.judge for p in IN_THE_WILD.protocols} == {"gpt-4-0314", "gpt-4-0613"}
    assert {p.max_new_tokens for b in (COCO, IN_THE_WILD) for p in b.protocols} == {1024}


# --- the whole way ----------------------------------------------------------------------------------------------------------------------

ITEMS = scenes_bench.items(4)


def drawn_answers(path: Path, change: str = "") -> Path:
    rows = ({"question_id": item.id, "text": change or item.reference} for item in scenes_bench.items())
    return lines(path, *rows)


def test_the_built_in_judge_gives_the_truth_full_marks_and_nonsense_few() -> None:
    for item in ITEMS:
        assert scenes_bench.grade(item, item.reference)[0] == 10, item
        assert scenes_bench.grade(item, "")[0] == 1, item
        assert scenes_bench.grade(item, "I cannot see it.")[0] <= 6
    assert {item.category for item in ITEMS} == {"conv", "detail", "complex"}
    assert all(item.scene.split == "test" for item in ITEMS)


def test_the_built_in_judge_is_asked_like_any_other(tmp_path: Path) -> None:
    judge = InTurn(scenes_bench.ScenesJudge(ITEMS), "scenes")
    given = {str(item.id): Answer(text=item.reference if item.id % 2 else "a red star", id=item.id) for item in ITEMS}
    one = Job(cases=scenes_bench.cases(ITEMS, given), swap=True)
    with Ledger(tmp_path / "l") as ledger:
        run(one, judge, ledger, limits=LIMITS)
        found = judged(one, judge.name, ledger)
    for item, verdict in zip(ITEMS, found, strict=True):
        assert verdict.scores == (10, scenes_bench.grade(item, given[str(item.id)].text)[0])
    answered = [Answered(question=_question(item), text=given[str(item.id)].text) for item in ITEMS]
    pairs = by_category([_review(verdict) for verdict in found])
    assert scenes_bench.score(answered) == scores(pairs)


def test_the_command_judges_offline_and_reads_its_own_reviews(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = drawn_answers(tmp_path / "answers.jsonl")
    given = {"name": "scenes-bench", "answers": path}
    _judge(**given)
    out = capsys.readouterr().out
    assert "| all | 90 | 100.0 ± 0.0 | 100.0 | 100.0 |" in out
    file = tmp_path / "answers.reviews" / "reviews_scenes-judge.jsonl"
    assert str(file) in out
    before = file.read_bytes()
    _judge(**given)  # all is in the ledger
    assert file.read_bytes() == before
    capsys.readouterr()
    reviews_command([file, file], "0,1")
    out = capsys.readouterr().out
    assert "| all | 88 | 100.0" in out
    assert "100.0 ± 0.0 | 100.0, 100.0" in out
    page = file.with_suffix(".html").read_text()
    assert page.count("<article") == 90
    assert page.count("data:image/jpeg") == 90


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    path = drawn_answers(tmp_path / "answers.jsonl")
    with pytest.raises(ConfigError, match="nothing is judged"):
        _judge("pope", path)
    with pytest.raises(ConfigError, match="files are not named"):
        _judge("llava-bench", path)
    coco(tmp_path)
    given_answers(tmp_path / "a.jsonl", 6)
    with pytest.raises(ConfigError, match="no judge is named"):
        _judge("llava-bench-coco", tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(ConfigError, match="knows scenes-bench only"):
        _judge("llava-bench-coco", tmp_path / "a.jsonl", tmp_path, judge="scenes")


def test_reviews_that_never_come_end_the_command_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stubborn = Scripted(lambda query: "no idea" if "Q4?" in query.conversation.turns[-1].text else "8 6\nso")
    monkeypatch.setattr("llavakit.cli.judge._completer", lambda *given: stubborn)
    coco(tmp_path)
    given_answers(tmp_path / "a.jsonl", 6)
    with pytest.raises(ResponderError, match=r"1 of 6 reviews are missing \(question 4\)"):
        _judge("llava-bench-coco", tmp_path / "a.jsonl", tmp_path, judge="scripted")
    told = capsys.readouterr()
    assert "| all | 5 | 75.0" in told.out
    assert "judged by scripted-0613" in told.err
    assert "published numbers were judged by gpt-4-0314" in told.err
    _judge("llava-bench-coco", tmp_path / "a.jsonl", tmp_path, judge="scripted", upstream=True)
    assert "| all | 6 |" in capsys.readouterr().out


def _question(item: scenes_bench.Item) -> Question:
    return Question(id=str(item.id), given=item.id, prompt=item.question, category=item.category, truth=item)


def _review(verdict: object) -> object:
    from llavakit.eval.reviews import Review

    return Review(given=verdict.case.given, scores=verdict.scores, category=verdict.case.category)  # type: ignore[attr-defined]
