"""Does ``llava plan --gpu here`` come true? ``python benchmarks/plan.py [--rounds N] [--quick] [--cpu]``

    measured before   steps of a model of 2 layers on made-up samples, all of the mean length: train/pace.py
    predicted         8 layers on real samples of many lengths, by train/plan.py's formulas
    compared with     ``loop.train`` of a whole epoch on real files: pictures opened, prompts made, gradients clipped, metrics written

Seconds are those of all steps, the first included; memory is the most that torch's tensors held at a time in two steps of the same run,
model and optimizer included. The target is a ratio of predicted to measured between 0.85 and 1.15. The machine's load is printed:
a busy one gives other speeds from minute to minute, and then nothing can come true.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fixture import Shape, new_processor, photograph, write_checkpoint
from measure import Peak

from llavakit.config import FINETUNE, LORA, PRETRAIN, Lora, TrainConfig
from llavakit.data.sources import read_llava
from llavakit.prompts import TEMPLATES
from llavakit.train import pace, preflight
from llavakit.train.described import Samples, planned
from llavakit.train.loop import train
from llavakit.train.plan import GIB, hours, memory

MEDIUM = Shape(name="medium", view=112, tower_width=256, tower_layers=6, width=512, layers=8)
SMALL = Shape(name="small", view=56, tower_width=128, tower_layers=4, width=128, layers=4)
LOW, HIGH = 0.85, 1.15
RECIPES = {"pretrain": PRETRAIN, "finetune": FINETUNE, "lora": replace(LORA, lora=Lora(r=16, alpha=32))}


@dataclass(frozen=True)
class Case:
    """A run: samples of so many words, give or take a third, in steps of batch_size x accumulation."""

    recipe: str
    words: int
    batch_size: int
    accumulation: int
    steps: int


CASES = (
    Case("pretrain", 30, 8, 2, 12),
    Case("finetune", 60, 2, 4, 12),
    Case("finetune", 500, 1, 2, 12),
    Case("lora", 250, 2, 2, 12),
)


def write_data(folder: Path, case: Case) -> Path:
    """Conversations of random words of the made-up tokenizer, one token each; half of them learned."""
    draw = random.Random(case.words)
    records = []
    for number in range(case.batch_size * case.accumulation * case.steps):
        (folder / f"{number % 4}.jpg").write_bytes(photograph(number % 4, (320, 240)))
        count = int(case.words * draw.uniform(2 / 3, 4 / 3))
        question, reply = (" ".join(f"w{draw.randrange(20000)}" for _ in range(half)) for half in (count // 2, count - count // 2))
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": reply}]
        records.append({"id": f"s{number}", "image": f"{number % 4}.jpg", "conversations": turns})
    path = folder / f"{case.recipe}-{case.words}.json"
    path.write_text(json.dumps(records))
    return path


def config_of(case: Case, folder: Path, out: Path) -> TrainConfig:
    return replace(
        RECIPES[case.recipe], start=folder / "checkpoint", data=write_data(folder, case), images=folder, out=out, epochs=1, lr=1e-5,
        batch_size=case.batch_size, accumulation=case.accumulation, device="cpu", save_every=10**6, frozen_dtype="bf16", log_every=10**6,
    )  # fmt: skip


def means(config: TrainConfig, shape: Shape) -> Samples:
    """Counted before the run, as any user can (llava data stats): tokens do not depend on speed."""
    assert config.data is not None
    source = read_llava(config.data)
    seen = preflight.lengths(source, new_processor(shape).using(TEMPLATES[config.template]), config)
    return Samples(
        samples=len(source), views=seen.views, image_tokens=seen.image_tokens, text_tokens=seen.tokens - seen.image_tokens,
        learned_tokens=seen.learned, padding=seen.padding,
    )  # fmt: skip


def compare(case: Case, shape: Shape, folder: Path, round_: int) -> tuple[float, float]:
    """Predict it as ``llava plan`` does, run it; ratios of seconds and of memory."""
    config = config_of(case, folder, folder / f"out-{case.recipe}-{case.words}-{round_}")
    run = planned(config, shape.config, means(config, shape))
    rates = pace.measure(run, config)
    told = 3600 * hours(run, rate=rates.rate, update=rates.update)
    spent: list[float] = []
    train(config, on_step=lambda report: spent.append(report.step_time))
    found = sum(spent)
    where = pace.here(config, rates)
    held = memory(run, rows=case.batch_size, bf16=where.bf16, mask=where.mask).total
    with Peak() as peak:
        train(replace(config, out=config.out.with_name(config.out.name + "-memory"), steps=2))
    print(
        f"{case.recipe:10}{run.tokens:6.0f} tokens {case.batch_size} x {case.accumulation}, {len(spent)} steps   "
        f"seconds {told:6.2f} predicted {found:6.2f} measured, ratio {told / found:.2f}   "
        f"GiB {held / GIB:.2f} predicted {peak.most / GIB:.2f} measured, ratio {held / peak.most:.2f}   "
        f"(calibration's quartiles {rates.spread:.0%} apart, load {os.getloadavg()[0]:.1f})", flush=True,
    )  # fmt: skip
    return told / found, held / peak.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small shape, to see that it runs")
    parser.add_argument("--cpu", action="store_true", help="the processor's seconds, not the clock's: for a busy machine, with one thread")
    options = parser.parse_args()
    if options.cpu:
        time.perf_counter = time.process_time
    shape, began, ratios = SMALL if options.quick else MEDIUM, time.perf_counter(), list[tuple[float, float]]()
    print(f"{shape.name}: {shape.weights:,} weights, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "checkpoint", shape, torch.bfloat16)
        for round_ in range(options.rounds):
            ratios += [compare(case, shape, folder, round_) for case in CASES]
    for what, values in zip(("seconds", "memory"), zip(*ratios, strict=True), strict=True):
        verdict = "met" if all(LOW <= value <= HIGH for value in values) else "MISSED"
        found = f"{statistics.median(values):.2f} in the median, {min(values):.2f} to {max(values):.2f}"
        print(f"{what}: ratio {found}; {LOW} to {HIGH} {verdict}")
    print(f"{time.perf_counter() - began:.0f} s in all, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
