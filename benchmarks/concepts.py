"""What the concept filter costs: ``python benchmarks/concepts.py FOLDER [--captions 1000000] [--workers 2]`` makes captions, filters them.

The captions come from a small grammar and are as uneven as real ones: a few things are everywhere, most are rare. The command runs as a
user runs it, in processes of its own; every fifth of a second the memory of all of them is added up (each page once, where the system
says so).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

SYLLABLES = ("ba", "co", "di", "fu", "ga", "lo", "me", "no", "pi", "ra", "so", "tu", "ver", "wick", "stone", "field", "ton", "mer")
COMMON = ("person", "man", "woman", "dog", "city", "beach", "house", "car", "tree", "football player", "actor", "background", "sky", "sea")
LOOKS = ("red", "old", "small", "wooden", "beautiful", "young", "modern", "green", "sunny", "colorful", "historic", "happy", "large", "")
DOINGS = ("sits on", "walking past", "stands near", "looks at", "holding", "with", "in front of", "behind", "painted on", "attends")
PLACES = ("in the {}", "on a {}", "near the {} and a {}", "during the {}", "at the {} of the {}", "", "", "with his {}")


def nouns(count: int) -> list[str]:
    """``count`` names that are no English words, so that every one of them is a noun to any chunker."""
    draw = random.Random(1)
    names = list(COMMON)
    while len(names) < count:
        names.append("".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))))
    return names


def caption(draw: random.Random, names: list[str]) -> str:
    """Ten words or so, a few phrases; the weight of a name falls as its rank, as in real text."""

    def thing() -> str:
        name = names[min(int(len(names) ** draw.random()), len(names)) - 1]
        return f"{draw.choice(LOOKS)} {name}".strip() if draw.random() < 0.5 else name

    place = draw.choice(PLACES)
    parts = (draw.choice(("a", "the", "")), thing(), draw.choice(DOINGS), draw.choice(("a", "the", "two")), thing())
    return " ".join((" ".join(parts) + " " + place.format(thing(), thing())).split()) + draw.choice(("", ".", " ."))


def write(path: Path, count: int) -> None:
    draw, names = random.Random(0), nouns(200_000)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(f"{caption(draw, names)}\thttp://example.invalid/{number}.jpg\n")


def memory(process: int) -> int:
    """Bytes of a process and its children; 0 for one that has just ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:
        return 0
    held = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return held + sum(memory(int(child)) for child in children)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("folder", type=Path)
    words.add_argument("--captions", type=int, default=1_000_000)
    words.add_argument("--workers", type=int, default=2)
    words.add_argument("--engine", default="builtin")
    given = words.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / f"captions-{given.captions}.tsv"
    if not path.exists():
        write(path, given.captions)
    command = [sys.executable, "-m", "llavakit", "concepts", str(path), "--out", str(given.folder / "out.json"), "--json"]
    command += ["--workers", str(given.workers), "--engine", given.engine, "--plot", str(given.folder / "phrases.png")]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.2)
    seconds = time.perf_counter() - start
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    told.pop("top")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = max(peak, used.ru_maxrss * 1024)  # a peak of the main process may fall between two looks
    cpu = used.ru_utime + used.ru_stime  # the same on a busy machine
    print(json.dumps({"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mb": peak >> 20, "workers": given.workers} | told))


if __name__ == "__main__":
    main()
