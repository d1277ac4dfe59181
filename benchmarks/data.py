"""What opening a training file costs: ``python benchmarks/data.py FOLDER [--records 665298]`` writes one of the real shape and measures.

The file has the sources, counts, turns and image folders of LLaVA-1.5's mixture, with made-up words and drawn pictures of 640 pixels.
Each part is measured in a process of its own: seconds, and memory beyond what the imports took. ``private`` counts a page of the file once
for all processes, as the machine does; ``resident`` counts it for every process that has touched it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llavakit.checkpoint.places import built_in
from llavakit.data.holdout import split
from llavakit.data.index import SMALL
from llavakit.data.loader import Loader
from llavakit.data.sources import read_llava
from llavakit.processor import Processor
from llavakit.scenes.draw import draw
from llavakit.scenes.world import make_scene

SOURCES = (  # samples, image folder and names in it, (least, most) questions, words of a question and of an answer
    (157_712, "coco/train2017", 118_287, (1, 4), 14, 60),
    (40_688, None, 0, (1, 8), 40, 160),
    (82_783, "coco/train2017", 118_287, (1, 9), 8, 1),
    (72_140, "gqa/images", 72_140, (8, 20), 9, 1),
    (8_998, "coco/train2017", 118_287, (1, 2), 9, 1),
    (80_000, "ocr_vqa/images", 80_000, (3, 6), 7, 4),
    (66_160, "coco/train2017", 118_287, (1, 3), 24, 1),
    (21_953, "textvqa/train_images", 21_953, (1, 1), 30, 12),
    (48_447, "coco/train2017", 118_287, (3, 9), 14, 6),
    (86_417, "vg/VG_100K", 64_346, (5, 10), 14, 6),
)
WORDS = ["".join(random.Random(i).choices("etaoinshrdlcum", k=2 + i % 8)) for i in range(2000)]
DRAWN = 16  # pictures that all names stand for: a file has so many links at most that fewer would not do


def records(count: int) -> Iterator[dict[str, Any]]:
    """``count`` records in the mixture's proportions, shuffled by a seed."""
    draw = random.Random(0)
    whole = sum(source[0] for source in SOURCES)
    kinds = [number for number, source in enumerate(SOURCES) for _ in range(-(-source[0] * count // whole))]
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds[:count]):
        _, folder, names, asked, question, answer = SOURCES[kind]
        turns = []
        for turn in range(draw.randint(*asked)):
            marker = "<image>\n" if folder and not turn else ""
            turns.append({"from": "human", "value": marker + words(draw, question)})
            turns.append({"from": "gpt", "value": words(draw, answer)})
        image = {"image": f"{folder}/{draw.randrange(names):012d}.jpg"} if folder else {}
        yield {"id": f"{number:012d}", **image, "conversations": turns}


def words(draw: random.Random, mean: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(max(1, mean // 2), mean + mean // 2)))


def write(path: Path, images: Path, count: int) -> None:
    """The file as one JSON list, and one of a few drawn pictures under every name."""
    seen: set[str] = set()
    with path.open("w") as file:
        for number, record in enumerate(records(count)):
            file.write(("[" if not number else ", ") + json.dumps(record))
            seen.add(record.get("image", ""))
        file.write("]")
    images.mkdir(parents=True, exist_ok=True)
    drawn = [images / f"{seed}.jpg" for seed in range(DRAWN)]
    for seed, picture in enumerate(drawn):
        draw(make_scene(seed), long_side=640).save(picture, quality=90)
    for number, name in enumerate(seen - {""}):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(drawn[number % DRAWN], images / name)


def build(path: Path, images: Path) -> int:
    return len(read_llava(path, image_root=images, check_images=False))


def opening(path: Path, images: Path) -> int:
    return len(read_llava(path, image_root=images))


def first_batch(path: Path, images: Path) -> int:
    """Opened, and 128 samples drawn from everywhere."""
    source = read_llava(path, image_root=images)
    return sum(len(source[i].conversation.turns) for i in random.Random(1).sample(range(len(source)), 128))


def loader(path: Path, images: Path, count: int, group: int, holdout: int, few: int | None = None) -> dict[str, Any]:
    """As stage 2 of LLaVA-1.5 begins: the first window of 16 x 8 samples from ``count`` workers, by the built-in model's processor.

    ``few``: of so many samples alone. What the workers take then is not the file's: what they touch of the interpreter, and views.
    """
    multiprocessing.set_start_method("fork", force=True)  # as in a run; here, in a process that was spawned, it would be spawning
    processor = Processor.load(built_in())
    before, start, worked = memory(), time.perf_counter(), time.process_time()
    samples, _ = split(read_llava(path, image_root=images)[:few], holdout, seed=0)
    made = Loader(
        samples, processor, batch_size=16, accumulation=8, seed=0, workers=count, group=group, pack=True, placement="first",
        lengths=samples.lengths(),
    )  # fmt: skip
    ready = time.perf_counter() - start
    windows = iter(made)
    window = next(windows)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    helpers = [process.pid for process in multiprocessing.active_children()]
    theirs = sum(map(processor_time, helpers))
    held = sum(memory(process)["proportional"] for process in ("self", *helpers)) - before["proportional"]
    told = {"samples": window.samples, "ready_s": round(ready, 2), "first_batch_s": round(seconds, 2), "cpu_s": round(worked, 2)}
    return told | {"workers_cpu_s": round(theirs, 2), "together_mb": held >> 20}


def read_all(path: Path, images: Path) -> int:
    """What a worker of an epoch reads, in any order, to the end."""
    source = read_llava(path, image_root=images)
    order = random.Random(2).sample(range(len(source)), len(source) // 4)
    return sum(len(source[i].conversation.turns) for i in order)


def as_lists(path: Path, images: Path) -> int:
    """What a plain loader does: ``json.load``, and an isfile for every picture."""
    data = json.loads(path.read_text())
    return sum("image" not in record or (images / record["image"]).is_file() for record in data)


def processor_time(process: int | None) -> float:
    """Seconds that another process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(process: int | str | None = "self") -> dict[str, int]:
    """Bytes of this or another process."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    size = {name: int(value.split()[0]) * 1024 for name, value in fields.items()}
    return {"resident": size["Rss"], "private": size["Private_Dirty"] + size["Private_Clean"], "proportional": size["Pss"]}


def _measured(act: Callable[..., Any], words: tuple[Any, ...], told: Any) -> None:
    before, start, worked = memory(), time.perf_counter(), time.process_time()
    held = act(*words)
    seconds, worked, after = time.perf_counter() - start, time.process_time() - worked, memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before["resident"]
    told.put(
        {"seconds": round(seconds, 2), "cpu_s": round(worked, 2), "peak_mb": peak >> 20, "result": held}
        | {f"{k}_mb": after[k] - before[k] >> 20 for k in after}
    )


def measured(act: Callable[..., Any], *words: Any) -> dict[str, Any]:
    """Run in a fresh process: a peak cannot be taken back."""
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    process = context.Process(target=_measured, args=(act, words, told))
    process.start()
    found: dict[str, Any] = told.get()
    process.join()
    return found


def _work(source: Any, share: range, told: Any) -> None:
    before = memory()
    for i in share:
        source[i * 7919 % len(source)]
    told.put({k: v - before[k] for k, v in memory().items()})


def workers(path: Path, images: Path, count: int) -> int:
    """So many processes that each read a part of an epoch from one source; the sum of what they took, in MB."""
    source = read_llava(path, image_root=images)
    context = multiprocessing.get_context("fork")
    told: Any = context.Queue()
    each = min(len(source), 100_000) // count
    processes = [context.Process(target=_work, args=(source, range(i * each, (i + 1) * each), told)) for i in range(count)]
    for process in processes:
        process.start()
    taken = [told.get()["private"] for _ in processes]
    for process in processes:
        process.join()
    return sum(taken) >> 20


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("--records", type=int, default=665_298)
    words.add_argument("--only", help="names of measurements, with commas")
    given = words.parse_args()
    path, images = given.folder / "mix.json", given.folder / "images"
    if not path.exists():
        given.folder.mkdir(parents=True, exist_ok=True)
        write(path, images, given.records)
    assert path.stat().st_size > SMALL, "too small to be indexed on disk"
    print(json.dumps({"file": f"{path.stat().st_size >> 20} MB", "records": given.records}), flush=True)
    acts: dict[str, tuple[Any, ...]] = {
        "build": (build,),
        "opening": (opening,),
        "first_batch": (first_batch,),
        "read_quarter": (read_all,),
    }
    acts |= {f"loader_{count}": (loader, count, 0, 0) for count in (0, 2, 4)} | {
        "loader_2_few": (loader, 2, 0, 0, 1000),
        "loader_2_grouped": (loader, 2, 64, 1000),
    }
    acts |= {f"workers_{count}": (workers, count) for count in (1, 4, 8)} | {"as_lists": (as_lists,)}
    for name, (act, *more) in acts.items():
        if not given.only or name in given.only.split(","):
            print(json.dumps({name: measured(act, path, images, *more)}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
