"""What the runs are trained on: drawn scenes of the train split, and a file of LLaVA samples for every question that is tried.

FOLDER/images/          pictures as drawn             FOLDER/print/     pictures of which three in four have small print
FOLDER/images-56/       the same with less detail     FOLDER/NAME.json  a file for each of ``FILES``
FOLDER/pretrain.json    stage 1
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ablations.arms import MIXES
from llavakit.data.scienceqa import Problem, to_llava
from llavakit.datagen.drawn import conversations
from llavakit.datagen.kinds import Prompts
from llavakit.datagen.rows import sample
from llavakit.datagen.scenes_teacher import DESCRIBED, ScenesTeacher, describe, reason
from llavakit.eval.benchmark import SHORT
from llavakit.scenes.draw import draw
from llavakit.scenes.export import choose, image_name, pretrain_sample
from llavakit.scenes.questions import pick
from llavakit.scenes.statements import NUMBERS, article
from llavakit.scenes.world import Scene

Rows = list[dict[str, Any]]
SEED = 40_000_000  # neither the shipped tower nor the shipped models have seen scenes from here on
SCENES, PRINT = 3840, 800
COARSE = 56  # pixels
TURNS = 8
COUNTS = ("none", *NUMBERS[1:5])  # as many as five letters allow; no scene has more than five things
DETAIL = "Describe the image in detail."
SENTENCES = ("The answer is {}.", "I would say {}.", "That is {}, as far as I can see.")


def talk(scene: Scene, described: float) -> dict[str, Any]:
    """Questions of all types; ``described``: the share with a description of the whole."""
    teacher = ScenesTeacher(Prompts.load(), turns=TURNS, described=described)
    return _sample(scene, teacher.talk(scene))


def detail(scene: Scene) -> dict[str, Any]:
    return _sample(scene, ((DETAIL, describe(scene)),))


def reasoning(scene: Scene) -> dict[str, Any]:
    return _sample(scene, (reason(scene),))


def mixed(scenes: Sequence[Scene], shares: tuple[float, float, float]) -> Rows:
    """One sample a scene: a conversation, a detailed description or reasoning, in these shares."""
    kinds = random.Random(0).choices((lambda scene: talk(scene, 0.0), detail, reasoning), shares, k=len(scenes))
    return [make(scene) for make, scene in zip(kinds, scenes, strict=True)]


def formatted(scenes: Sequence[Scene], suffix: str) -> Rows:
    """Every second scene is asked for short answers, each question ending in ``suffix``; the others are answered in sentences."""
    rows = []
    for number, scene in enumerate(scenes):
        rng = random.Random(scene.seed + 8)
        pairs = [(question.question, question.answer) for question in pick(scene, rng, TURNS)]
        if number % 2:
            pairs = [(question, rng.choice(SENTENCES).format(answer)) for question, answer in pairs]
        else:
            pairs = [(question + suffix, answer) for question, answer in pairs]
        rows.append(_sample(scene, pairs))
    return rows


def problem(scene: Scene) -> Problem:
    """A question in ScienceQA's form whose answer can be counted through: what is there, what is left, how many."""
    rng = random.Random(scene.seed + 9)
    color = rng.choice(sorted({thing.color for thing in scene.things}))
    there = [article(thing.name) for thing in scene.things]
    left = [article(thing.name) for thing in scene.things if thing.color != color]
    solution = f"The picture shows {', '.join(there)}. Without {color} {', '.join(left) or 'nothing'}."
    question = f"How many things are there without {color}?"
    return Problem(id=f"{scene.seed:08d}", question=question, choices=COUNTS, answer=len(left), solution=solution, image="image.png")


def science(scenes: Sequence[Scene], code: str) -> Rows:
    return [to_llava(problem(scene), code) | {"image": image_name(scene)} for scene in scenes]


FILES: Mapping[str, Callable[[Sequence[Scene]], Rows]] = {
    "talk": lambda scenes: [talk(scene, DESCRIBED) for scene in scenes],
    **{name: partial(mixed, shares=shares) for name, shares in MIXES.items()},
    "format": lambda scenes: formatted(scenes, f"\n{SHORT}"),
    "no-format": lambda scenes: formatted(scenes, ""),
    "science-LEA": lambda scenes: science(scenes, "QCM-LEA"),
    "science-ALE": lambda scenes: science(scenes, "QCM-ALE"),
    "pretrain": lambda scenes: [pretrain_sample(scene) for scene in scenes],
}


def images_of(folder: Path, data: str, long_side: int | None) -> Path:
    """Where the pictures of a file lie."""
    return folder / ("print" if data == "print" else f"images-{long_side}" if long_side else "images")


def write(folder: Path, *, scenes: int = SCENES, small_print: int = PRINT) -> None:
    """All pictures and files; nothing where they are complete."""
    done = folder / "done"
    if done.exists():
        return
    usual = [scene for scene in choose(scenes, seed=SEED).whole if scene.things]
    printed = choose(small_print, seed=SEED + 5_000_000, small_print=0.75).whole
    for name, chosen, long_side in (("talk", usual, None), ("talk", usual, COARSE), ("print", printed, None)):
        place = images_of(folder, name, long_side)
        place.mkdir(parents=True, exist_ok=True)
        for scene in chosen:
            draw(scene, long_side=long_side).save(place / image_name(scene), quality=92, subsampling=0)
    for name, make in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps(make(usual)))
    (folder / "print.json").write_text(json.dumps(conversations(printed, turns=3, ask=("small",), described=0.15)))
    done.touch()


def _sample(scene: Scene, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return sample(f"{scene.seed:08d}", image_name(scene), turns, image_first=True)
