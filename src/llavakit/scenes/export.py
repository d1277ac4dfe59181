"""Folders of drawn scenes in the file formats of the field.

    FOLDER/images/00000017.jpg            one picture a scene, named by its seed
    FOLDER/captions.json                  COCO captions, five a picture
    FOLDER/instances.json                 COCO instances: boxes, categories = shapes, "color" and "size" beside them
    FOLDER/pretrain.json                  LLaVA JSON, stage 1: picture -> caption
    FOLDER/benchmark.jsonl                one question a line, with its type and answer (questions as LLaVA's evaluation reads them)

Everything is a function of (split, count, seed); pictures are written by a few processes. Stage 2's conversations, finetune.json, are a
teacher's work: ``datagen.drawn`` adds them.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavakit.scenes.close_up import close_up
from llavakit.scenes.draw import box, draw
from llavakit.scenes.questions import KINDS, questions
from llavakit.scenes.statements import captions
from llavakit.scenes.world import SHAPES, Scene, Split, make_scene, scenes
from llavakit.types import Conversation, Image, Message, Text, assistant

BRIEF = (
    "Describe the picture briefly.", "Give a short description of the picture.", "What does the picture show, in short?",
    "Summarize the picture in a sentence.", "Say in a few words what is drawn here.",
)  # fmt: skip
Progress = Callable[[int, int], None]
DESCRIPTION = "drawn scenes"  # what the COCO files say they are
CLOSE_UP = 112  # pixels: a view of the miniature
START = {"train": 0, "test": 50_000_000}  # seeds of the splits start far apart; the split itself is a matter of content


@dataclass(frozen=True)
class Chosen:
    """The scenes of an export: those shown whole, and those shown through a window around small print."""

    whole: tuple[Scene, ...]
    near: tuple[Scene, ...]


def choose(
    count: int,
    *,
    split: Split = "train",
    seed: int = 0,
    small_print: float | None = None,
    numbers: float | None = None,
    close_ups: float = 0.0,
) -> Chosen:
    """Scenes of a split. Shares (None: as they come): with small print, with a number in large print; ``close_ups``: shown near."""
    stream = _with_share(scenes(split, start=START[split] + seed), small_print, _has_small_print)
    chosen = list(itertools.islice(_with_share(stream, numbers, _has_number), count))
    near = [scene for number, scene in enumerate(chosen) if int((number + 1) * close_ups) > int(number * close_ups)]
    seen_near = {scene.seed for scene in near}
    return Chosen(tuple(scene for scene in chosen if scene.seed not in seen_near), tuple(near))


def write(folder: Path, chosen: Chosen, *, workers: int = 2, progress: Progress | None = None) -> None:
    """All files of the module's drawing; the benchmark last."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write_images(folder, [scene.seed for scene in chosen.whole], sorted(scene.seed for scene in chosen.near), workers, progress)
    _write_json(folder / "captions.json", coco_captions(chosen.whole))
    _write_json(folder / "instances.json", coco_instances(chosen.whole))
    _write_json(folder / "pretrain.json", [pretrain_sample(scene) for scene in chosen.whole])
    lines = (json.dumps(row) + "\n" for row in benchmark(chosen.whole))
    (folder / "benchmark.jsonl").write_text("".join(lines))


def _has_small_print(scene: Scene) -> bool:
    return any(sign.type == "small" for sign in scene.signs)


def _has_number(scene: Scene) -> bool:
    return any(sign.type == "large" and sign.text.isdigit() for sign in scene.signs)


def _with_share(stream: Iterable[Scene], share: float | None, wanted: Callable[[Scene], bool]) -> Iterator[Scene]:
    """Scenes of the stream, left out here and there so that after every one the share of those wanted is the one asked for."""
    taken = found = 0
    for scene in stream:
        has = wanted(scene)
        if share is None or has == (found < share * (taken + 1)):
            yield scene
            taken, found = taken + 1, found + has


def image_name(scene: Scene) -> str:
    return f"{scene.seed:08d}.jpg"


