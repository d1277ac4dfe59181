"""Two answers, one judge: what it is told, what its first line comes to, and that nothing is asked twice or averaged by mistake."""

from __future__ import annotations

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judging import LIMITS, Scripted, answers, cases, job, moody, work

from llavakit.errors import DataError
from llavakit.eval.judge import RULES, SYSTEM, Case, Job, Rule, Rules, first_bias, judged, parse_scores, run
from llavakit.eval.review_page import page
from llavakit.eval.reviews import read_reviews, write_reviews
from llavakit.responder import Ledger

EXPECTED: list[tuple[str, tuple[float, float] | None]] = [
    ("8 6", (8, 6)),
    ("8 6\nAssistant 1 is better.", (8, 6)),
    ("8.5 7\n", (8.5, 7)),
    ("8,6\n", (8, 6)),
    ("8, 6\n", None),  # the comma becomes a second blank
    ("8  6", None),
    ("8 6 ", None),
    (" 8 6", None),
    ("8\t6", None),  # only blanks part
    ("8 6\r\nwhy", (8, 6)),  # a number may end in white space
    ("8\t 6", (8, 6)),
    ("8\u00a06", None),
    ("8", None),
    ("8 6 7", None),
    ("", None),
    ("\n8 6", None),
    ("8/10 6/10", None),
    ("(8, 6)", None),
    ("Assistant 1: 8\nAssistant 2: 6", None),
    ("Scores: 8 6", None),
    ("eight six", None),
    ("-1 -1", (-1, -1)),
    ("1e1 .5", (10, 0.5)),
    ("+8 6", (8, 6)),
    ("1_0 6", (10, 6)),  # what Python calls a number
    ("８ ６", (8, 6)),
    ("inf 6", (math.inf, 6)),
    ("8; 6", None),
    ("8,6,", None),
    (",8 6", None),
    ("8 6\u2028x", None),  # only a line feed ends the first line
    ("8 6\v", (8, 6)),
    ("**8 6**", None),
]


@pytest.mark.parametrize(("text", "scores"), EXPECTED)
def test_a_score_line(text: str, scores: tuple[float, float] | None) -> None:
    assert parse_scores(text) == scores


def test_nan_is_a_number_to_the_parser_and_none_to_the_judge() -> None:
    found = parse_scores("nan 6")
    assert found is not None
    assert math.isnan(found[0])
    assert Job(cases=()).accept(_query(), _said("nan 6")) == "out_of_range"


@given(st.text(), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_two_numbers_are_read_back_whatever_follows(why: str, first: float, second: float) -> None:
    assert parse_scores(f"{first} {second}\n{why}") == (first, second)


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    found = parse_scores(text)
    assert found is None or len(found) == 2


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        ("8 6\nwhy", "stop", None),
        ("1 10", "stop", None),
        ("0 6", "stop", "out_of_range"),
        ("8 10.5", "stop", "out_of_range"),
        ("-1 -1", "stop", "out_of_range"),
        ("inf 6", "stop", "out_of_range"),
        ("80 60\n", "stop", "out_of_range"),
        ("fine", "stop", "unparsable"),
        ("8 6\nbecause it", "length", None),  # what is cut is the explanation
        ("8 1", "length", "length"),  # ... or a 10
        ("8 6\nwhy", "cut", "cut"),
        ("8 6\nwhy", "filter", "filter"),
    ],
)
def test_what_is_a_review(text: str, finish: str, reason: str | None) -> None:
    assert Job(cases=()).accept(_query(), _said(text, finish)) == reason
    assert Job(cases=(), upstream=True).accept(_query(), _said(text, finish)) is None


def test_the_prompt_has_the_blocks_in_order() -> None:
    case = Case(id="7", given=7, category="conv", question="Q?", reference="R", candidate="C", context="one\n\ndog: [0, 0, 1, 1]")
    talk = Rules().ask(case)
    assert talk.system == SYSTEM
    assert "\n" not in SYSTEM
    head = "[Context]\none\n\ndog: [0, 0, 1, 1]\n\n[Question]\nQ?\n\n"
    body = "[Assistant 1]\nR\n\n[End of Assistant 1]\n\n[Assistant 2]\nC\n\n[End of Assistant 2]\n\n"
    assert talk.turns[-1].text == f"{head}{body}[System]\n{RULES['conv'].prompt}\n\n"
    assert "[Context]" not in Rules().ask(replace(case, context="")).turns[-1].text
    swapped = Rules().ask(case, swapped=True).turns[-1].text
    assert swapped == talk.turns[-1].text.replace("]\nR\n", "]\n?\n").replace("]\nC\n", "]\nR\n").replace("]\n?\n", "]\nC\n")


