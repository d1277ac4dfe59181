"""Folders of drawn scenes in the file formats of the field.

    FOLDER/images/00000017.jpg            one picture a scene, named by its seed
    FOLDER/captions.json                  COCO captions, five a picture
    FOLDER/instances.json                 COCO instances: boxes, categories = shapes, "color" and "size" beside them
    FOLDER/pretrain.json                  LLaVA JSON, stage 1: picture -> caption
    FOLDER/finetune.json                  LLaVA JSON, stage 2: conversations of several questions about a picture
    FOLDER/benchmark.jsonl                one question a line, with its type and answer (questions as LLaVA's evaluation reads them)

Everything is a function of (split, count, seed); pictures are written by a few processes.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from llavakit.scenes.draw import box, draw
from llavakit.scenes.questions import KINDS, pick, questions
from llavakit.scenes.statements import captions
from llavakit.scenes.world import SHAPES, Scene, Split, make_scene, scenes
from llavakit.types import Conversation, Image, Message, Text, assistant

BRIEF = (
    "Describe the picture briefly.", "Give a short description of the picture.", "What does the picture show, in short?",
    "Summarize the picture in a sentence.", "Say in a few words what is drawn here.",
)  # fmt: skip
DETAILED = (
    "What is this?", "Describe the picture.", "What do you see?", "Describe the image in detail.", "What is in this picture?",
)  # fmt: skip
DESCRIBED = 0.8  # share of conversations with a description: it names everything, so it teaches most
DESCRIBED_FIRST = 0.25  # share of these that begin with it; questions asked after it could be answered from its words, without sight
Progress = Callable[[int, int], None]
START = {"train": 0, "test": 50_000_000}  # seeds of the splits start far apart; the split itself is a matter of content


def export(
    folder: Path,
    count: int,
    *,
    split: Split = "train",
    seed: int = 0,
    workers: int = 2,
    turns: int = 8,
    small_print: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write ``count`` scenes of a split with all files of the module's drawing; returns ``folder``.

    ``turns`` is the number of questions in a conversation. ``small_print`` is the share of scenes with small print, which are then always
    asked what it says; None takes scenes as they come (about one in five has some, asked like all else).
    """
    chosen = list(itertools.islice(_with_share(scenes(split, start=START[split] + seed), small_print), count))
    ask = () if small_print is None else ("small",)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    _write_images(folder, [scene.seed for scene in chosen], workers, progress)
    _write_json(folder / "captions.json", coco_captions(chosen))
    _write_json(folder / "instances.json", coco_instances(chosen))
    _write_json(folder / "pretrain.json", [pretrain_sample(scene) for scene in chosen])
    _write_json(folder / "finetune.json", [finetune_sample(scene, turns=turns, ask=ask) for scene in chosen])
    lines = (json.dumps(row) + "\n" for row in benchmark(chosen))
    (folder / "benchmark.jsonl").write_text("".join(lines))
    return folder


def _with_share(stream: Iterable[Scene], share: float | None) -> Iterator[Scene]:
    """Scenes of the stream, left out here and there so that after every one the share of scenes with small print is the wanted one."""
    taken = printed = 0
    for scene in stream:
        has = any(sign.type == "small" for sign in scene.signs)
        if share is None or has == (printed < share * (taken + 1)):
            yield scene
            taken, printed = taken + 1, printed + has


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


def finetune_sample(scene: Scene, *, turns: int = 8, ask: Collection[str] = ()) -> dict[str, Any]:
    """Stage 2: several questions about one picture, mostly with a description before or after them. Types in ``ask`` are never left out."""
    rng = random.Random(scene.seed + 2)
    pairs = [(q.question, q.answer) for q in pick(scene, rng, turns, ask=ask)]
    if rng.random() < DESCRIBED:
        pairs.insert(0 if rng.random() < DESCRIBED_FIRST else len(pairs), (rng.choice(DETAILED), captions(scene, rng)[3]))
    messages: list[Message] = []
    for number, (question, answer) in enumerate(pairs):
        parts = (Image(Path(image_name(scene))), Text("\n" + question)) if number == 0 else (Text(question),)
        messages += [Message("user", parts), assistant(answer)]
    return _sample(scene, tuple(messages))


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
    return {"info": {"description": "drawn scenes"}, "images": _coco_images(chosen), "annotations": notes}


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
    return {"info": {"description": "drawn scenes"}, "images": _coco_images(chosen), "annotations": notes, "categories": categories}


def _coco_images(chosen: Sequence[Scene]) -> list[dict[str, Any]]:
    return [{"id": s.seed, "file_name": image_name(s), "width": s.width, "height": s.height} for s in chosen]


def _write_images(folder: Path, seeds: Sequence[int], workers: int, progress: Progress | None) -> None:
    jobs = [(folder / "images", seeds[at : at + 200]) for at in range(0, len(seeds), 200)]
    done = 0
    if workers > 1 and len(jobs) > 1:
        with ProcessPoolExecutor(workers) as pool:
            for written in pool.map(_draw_files, jobs):
                done += written
                if progress:
                    progress(done, len(seeds))
        return
    for job in jobs:
        done += _draw_files(job)
        if progress:
            progress(done, len(seeds))


def _draw_files(job: tuple[Path, Sequence[int]]) -> int:
    folder, seeds = job
    for seed in seeds:
        scene = make_scene(seed)
        draw(scene).save(folder / image_name(scene), quality=92, subsampling=0)
    return len(seeds)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))
