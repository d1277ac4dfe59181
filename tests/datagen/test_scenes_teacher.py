"""The built-in teacher tells the truth in the form of all teachers, and stage 2's file is what the parser read of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.datagen.checks import Rules, check
from llavakit.datagen.context import Context
from llavakit.datagen.drawn import conversations, export
from llavakit.datagen.kinds import KINDS, Prompts
from llavakit.datagen.parse import Kind, Reject, read
from llavakit.datagen.plan import task
from llavakit.datagen.scenes_teacher import ScenesTeacher, by_seed, describe, reason
from llavakit.errors import RefusedError
from llavakit.scenes.questions import questions
from llavakit.scenes.world import make_scene
from llavakit.types import Image, Sampling

PROMPTS = Prompts.load()
TEACHER = ScenesTeacher(PROMPTS)
seeds = st.integers(0, 10**6).filter(lambda seed: bool(make_scene(seed).things))


def say(kind: Kind, context: Context, *, see: bool = True) -> str:
    asked = task(kind, context, seed=0, detailed=PROMPTS.detailed)
    query = asked.query(PROMPTS, Sampling(), Image(Path(context.image)) if see else None)
    return "".join(TEACHER.reply(query.conversation, query.sampling))


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from(KINDS))
def test_every_reply_is_read_and_passes_the_checks(seed: int, kind: Kind) -> None:
    context = by_seed(f"{seed:08d}.jpg").context
    turns = read(kind, say(kind, context))
    assert not isinstance(turns, Reject)
    found, signs = check(kind, turns, context, Rules()), {sign.text for sign in make_scene(seed).signs}
    read_aloud = found is not None and found.code == "unknown_objects" and set(found.detail.split(":")[0].split(", ")) <= signs
    assert found is None or read_aloud, "only a printed word, 'van', may be taken for a thing that nobody told of"


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_conversations_are_true(seed: int) -> None:
    scene = make_scene(seed)
    (row,) = conversations([scene], described=0.5)
    values = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
    told = [{(q.question, q.answer) for q in questions(scene, random.Random(n))} for n in range(6)]
    met = 0
    for question, answer in zip(values[::2], values[1::2], strict=True):
        known = {true for pairs in told for asked, true in pairs if asked == question}
        assert known <= {answer}
        met += bool(known)
    assert 2 * met >= len(values) // 2 - 1, "other draws ask most of this too; the description is no question of theirs"


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_descriptions_and_reasons_count_right(seed: int) -> None:
    scene = make_scene(seed)
    said = describe(scene)
    assert all(f"{thing.color} {thing.shape}" in said for thing in scene.things)
    question, answer = reason(scene)
    if question.startswith("How many"):
        color = question.split("everything ")[1].split()[0]
        left = [thing for thing in scene.things if thing.color != color]
        number = ("nothing", "one", "two", "three", "four", "five")[len(left)]
        assert f"Without that, {number} would be left" in answer
        assert len(left) < len(scene.things)
    else:
        big = sum(thing.size == "big" for thing in scene.things)
        more = "as many" if 2 * big == len(scene.things) else "more big" if 2 * big > len(scene.things) else "more small"
        assert f"so there are {more}" in answer


def test_what_is_no_drawn_scene_is_refused() -> None:
    photo = Context("00000017", "00000017.jpg", ("A dog on a sofa.",))
    for context in (photo, Context("dog", "dog.jpg", ("A dog.",))):
        with pytest.raises(RefusedError, match="drawn scenes only"):
            say("detail", context)
    with pytest.raises(RefusedError, match="shown"):
        say("detail", by_seed("00000017.jpg").context, see=False)


def test_stage_two_is_what_the_parser_read(tmp_path: Path) -> None:
    """Every row of finetune.json is the teacher's text, read; the picture stands first."""
    folder = export(tmp_path, 12, turns=4, described=1.0, workers=1)
    teacher = ScenesTeacher(PROMPTS, turns=4, described=1.0)
    for row in json.loads((folder / "finetune.json").read_text()):
        context = by_seed(row["image"]).context
        query = task("conversation", context, seed=0).query(PROMPTS, Sampling(), Image(Path(context.image)))
        turns = read("conversation", "".join(teacher.reply(query.conversation)))
        values = [turn["value"] for turn in row["conversations"]]
        assert values[0].startswith("<image>\n")
        assert [values[0].removeprefix("<image>\n"), *values[1:]] == [words for turn in turns for words in turn]  # type: ignore[union-attr]