def test_every_category_has_a_rule_that_asks_for_the_line_that_is_parsed() -> None:
    names = {"conv", "detail", "complex", "llava_bench_conv", "llava_bench_detail", "llava_bench_complex", "default", "coding", "math"}
    assert set(RULES) == names
    for name, rule in RULES.items():
        assert "from 1 to 10" in rule.prompt
        assert "one space" in rule.prompt
        assert ("box" in rule.prompt) == (name in ("conv", "detail", "complex"))
    with pytest.raises(DataError, match="no rule for category 'poem'"):
        Rules().ask(cases(1, "poem")[0])


def test_upstreams_rule_file_replaces_ours_and_the_digest_tells(tmp_path: Path) -> None:
    (tmp_path / "rule.json").write_text(json.dumps({"conv": {"role": "Model", "prompt": "Rate."}, "math": {"prompt": "Count."}}))
    rules = Rules.load(tmp_path / "rule.json", system="A checker.")
    assert rules.table == {"conv": Rule("Rate.", "Model"), "math": Rule("Count.")}
    text = rules.ask(cases(1)[0]).turns[-1].text
    assert "[Model 2]\ncandidate 0\n\n[End of Model 2]\n\n[System]\nRate.\n\n" in text
    assert rules.digest("conv") != Rules().digest("conv")
    assert replace(rules, system="Another.").digest("conv") != rules.digest("conv")
    (tmp_path / "rule.json").write_text('{"conv": {"prompt": 3}}')
    with pytest.raises(DataError, match=r"rule\.json: conv: prompt is not text"):
        Rules.load(tmp_path / "rule.json")


def test_a_candidate_may_say_what_no_prompt_can_hold() -> None:
    case = replace(cases(1)[0], candidate="a\0b \ud800 [End of Assistant 2]")
    assert "ab ? [End of Assistant 2]" in Rules().ask(case).turns[-1].text


def test_what_is_no_review_is_asked_again_with_another_seed_and_told(tmp_path: Path) -> None:
    seeds: list[int | None] = []

    def say(query: object) -> str:
        seeds.append(query.sampling.seed)  # type: ignore[attr-defined]
        return ("Both are good.", "8, 6", "11 3", "8 6\nso")[len(seeds) - 1]

    judge, one = Scripted(say), Job(cases=cases(1))
    with Ledger(tmp_path / "l") as ledger:
        assert run(one, judge, ledger, limits=LIMITS).exit_code == 0
        (verdict,) = judged(one, judge.name, ledger)
    assert verdict.scores == (8, 6)
    assert [refused.reason for refused in verdict.refused] == ["unparsable", "unparsable", "out_of_range"]
    assert len(set(seeds)) == 4
    assert verdict.readings[0].seed == seeds[3]
    assert verdict.readings[0].model == "scripted-0613"


def test_a_review_that_never_comes_has_no_scores_and_upstream_calls_it_minus_one(tmp_path: Path) -> None:
    judge, one = Scripted(lambda query: "I would rather not."), Job(cases=cases(2), again=2)
    with Ledger(tmp_path / "l") as ledger:
        run(one, judge, ledger, limits=LIMITS)
        found = judged(one, judge.name, ledger)
        assert [verdict.scores for verdict in found] == [None, None]
        assert judge.asked.total() == 6
        assert write_reviews(tmp_path / "r.jsonl", one, found, judge=judge.name) == []
        upstream = replace(one, upstream=True)
        run(upstream, judge, ledger, limits=LIMITS)
        assert judge.asked.total() == 6  # the first replies are in the ledger
        assert [verdict.scores for verdict in judged(upstream, judge.name, ledger)] == [(-1, -1)] * 2
    shown = page(found, title="t")
    assert "no review" in shown
    assert "not used (unparsable): I would rather not." in shown


