"""Does a 7B model load and answer on a machine of 24 GiB? ``python benchmarks/big.py FOLDER [--layers 32] [--keep]``

Writes a LLaVA-1.5-7B of random weights in bf16 (14.1 GB, shard by shard, never in memory as a whole) to FOLDER, then loads it in a fresh
process as it is, in 8 and in 4 bits, asks one question, and prints the peak of resident memory above that of the libraries, against the
size on disk. A process that leaves the machine less than 1.2 GiB of free memory is stopped, for the sake of its neighbours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from fixture import PAD, ROWS, new_processor, photograph
from fixture import Shape as Toy
from loading import Watch, _resident

from llavakit.assistant import Assistant
from llavakit.checkpoint import files, store, weights
from llavakit.model.presets import clip, llama
from llavakit.types import Conversation, Image, Sampling

LEAST_FREE = 1.2 * 2**30


def write(folder: Path, layers: int) -> None:
    """The checkpoint: config and processor through ``store``'s own pieces, each shard drawn and written by itself."""
    from safetensors.torch import save_file

    toy = Toy(name="7B", view=336, tower_width=1024, tower_layers=24, width=4096, layers=layers)
    text = llama(width=4096, layers=layers, heads=32, feed_forward=11008, rows=ROWS, positions=4096, pad=PAD)
    config = replace(toy.config, vision=clip(size=336, width=1024, layers=24, heads=16), text=text)
    folder.mkdir(parents=True)
    new_processor(toy).save(folder)
    (folder / files.CONFIG).write_text(json.dumps(config.to_hf() | {"dtype": "bfloat16"}))
    shapes = {name: value.shape for name, value in weights.build(config).state_dict().items()}
    placed: dict[str, str] = {}
    groups: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        groups.setdefault(".".join(name.split(".")[:4]) if ".layers." in name and name.startswith("language") else "rest", {})[name] = shape
    for number, group in enumerate(groups.values()):
        file = f"model-{number:05d}.safetensors"
        save_file({name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in group.items()}, folder / file)
        placed |= dict.fromkeys(group, file)
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def measure(folder: str, quantization: str) -> None:
    """In a fresh process: one JSON line."""
    threading.Thread(target=_guard, daemon=True).start()
    before, watch = _resident(), Watch()
    start = time.perf_counter()
    model, processor = store.load(Path(folder), quantization=None if quantization == "bf16" else quantization)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    for value in model.state_dict().values():
        value.detach().view(-1)[::1024].float().sum()  # touches every page
    peak, _ = watch.stop()
    held = sum(value.nbytes for value in model.state_dict().values())
    assistant = Assistant(model, processor)
    assistant.stop_ids = frozenset()
    start = time.perf_counter()
    reply = "".join(assistant.reply(Conversation.ask("w1 w2 w3", Image(photograph(0))), Sampling(max_new_tokens=4)))
    answered = time.perf_counter() - start
    print(json.dumps({"load_s": seconds, "peak": peak - before[0], "weights": held, "answer_s": answered, "words": len(reply.split())}))


def _guard() -> None:
    while True:
        free = next(int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvail"))
        if free < LEAST_FREE:
            print(json.dumps({"stopped": f"{free / 2**30:.2f} GiB of memory left"}), flush=True)
            os._exit(3)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint there")
    parser.add_argument("--only", nargs="+", default=["bf16", "8bit", "4bit"])
    given = parser.parse_args()
    if not given.folder.exists():
        write(given.folder, given.layers)
    disk = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
    for kind in given.only:
        script = "import sys; sys.path.insert(0, sys.argv[1]); import big; big.measure(*sys.argv[2:])"
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent), str(given.folder), kind], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(f"{kind}: {done.stdout}{done.stderr[-2000:]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{kind}: {disk / 1e9:.2f} GB on disk, {found['weights'] / 1e9:.2f} GB of weights, peak {found['peak'] / 1e9:.2f} GB"
            f" = {found['peak'] / disk:.3f} x disk = {found['peak'] / found['weights']:.3f} x weights;"
            f" loaded in {found['load_s']:.0f} s, answered 4 tokens in {found['answer_s']:.0f} s ({found['words']} words)",
            flush=True,
        )
    if not given.keep:
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
