"""The papers' claims in miniature: what an interval covers, what a verdict rests on, what is said of missing runs. No model is trained."""

from __future__ import annotations

import json
import math
import random
import signal
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ablations import data, measure, run, table
from ablations.arms import ARMS, SEEDS, TUNE, seeds_of
from ablations.claims import CLAIMS, Claim, Side, finding, verdict
from ablations.interval import Interval, interval, student
from hypothesis import given
from hypothesis import strategies as st

from llavakit.config import FINETUNE, PRETRAIN, parse
from llavakit.preprocess import Preprocess
from llavakit.scenes.questions import questions
from llavakit.scenes.world import make_scene
from llavakit.train.loop import Outcome

CLAIM = Claim(name="a over b", says="a beats b", paper="+1", source="nowhere", better=Side(arm="base"), worse=Side(arm="linear"))


def made_up(
    mean: Callable[[str, int], float], *, seeds: tuple[int, ...] = SEEDS, questions: int = 60
) -> dict[tuple[str, int], dict[str, Any]]:
    """Results in which an arm answers a share of ``mean(arm, seed)`` rightly."""
    results = {}
    for arm in ARMS.values():
        for seed in seeds_of(arm, seeds):
            rng = random.Random(f"{arm.name} {seed}")
            steps = range(arm.every, arm.tune + 1, arm.every) if arm.every else (arm.tune,)
            points = {m: {str(s): [float(rng.random() < mean(arm.name, seed)) for _ in range(questions)] for s in steps} for m in arm.asks}
            results[arm.name, seed] = {
                "arm": arm.name, "seed": seed, "points": points, "questions": dict.fromkeys(arm.asks, "same"),
                "seconds": {"train": 30.0, "ask": 5.0},
            }  # fmt: skip
    return results


@pytest.mark.parametrize(("freedom", "factor"), [(1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042), (1000, 1.962)])
def test_student_is_the_table_in_every_textbook(freedom: float, factor: float) -> None:
    assert student(freedom) == pytest.approx(factor, abs=2e-3)


@pytest.mark.parametrize(("seed_spread", "question_spread", "noise"), [(0.0, 0.0, 1.0), (1.0, 0.0, 0.3), (0.0, 1.0, 0.3), (0.5, 1.0, 1.0)])
def test_the_interval_covers_the_truth_nineteen_times_in_twenty_or_more(seed_spread: float, question_spread: float, noise: float) -> None:
    rng, times, covered = random.Random(1), 300, 0
    for _ in range(times):
        by_seed = [rng.gauss(0, seed_spread) for _ in range(3)]
        by_question = [rng.gauss(0, question_spread) for _ in range(25)]
        found = interval([[2.0 + s + q + rng.gauss(0, noise) for q in by_question] for s in by_seed])
        covered += found.low <= 2.0 <= found.high
    assert covered / times > 0.95 - 2 * math.sqrt(0.95 * 0.05 / times)


def test_seeds_that_disagree_widen_the_interval() -> None:
    alike = [[1.0, 0.0, 1.0, 0.0]] * 3
    apart = [[1.0, 0.0, 1.0, 0.0], [2.0, 1.0, 2.0, 1.0], [0.0, -1.0, 0.0, -1.0]]
    assert interval(alike).mean == interval(apart).mean == 0.5
    assert interval(apart).half_width > interval(alike).half_width


def test_one_seed_speaks_for_its_questions_alone() -> None:
    row = [float(i % 3 == 0) for i in range(40)]
    found = interval([row])
    assert found.half_width == pytest.approx(student(39) * statistics.stdev(row) / math.sqrt(40), rel=1e-4)


@given(st.lists(st.lists(st.floats(-1, 1), min_size=5, max_size=5), min_size=2, max_size=4))
def test_an_interval_turns_with_its_sign(rows: list[list[float]]) -> None:
    there, back = interval(rows), interval([[-value for value in row] for row in rows])
    assert there.mean == pytest.approx(-back.mean)
    assert there.half_width == pytest.approx(back.half_width)
    assert there.half_width >= 0