def test_both_orders_are_averaged_and_a_bias_for_the_first_cancels(tmp_path: Path) -> None:
    def biased(query: object) -> str:
        points = [4 if text.startswith("reference") else 6 for text in answers(query)]  # type: ignore[arg-type]
        return f"{points[0] + 3} {points[1]}\nthe first one is nicer"

    judge, one = Scripted(biased), Job(cases=cases(5), swap=True)
    with Ledger(tmp_path / "l") as ledger:
        run(one, judge, ledger, limits=LIMITS)
        found = judged(one, judge.name, ledger)
    assert {verdict.scores for verdict in found} == {(5.5, 7.5)}
    assert first_bias(found) == 3
    rows = write_reviews(tmp_path / "r.jsonl", one, found, judge="scripted")
    written = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert written[0]["orders"][0]["tuple"] == [7, 6]
    assert written[0]["orders"][1]["tuple"] == [4, 9]
    assert [row.scores for row in read_reviews(tmp_path / "r.jsonl")] == [row.scores for row in rows]


@settings(max_examples=10, deadline=None)  # each opens a ledger on the disk
@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=1, max_size=5))
def test_exchanging_the_answers_exchanges_the_scores(points: list[tuple[int, int]]) -> None:
    """With both orders asked, it is no matter which answer is called the reference."""
    import tempfile

    one = Job(cases=cases(len(points)), swap=True)
    other = replace(one, cases=[replace(case, reference=case.candidate, candidate=case.reference) for case in one.cases])

    def say(query: object) -> str:
        found = [points[int(text.split()[1])][text.startswith("candidate")] for text in answers(query)]  # type: ignore[arg-type]
        return f"{found[0]} {max(1, found[1] - 1)}"

    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "l") as ledger:
        for each in (one, other):
            run(each, Scripted(say), ledger, limits=LIMITS)
        told, turned = (judged(each, "scripted", ledger) for each in (one, other))
    assert [verdict.scores for verdict in told] == [verdict.scores and verdict.scores[::-1] for verdict in turned]


def test_a_review_line_is_upstreams_with_who_judged(tmp_path: Path) -> None:
    one = Job(cases=[replace(cases(1)[0], reference_id="ref-1", candidate_id="shortuuid")])
    with Ledger(tmp_path / "l") as ledger:
        run(one, Scripted(lambda query: "8 6\nso"), ledger, limits=LIMITS)
        write_reviews(tmp_path / "r.jsonl", one, judged(one, "scripted", ledger), judge="scripted")
    row = json.loads((tmp_path / "r.jsonl").read_text())
    assert list(row)[:7] == ["id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple"]
    assert [row[name] for name in list(row)[:7]] == [1, 0, "ref-1", "shortuuid", "conv", "8 6\nso", [8.0, 6.0]]
    told = {"asked": "scripted", "model": "scripted-0613", "temperature": 0.2, "seed": 0, "prompt": one.rules.digest("conv"), "refused": []}
    assert row["judge"] == told


def test_a_run_killed_ten_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    whole = Scripted(moody)
    with Ledger(tmp_path / "whole") as ledger:
        run(job(), whole, ledger, limits=LIMITS)
        expected = judged(job(), whole.name, ledger)
        replies = {key: completion.text for key, _, completion in ledger.replies()}
    assert all(verdict.scores for verdict in expected)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["judging"])
    for number in range(10):
        process = context.Process(target=work, args=(tmp_path / "killed", 1 + number % 5))
        process.start()
        process.join(30)
        assert process.exitcode == -9
    last = context.Process(target=work, args=(tmp_path / "killed", None))
    last.start()
    last.join(30)
    assert last.exitcode == 0
    with Ledger(tmp_path / "killed") as ledger:
        again = Scripted(moody)
        run(job(), again, ledger, limits=LIMITS)
        assert not again.asked  # all is known
        found = judged(job(), again.name, ledger)
        listed = [(key, completion.text) for key, _, completion in ledger.replies()]
    assert found == expected
    assert dict(listed) == replies
    assert len(listed) == len(replies)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path, some in zip(files, (expected, found), strict=True):
        write_reviews(path, job(), some, judge="scripted")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_page_escapes_what_models_say(tmp_path: Path) -> None:
    one = Job(cases=[replace(cases(1)[0], candidate="<script>alert(1)</script>")])
    with Ledger(tmp_path / "l") as ledger:
        run(one, Scripted(lambda query: "8 6\n<b>so</b>"), ledger, limits=LIMITS)
        shown = page(judged(one, "scripted", ledger), title="a & b", notes=["x < y"])
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;" in shown
    assert "reference: 8" in shown
    assert "candidate: 6" in shown


def _query() -> object:
    return None


def _said(text: str, finish: str = "stop") -> object:
    from llavakit.responder import Completion

    return Completion(text=text, finish=finish, model="m")  # type: ignore[arg-type]
