"""The plan is a function of contexts, mix and seed; it holds the mix from its beginning and asks nothing twice."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.datagen.context import Box, Context
from llavakit.datagen.kinds import KINDS, SHARES, Prompts
from llavakit.datagen.plan import Plan, counts, task
from llavakit.datagen.rows import sample
from llavakit.errors import ConfigError
from llavakit.types import Image, Sampling

PROMPTS = Prompts.load()


def contexts(number: int) -> list[Context]:
    return [Context(f"{i:04}", f"{i:04}.jpg", (f"A caption of picture {i}.",), (Box("dog", 0, 0, 0.5, 1),)) for i in range(number)]


def plan(number: int, total: int | None = None, seed: int = 0) -> Plan:
    return Plan(contexts(number), counts(number, SHARES, total), seed=seed, detailed=PROMPTS.detailed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 5))
def test_a_plan_repeats_itself_and_asks_nothing_twice(number: int, seed: int) -> None:
    tasks = list(plan(number, seed=seed))
    assert tasks == list(plan(number, seed=seed))
    assert len(tasks) == len(plan(number)) == len({task.id for task in tasks})
    assert len({(task.kind, task.context.id) for task in tasks}) == len(tasks)
    assert Counter(task.kind for task in tasks) == +Counter(counts(number))


@given(st.integers(0, 3000), st.dictionaries(st.sampled_from(KINDS), st.integers(1, 100), min_size=1))
def test_counts_sum_up_and_keep_the_ratio(total: int, shares: dict[str, int]) -> None:
    found = counts(10_000, shares, total)  # type: ignore[arg-type]
    assert sum(found.values()) == total
    whole = sum(shares.values())
    assert all(abs(found[kind] - total * share / whole) < 1 for kind, share in shares.items())  # type: ignore[index]


def test_the_usual_mix_is_the_papers() -> None:
    assert counts(100_000, SHARES, 158_000) == {"conversation": 58_000, "detail": 23_000, "reasoning": 77_000}
    assert max(counts(80).values()) == 80, "as many as the pictures allow"


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300))
def test_any_beginning_has_the_mix(length: int) -> None:
    whole = plan(200)
    taken = Counter(task.kind for task in islice(whole, length))
    share = min(length, len(whole)) / len(whole)
    assert all(abs(taken[kind] - whole.counts[kind] * share) <= 2 for kind in KINDS)


def test_more_of_a_kind_than_pictures_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 of kind detail from 4 pictures"):
        Plan(contexts(4), {"detail": 5}, seed=0, detailed=PROMPTS.detailed)
    with pytest.raises(ConfigError, match="no kind"):
        counts(4, {})


def test_a_task_is_the_same_whatever_else_is_planned() -> None:
    few, many = ({task.id: task for task in plan(number, 20)} for number in (40, 80))
    assert all(many[name] == few[name] for name in set(few) & set(many))
    assert task("detail", contexts(1)[0], seed=1, detailed=PROMPTS.detailed) != task(
        "detail", contexts(1)[0], seed=2, detailed=PROMPTS.detailed
    )


def test_chance_is_spread() -> None:
    tasks = list(plan(400))
    assert 0.4 < sum(task.image_first for task in tasks) / len(tasks) < 0.6
    assert {task.instruction for task in tasks if task.kind == "detail"} == set(PROMPTS.detailed)
    assert len({task.seed for task in tasks}) == len(tasks)


def test_what_is_asked_is_system_examples_and_context() -> None:
    for one in plan(8):
        query = one.query(PROMPTS, Sampling(temperature=0.5))
        said = query.conversation.messages
        prompt = PROMPTS.of(one.kind)
        assert [message.role for message in said] == ["system", *["user", "assistant"] * len(prompt.examples), "user"]
        assert said[-1].text == one.context.text(boxes=one.kind != "conversation")
        assert ("[0.000" in said[-1].text) == (one.kind != "conversation")
        assert (query.sampling.seed, query.sampling.temperature) == (one.seed, 0.5)


def test_a_teacher_who_sees_gets_the_picture_before_the_same_text() -> None:
    picture = Image(b"a picture's bytes")
    for one in plan(4):
        blind, seeing = (one.query(PROMPTS, Sampling(), image) for image in (None, picture))
        assert seeing.conversation.images == (picture,)
        assert seeing.conversation.turns[-1].text.strip() == blind.conversation.turns[-1].text
        assert seeing.conversation.messages[:-1] == blind.conversation.messages[:-1]
        assert seeing.key("teacher") != blind.key("teacher")


def test_the_picture_stands_before_or_after_the_first_question_alone() -> None:
    turns = (("What?", "A dog."), ("Where?", "There."))
    for first, value in ((True, "<image>\nWhat?"), (False, "What?\n<image>")):
        row = sample("1-conversation", "1.jpg", turns, image_first=first)
        assert [turn["value"] for turn in row["conversations"]] == [value, "A dog.", "Where?", "There."]
        assert (row["id"], row["image"]) == ("1-conversation", "1.jpg")