@pytest.mark.parametrize(
    ("mean", "half", "complete", "said"),
    [
        (2, 1, True, "agrees"), (-2, 1, True, "disagrees"), (1, 2, True, "cannot tell"), (1, 1, True, "cannot tell"),
        (0, 0, True, "cannot tell"), (2, 1, False, "cannot tell"),
    ],
)  # fmt: skip
def test_a_verdict_needs_an_interval_beside_zero_and_every_seed(mean: float, half: float, complete: bool, said: str) -> None:
    assert verdict(Interval(mean=mean, half_width=half, seeds=3, questions=9), complete=complete) == said


def test_no_results_no_verdict() -> None:
    found = finding(CLAIM, {})
    assert (found.interval, found.verdict, found.missing) == (None, "cannot tell", SEEDS)


def test_a_missing_seed_is_said_and_settles_nothing() -> None:
    results = made_up(lambda arm, seed: 0.9 if arm == "base" else 0.1)
    assert finding(CLAIM, results).verdict == "agrees"
    del results["linear", 1]
    found = finding(CLAIM, results)
    assert (found.verdict, found.seeds, found.missing) == ("cannot tell", (0, 2), (1,))
    page = table.page(results)
    assert "2, missing 1" in page
    assert "missing" in next(line for line in page.splitlines() if line.startswith("| linear "))


def test_answers_are_paired_question_by_question() -> None:
    results = made_up(lambda arm, seed: 0.5)
    for seed in SEEDS:  # the same answers but for one question that only the better arm gets
        row = [float(i % 2) for i in range(60)]
        results["linear", seed]["points"]["short"] = {str(TUNE): row}
        results["base", seed]["points"]["short"] = {str(TUNE): [1.0, *row[1:]]}
    found = finding(CLAIM, results).interval
    assert found is not None
    assert found.mean == pytest.approx(100 / 60)


def test_keeping_98_percent_is_not_being_better() -> None:
    claim = Claim(name="", says="", paper="", source="", better=Side(arm="half"), worse=Side(arm="base"), keeps=0.98)
    results = made_up(lambda arm, seed: 1.0)
    assert finding(claim, results).verdict == "agrees"
    assert finding(claim, made_up(lambda arm, seed: 0.5 if arm == "half" else 1.0)).verdict == "disagrees"


def test_every_claim_is_about_arms_that_answer_its_questions() -> None:
    results = made_up(lambda arm, seed: 0.5)
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS) >= 10
    for claim in CLAIMS:
        assert not finding(claim, results).missing, claim.name
        assert len(finding(claim, results).seeds) in (1, 3)


def test_the_page_has_every_claim_and_every_run() -> None:
    page = table.page(made_up(lambda arm, seed: 0.5), plots=("claims.png",))
    for claim in CLAIMS:
        assert f"**{claim.name}**" in page
        assert claim.paper in page
    for arm in ARMS:
        assert f"\n| {arm} |" in page
    assert "![claims.png](ablations/claims.png)" in page


def test_steps_to_an_accuracy_are_the_first_that_reach_it() -> None:
    results = made_up(lambda arm, seed: 0.5)
    for seed in SEEDS:
        results["answer-first", seed]["points"]["science"] = {"20": [0.0, 0.0], "40": [1.0, 0.0]}
        results["reasoning-first", seed]["points"]["science"] = {"20": [1.0, 0.0] if seed else [0.0, 0.0], "40": [0.0, 0.0]}
    page = table.page(results)
    assert "Answer first ends at 50.0 of 100." in page
    assert "reasoning-first never / 20 / 20; answer-first 40 / 40 / 40." in page


