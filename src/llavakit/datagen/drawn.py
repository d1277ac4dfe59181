"""Folders of drawn scenes, whole: the pictures and files of ``scenes.export``, and stage 2's conversations by way of the teacher.

    scene -> context -> query -> ScenesTeacher -> text -> parse -> row -> finetune.json

Nothing is told to the row behind the teacher's back: its words go through the parser that reads every teacher.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavakit.datagen.context import Context
from llavakit.datagen.kinds import Prompts
from llavakit.datagen.parse import Reject, read
from llavakit.datagen.plan import Task
from llavakit.datagen.rows import sample
from llavakit.datagen.scenes_teacher import DESCRIBED, Drawn, ScenesTeacher
from llavakit.scenes.close_up import close_up
from llavakit.scenes.export import CLOSE_UP, Progress, choose, image_name, write
from llavakit.scenes.questions import KINDS
from llavakit.scenes.world import Scene, Split
from llavakit.types import Image, Sampling


def export(
    folder: Path,
    count: int,
    *,
    split: Split = "train",
    seed: int = 0,
    workers: int = 2,
    turns: int = 8,
    small_print: float | None = None,
    numbers: float | None = None,
    described: float = DESCRIBED,
    close_ups: float = 0.0,
    progress: Progress | None = None,
) -> Path:
    """Write ``count`` scenes of a split with the files of ``scenes.export`` and finetune.json; returns ``folder``.

    ``turns`` is the number of questions in a conversation. ``small_print`` is the share of scenes with small print, which are then always
    asked what it says; None takes scenes as they come (about one in five has some, asked like all else). ``numbers`` is the same for a
    number in large print. ``described`` is the share of
    conversations with a description of the whole. ``close_ups`` is the share of scenes shown only through a window of CLOSE_UP pixels
    around one small sign, with one question, what it says; they are in finetune.json alone.
    """
    chosen = choose(count, split=split, seed=seed, small_print=small_print, numbers=numbers, close_ups=close_ups)
    ask = [kind for kind, share in (("small", small_print), ("number", numbers)) if share is not None]
    rows = [*conversations(chosen.whole, turns=turns, ask=ask, described=described), *print_close_up(chosen.near)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "finetune.json").write_text(json.dumps(sorted(rows, key=lambda row: str(row["id"]))))
    write(folder, chosen, workers=workers, progress=progress)
    return folder


def conversations(
    scenes: Sequence[Scene], *, turns: int = 8, ask: Sequence[str] = (), described: float = DESCRIBED
) -> list[dict[str, Any]]:
    """One conversation about every scene."""
    return list(_asked([Drawn.of(scene) for scene in scenes], turns=turns, ask=ask, described=described))


def print_close_up(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """One question about the print in a close-up; nothing where there was no room for any."""
    return list(_asked([drawn for scene in scenes if (drawn := _near(scene))], turns=1, ask=("small",), described=0.0))


def _asked(drawn: Sequence[Drawn], *, turns: int, ask: Sequence[str], described: float) -> Iterator[dict[str, Any]]:
    prompts = Prompts.load()
    teacher = ScenesTeacher(prompts, {one.context.image: one for one in drawn}.__getitem__, turns=turns, ask=ask, described=described)
    for one in drawn:
        context = one.context
        task = Task(context.id, "conversation", context, "", image_first=True, seed=one.scene.seed)
        query = task.query(prompts, Sampling(), Image(Path(context.image)))
        said = read(task.kind, "".join(teacher.reply(query.conversation, query.sampling)))
        assert not isinstance(said, Reject), said
        yield sample(task.id, context.image, said, image_first=task.image_first)


def _near(scene: Scene) -> Drawn | None:
    """A close-up as a scene of its own, whose print is small print; None without any."""
    shown = close_up(scene, CLOSE_UP, signs=1)[0]
    printed = replace(shown, signs=tuple(replace(sign, type="small") for sign in shown.signs))
    if not list(KINDS["small"](printed, random.Random(0))):
        return None
    return Drawn(printed, Context(f"{scene.seed:08d}", image_name(scene), ("A close-up of small print.",)))
