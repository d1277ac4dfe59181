"""The drawn world tells the truth: pictures, words and boxes agree, and the splits never meet."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import llavakit
from llavakit.datagen.drawn import export
from llavakit.eval.scenes import Asked, ask, best_guess, caption_f1, held_out, overall, score, table
from llavakit.scenes.close_up import close_up
from llavakit.scenes.draw import RGB, blank, box, draw
from llavakit.scenes.questions import KINDS, pick, questions
from llavakit.scenes.statements import ORDER, captions, near_misses, statements
from llavakit.scenes.world import COLORS, LETTER, PLACES, SHAPES, Scene, Thing, make_scene, scenes
from llavakit.types import Conversation

seeds = st.integers(min_value=0, max_value=10**9)
few = settings(max_examples=60, deadline=None)


def nearest_color(pixel: np.ndarray) -> str:
    return min(RGB, key=lambda name: float(np.abs(np.array(RGB[name], dtype=float) - pixel).sum()))


@few
@given(seeds)
def test_a_seed_is_a_scene(seed: int) -> None:
    scene = make_scene(seed)
    assert scene == make_scene(seed)
    assert np.array_equal(np.asarray(draw(scene)), np.asarray(draw(scene)))
    assert draw(scene).size == (scene.width, scene.height) == blank(scene).size
    names = [t.name for t in scene.things]
    assert len(names) == len(set(names)), "two things of one name could not be told apart"


@few
@given(seeds)
def test_the_color_of_a_thing_is_on_the_picture(seed: int) -> None:
    scene = make_scene(seed)
    pixels = np.asarray(draw(scene)).astype(float)
    for index, thing in enumerate(scene.things):
        if thing.shape in ("ring", "moon") or scene.overlaps[:1] == ((index, 1),):
            continue
        pixel = pixels[int(thing.y * scene.height), int(thing.x * scene.width)]
        assert nearest_color(pixel) == thing.color


@few
@given(seeds)
def test_what_is_in_front_covers_what_is_behind(seed: int) -> None:
    scene = next(s for s in scenes("train", start=seed) if s.overlaps)
    back, front = (scene.things[i] for i in scene.overlaps[0])

    def colored(color: str, *things: Thing) -> np.ndarray:
        return shown(scene, color, *things)

    both = colored(back.color, back) & colored(front.color, front)
    assume(both.sum() > 8)  # see the next test
    assert colored(front.color, back, front)[both].mean() > 0.95
    assert not colored(back.color, back, front)[both].any()
    assert colored(back.color, back, front).sum() > 100, "a thing that is wholly covered"


def shown(scene: Scene, color: str, *things: Thing) -> np.ndarray:
    """Where a color is seen when these things alone are drawn."""
    only = Scene(**{**vars(scene), "things": things, "signs": (), "overlaps": ()})
    return np.abs(np.asarray(draw(only, long_side=336)).astype(int) - RGB[color]).sum(-1) < 40


def test_overlaps_can_be_seen() -> None:
    """All but very few: a ring or a moon may touch the other thing with its open side."""
    chosen = itertools.islice((s for s in scenes("train") if s.overlaps), 200)
    pairs = [(s, *(s.things[i] for i in s.overlaps[0])) for s in chosen]
    seen = [int((shown(s, back.color, back) & shown(s, front.color, front)).sum()) for s, back, front in pairs]
    assert sum(count > 8 for count in seen) >= 196, sorted(seen)[:8]


@few
@given(seeds)
def test_boxes_are_tight(seed: int) -> None:
    scene = make_scene(seed)
    plain = Scene(**{**vars(scene), "signs": (), "overlaps": ()})
    for thing in scene.things:
        with_it = Scene(**{**vars(plain), "things": (thing,)})
        without = Scene(**{**vars(plain), "things": ()})
        changed = np.abs(np.asarray(draw(with_it)).astype(int) - np.asarray(draw(without)).astype(int)).sum(-1) > 150
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        slack = 3 + 0.02 * scene.long_side  # the soft shadow and the antialiased rim
        assert all(abs(a - b) <= slack for a, b in zip(box(thing, scene), seen, strict=True)), (thing, box(thing, scene), seen)


@few
@given(seeds)
def test_words_are_true(seed: int) -> None:
    scene = make_scene(seed)
    truth = statements(scene)
    said = captions(scene)
    assert len(said) == 5
    total = len(scene.things)
    assert all(f"{t.color} {t.shape}" in said[0] for t in scene.things)
    assert sum(words.endswith("in all") for words in truth) == (1 if total else 0)
    wrong = near_misses(scene, random.Random(seed), 6, truth) if scene.things else []
    assert not truth & set(wrong)
    assert all(
        words.split()[0] in {"a", "an", "one", "two", "three", "four", "five", "no", "the", "something", "small", *ORDER} for words in wrong
    )


@few
@given(seeds)
def test_answers_follow_from_the_scene(seed: int) -> None:
    scene = make_scene(seed)
    by_name = {t.name: t for t in scene.things}
    for q in questions(scene, random.Random(seed)):
        if q.kind == "place":
            (thing,) = [t for name, t in by_name.items() if f"the {name}?" in q.question]
            assert q.answer == PLACES[3 * int(3 * thing.y) + int(3 * thing.x)]
        if q.kind == "exist":
            assert (q.answer == "yes") == any(f" {name}?" in q.question for name in by_name)
        if q.kind == "count" and "things are there" in q.question and not any(c in q.question for c in COLORS):
            assert q.answer == str(len(scene.things))
        if q.kind in ("word", "number", "small"):
            assert q.answer in [s.text for s in scene.signs]
        if q.kind == "shape":
            assert q.answer in SHAPES
    chosen = pick(scene, random.Random(seed), 8)
    assert len(chosen) <= 8
    assert {q.kind for q in chosen} <= set(KINDS)


def test_every_kind_is_asked() -> None:
    asked = Counter(q.kind for s in range(300) for q in questions(make_scene(s), random.Random(s)))
    assert set(asked) == set(KINDS)


def test_questions_are_the_same_in_every_process() -> None:
    """The order of a set of strings is not, and exports must be."""
    code = "import random; from llavakit.scenes.questions import *; from llavakit.scenes.world import make_scene; "
    code += "print([pick(make_scene(s), random.Random(s), 8) for s in range(40)])"
    done = [
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=60)
        for seed in ("1", "2")
    ]
    assert done[0].stdout == done[1].stdout


def test_splits_never_meet() -> None:
    """The split is a function of the content: equal contents are on one side, whatever their seeds."""
    sides: dict[str, set[str]] = {}
    for seed in range(30_000):
        scene = make_scene(seed)
        sides.setdefault(scene.key, set()).add(scene.split)
    assert all(len(side) == 1 for side in sides.values())
    share = sum(side == {"test"} for side in sides.values()) / len(sides)
    assert 0.03 < share < 0.07
    assert any(count > 1 for count in Counter(make_scene(s).key for s in range(30_000)).values()), "equal contents do occur"


def test_millions_of_scenes() -> None:
    """Contents repeat so rarely that millions must exist (birthday bound: n^2 / 2N repeats among n draws of N equally likely)."""
    many = [key for key in (make_scene(s).key for s in range(20_000)) if key.count(" @ ") >= 3]
    repeats = len(many) - len(set(many))
    assert len(many) ** 2 / (2 * max(repeats, 1)) > 5e6


def test_small_print_needs_high_resolution() -> None:
    """At one view of 112 pixels small type is under 4 pixels high, at 336 it is 10."""
    assert LETTER["small"] * 112 < 4
    assert LETTER["small"] * 336 >= 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("scenes"), 40, split="test", workers=1)


def test_export_is_what_readers_expect(folder: Path) -> None:
    for name in ("pretrain.json", "finetune.json"):
        rows = json.loads((folder / name).read_text())
        assert len(rows) == 40
        for row in rows:
            conversation = Conversation.from_llava(row, image_root=folder / "images")
            assert len(conversation.images) == 1
            assert conversation.images[0].source.exists()  # type: ignore[union-attr]
            assert not conversation.open
    notes = json.loads((folder / "captions.json").read_text())
    assert Counter(Counter(a["image_id"] for a in notes["annotations"]).values()) == {5: 40}


def test_coco_instances_lie_in_their_pictures(folder: Path) -> None:
    coco = json.loads((folder / "instances.json").read_text())
    images = {image["id"]: image for image in coco["images"]}
    assert [c["name"] for c in coco["categories"]] == list(SHAPES)
    for note in coco["annotations"]:
        x, y, w, h = note["bbox"]
        image = images[note["image_id"]]
        assert w > 0
        assert h > 0
        assert x >= 0
        assert y >= 0
        assert x + w <= image["width"]
        assert y + h <= image["height"]
        assert note["area"] == w * h


def test_export_repeats_itself(folder: Path, tmp_path: Path) -> None:
    again = export(tmp_path, 40, split="test", workers=2)
    for name in ("captions.json", "instances.json", "pretrain.json", "finetune.json", "benchmark.jsonl"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("what", ["small_print", "numbers"])
def test_an_export_holds_the_wanted_share_of_print_and_asks_for_it(tmp_path: Path, what: str, share: float) -> None:
    rows = json.loads((export(tmp_path, 20, turns=3, workers=1, **{what: share}) / "finetune.json").read_text())
    type_, asks = {"small_print": ("small", ["small print say"]), "numbers": ("large", ["What number is", "Which number do"])}[what]
    printed = [
        row
        for row in rows
        if any(sign.type == type_ and (what == "small_print" or sign.text.isdigit()) for sign in make_scene(int(row["id"])).signs)
    ]
    assert len(printed) == round(20 * share)
    assert all(any(ask in turn["value"] for turn in row["conversations"] for ask in asks) for row in printed)
    assert all(len(row["conversations"]) <= 2 * (3 + 1) for row in rows)  # three questions, and a description for most


def test_an_export_with_close_ups_asks_what_they_show(tmp_path: Path) -> None:
    folder = export(tmp_path, 20, close_ups=0.5, workers=1)
    rows = {int(row["id"]): row for row in json.loads((folder / "finetune.json").read_text())}
    described = {image["id"] for image in json.loads((folder / "captions.json").read_text())["images"]}
    assert len(described) == 10
    near = [row for seed, row in rows.items() if seed not in described]
    assert 8 <= len(near) <= 10
    for row in near:
        shown, _ = close_up(make_scene(int(row["id"])), 112, signs=1)
        with PIL.Image.open(folder / "images" / row["image"]) as picture:
            assert picture.size == (112, 112)
        assert [turn["value"] for turn in row["conversations"]] == ["<image>\nWhat does the small print say?", shown.signs[0].text]


def test_held_out_is_held_out() -> None:
    asked = held_out(10)
    assert Counter(row.kind for row in asked) == dict.fromkeys(KINDS, 10)
    assert all(make_scene(row.seed).split == "test" for row in asked)
    assert len({row.seed for row in asked}) == len(asked)


def test_scores_are_exact_match() -> None:
    asked = held_out(5)
    truth = {row.conversation().messages[0].text.strip(): row.answer for row in asked}

    def answer(conversations: list[Conversation]) -> list[str]:
        return [truth[c.messages[0].text.strip()].upper() + "." for c in conversations]

    by_one = [Asked(**{**vars(row), "question": f"{n} {row.question}"}) for n, row in enumerate(asked)]
    truth = {row.question: row.answer for row in by_one}
    perfect = score(by_one, ask(answer, by_one, batch=7))
    assert overall(perfect).share == 1.0
    wrong = score(by_one, ["never"] * len(by_one))
    assert overall(wrong).right == 0
    assert overall(wrong).total == 5 * (len(KINDS) - 1), "small print is reported, not counted"
    assert 0 < overall(wrong).half_width < 0.1
    printed = table(perfect, wrong, best_guess(by_one))
    assert "| all but small | 55 | 100.0 %" in printed


def test_captions_are_scored_by_the_things_they_name() -> None:
    seeds = list(range(30))
    assert caption_f1(seeds, [captions(make_scene(s))[0] for s in seeds]) == 1.0
    assert caption_f1(seeds, ["nothing at all"] * 30) == 0.0
    assert 0.0 < caption_f1(seeds, ["a red circle, a blue star and a green heart."] * 30) < 0.5


def test_the_shipped_pictures_are_held_out_scenes_and_their_answers_are_true() -> None:
    shipped = Path(llavakit.__file__).parent / "pictures"
    rows = json.loads((shipped / "questions.json").read_text())
    assert {row["image"] for row in rows} == {path.name for path in shipped.glob("*.png")}
    for row in rows:
        scene = make_scene(int(row["image"].removeprefix("scene-").removesuffix(".png")))
        assert scene.split == "test"
        asked = {(q.question, q.answer) for seed in range(8) for q in questions(scene, random.Random(seed))}
        assert (row["question"], row["answer"]) in asked