def pretrain_sample(scene: Scene) -> dict[str, Any]:
    """Stage 1 (spec 4.5): one brief instruction with the picture before or after it, answered by a caption."""
    rng = random.Random(scene.seed + 1)
    instruction = Text(rng.choice(BRIEF))
    picture = Image(Path(image_name(scene)))
    parts = (picture, Text("\n"), instruction) if rng.random() < 0.5 else (instruction, Text("\n"), picture)
    reply = rng.choice(captions(scene, rng)[:4])
    return _sample(scene, (Message("user", parts), assistant(reply)))


def _sample(scene: Scene, messages: Iterable[Message]) -> dict[str, Any]:
    return {"id": f"{scene.seed:08d}", **Conversation(tuple(messages)).to_llava(image_names=[image_name(scene)])}


def benchmark(chosen: Sequence[Scene]) -> list[dict[str, Any]]:
    """Every scene gives one question of each type that it allows; the keys are those of LLaVA's question files, plus the answer."""
    rows = []
    for scene in chosen:
        rng = random.Random(scene.seed + 3)
        pools: dict[str, list[tuple[str, str]]] = {}
        for q in questions(scene, rng):
            pools.setdefault(q.kind, []).append((q.question, q.answer))
        for kind, pool in pools.items():
            text, answer = rng.choice(pool)
            name = f"{scene.seed:08d}-{kind}"
            rows.append({"question_id": name, "image": image_name(scene), "category": kind, "text": text, "answer": answer})
    return rows


def even_benchmark(split: Split, per_kind: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """``per_kind`` questions of every type, each about another scene where possible."""
    wanted = dict.fromkeys(KINDS, per_kind)
    rows: list[dict[str, Any]] = []
    for scene in scenes(split, start=START[split] + seed):
        fresh = [row for row in benchmark([scene]) if wanted[row["category"]] > 0]
        if fresh:
            rarest = min(fresh, key=lambda row: per_kind - wanted[row["category"]])
            wanted[rarest["category"]] -= 1
            rows.append(rarest)
        if not any(wanted.values()):
            return rows
    raise AssertionError("scenes never end")


def coco_captions(chosen: Sequence[Scene]) -> dict[str, Any]:
    """COCO captions: five annotations a picture."""
    notes = [
        {"id": 5 * number + which, "image_id": scene.seed, "caption": caption}
        for number, scene in enumerate(chosen)
        for which, caption in enumerate(captions(scene))
    ]
    return {"info": {"description": DESCRIPTION}, "images": _coco_images(chosen), "annotations": notes}


def coco_instances(chosen: Sequence[Scene]) -> dict[str, Any]:
    """COCO instances: boxes as [x, y, width, height] in pixels."""
    categories = [{"id": number + 1, "name": shape, "supercategory": "shape"} for number, shape in enumerate(SHAPES)]
    notes: list[dict[str, Any]] = []
    for scene in chosen:
        for thing in scene.things:
            x0, y0, x1, y1 = box(thing, scene)
            extent = [x0, y0, x1 - x0, y1 - y0]
            note = {"id": len(notes) + 1, "image_id": scene.seed, "category_id": SHAPES.index(thing.shape) + 1, "bbox": extent}
            notes.append(note | {"area": extent[2] * extent[3], "iscrowd": 0, "color": thing.color, "size": thing.size})
    return {"info": {"description": DESCRIPTION}, "images": _coco_images(chosen), "annotations": notes, "categories": categories}


def _coco_images(chosen: Sequence[Scene]) -> list[dict[str, Any]]:
    return [{"id": s.seed, "file_name": image_name(s), "width": s.width, "height": s.height} for s in chosen]


def _write_images(folder: Path, seeds: Sequence[int], near: Sequence[int], workers: int, progress: Progress | None) -> None:
    jobs = [(folder / "images", part[at : at + 200], part is near) for part in (seeds, near) for at in range(0, len(part), 200)]
    total = len(seeds) + len(near)
    done = 0
    if workers > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(workers) as pool:
            for written in pool.map(_draw_files, jobs):
                done += written
                if progress:
                    progress(done, total)
        return
    for job in jobs:
        done += _draw_files(job)
        if progress:
            progress(done, total)


def _draw_files(job: tuple[Path, Sequence[int], bool]) -> int:
    folder, seeds, near = job
    for seed in seeds:
        scene = make_scene(seed)
        picture = close_up(scene, CLOSE_UP, signs=1)[1] if near else draw(scene)
        picture.save(folder / image_name(scene), quality=92, subsampling=0)
    return len(seeds)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