def test_results_of_other_questions_are_not_compared(tmp_path: Path) -> None:
    for seed in (0, 1):
        one = made_up(lambda arm, seed: 0.5)["linear", seed]
        one["questions"]["short"] = f"set {seed}"
        (tmp_path / f"linear-seed{seed}.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match="linear-seed1"):
        table.read(tmp_path)


def test_a_stopped_series_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms, done = [ARMS["base"], ARMS["linear"], ARMS["tiny"]], []
    fresh = made_up(lambda arm, seed: 0.5)

    def perform(arm: Any, seed: int, work: Path) -> dict[str, Any]:
        if len(done) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        done.append((arm.name, seed))
        return fresh[arm.name, seed]

    monkeypatch.setattr(run, "perform", perform)
    monkeypatch.setattr(data, "write", lambda folder: None)
    with pytest.raises(KeyboardInterrupt):
        run.run(arms, SEEDS, work=tmp_path / "work", results=tmp_path / "results")
    (tmp_path / "again").touch()
    run.run(arms, SEEDS, work=tmp_path / "work", results=tmp_path / "results")
    run.run(arms, SEEDS, work=tmp_path / "work", results=tmp_path / "results")
    assert sorted(done) == sorted([(arm.name, seed) for arm in arms for seed in seeds_of(arm, SEEDS)])
    assert set(table.read(tmp_path / "results")) == set(done)


def test_a_half_trained_model_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = Outcome(checkpoint=tmp_path, step=3, signal=signal.SIGTERM)
    monkeypatch.setattr(run, "train", lambda config: stopped)
    with pytest.raises(SystemExit) as ended:
        run.whole(FINETUNE)
    assert ended.value.code == 143


def test_every_arm_is_made_of_options_that_exist() -> None:
    for arm in ARMS.values():
        parse(FINETUNE, [*run.QUIET, *run.STAGE_2, *arm.words])
        assert arm.data in data.FILES or arm.data == "print"
        assert set(arm.asks) <= set(measure.SETS) & set(table.METRICS)
        assert not arm.every or arm.tune % arm.every == 0
    parse(PRETRAIN, [*run.QUIET, *run.STAGE_1])


def test_without_its_base_view_a_picture_shows_in_tiles_alone() -> None:
    from PIL import Image

    sight, picture = Preprocess(size=56, aspect="squash"), Image.new("RGB", (112, 112), (200, 10, 10))
    whole = sight.views(picture, (112, 112))
    with run.sees(ARMS["tiles-only"]):
        seen = sight.views(picture, (112, 112))
        assert (sight.views(picture) != 0).any(), "one view alone stays as it is"
    assert (seen[0] == 0).all()
    assert (seen[1:] == whole[1:]).all()
    assert (sight.views(picture, (112, 112)) == whole).all()


def test_problems_are_counted_rightly() -> None:
    for seed in range(60):
        scene = make_scene(seed)
        if scene.things:
            problem = data.problem(scene)
            color = problem.question.removesuffix("?").split()[-1]
            left = sum(thing.color != color for thing in scene.things)
            assert 0 <= left < len(scene.things)
            assert problem.choices[problem.answer] == ("none", "one", "two", "three", "four")[left]
            assert problem.solution.count(" a ") + problem.solution.count(" an ") == len(scene.things) + left


def test_probes_ask_for_what_they_say() -> None:
    compounds, absent, present = (measure.SETS[kind]() for kind in ("compound", "absent", "present"))
    assert [one.seed for one in compounds] == [one.seed for one in absent] == [one.seed for one in present]
    for asked in zip(compounds, absent, present, strict=True):
        things = make_scene(asked[0].seed).things
        for one, kind in zip(asked, ("compound", "absent", "present"), strict=True):
            color, shape = one.prompt.removesuffix("?").split()[-2:]
            together = any(thing.name == f"{color} {shape}" for thing in things)
            apart = any(thing.color == color for thing in things), any(thing.shape == shape for thing in things)
            assert together is (kind == "present")
            assert apart == ((False, False) if kind == "absent" else (True, True))


def test_asked_scenes_are_of_the_test_split_and_trained_ones_are_not() -> None:
    assert all(make_scene(one.seed).split == "test" for name in ("short", "small", "science") for one in measure.SETS[name]())
    row = data.talk(make_scene(data.SEED), 0.8)
    assert len(row["conversations"]) >= 2
    assert {question.kind for question in questions(make_scene(data.SEED), random.Random(0))}


def test_half_of_the_samples_are_asked_for_short_answers() -> None:
    scenes = [make_scene(seed) for seed in range(10)]
    asked, plain = data.formatted(scenes, "\nSAY LITTLE"), data.formatted(scenes, "")
    for number, (one, other) in enumerate(zip(asked, plain, strict=True)):
        said = [turn["value"] for turn in one["conversations"]]
        assert [text.replace("\nSAY LITTLE", "") for text in said] == [turn["value"] for turn in other["conversations"]]
        assert all(text.endswith("SAY LITTLE") is (number % 2 == 0) for text in said[::2])
