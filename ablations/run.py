"""Run arms and keep what they answered: one file for each arm and seed. Finished ones are skipped, stopped ones go on.

    python -m ablations.run [--work build/ablations] [--results ablations/results] [--arms NAME ...] [--seeds 0 1 2] [--processes 1]

    WORK/data, starts           made once, before anything is trained
    WORK/parts-seed0            base, linear, ...       one process: features, first stages, checkpoints
    WORK/mix-seed0              mix-all, ...            another; nobody writes where another does

A result holds the points of every question, so that arms are compared question by question.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ablations import data
from ablations.arms import ARMS, BATCH, SEEDS, Arm, seeds_of
from ablations.measure import SETS, ask, fingerprint
from ablations.starts import make_parts, start_of
from llavakit.assistant import Assistant
from llavakit.config import FINETUNE, PRETRAIN, TrainConfig, parse
from llavakit.preprocess import Floats, Preprocess
from llavakit.prompts import TEMPLATES
from llavakit.train.loop import train

STAGE_1 = ("batch_size=32", "accumulation=1", "lr=8e-3", "aspect=pad")
STAGE_2 = (f"batch_size={BATCH}", "accumulation=1", "group=16", "optimizer=muon", "lr=3e-3", "betas=[0.9,0.98]")
QUIET = ("preflight=false", "panel=0", "keep=0", "log_every=40")


def result_of(arm: Arm, seed: int, results: Path) -> Path:
    return results / f"{arm.name}-seed{seed}.json"


def perform(arm: Arm, seed: int, work: Path) -> dict[str, Any]:
    """Train and ask; everything that the table needs."""
    began = time.perf_counter()
    checkpoints = trained(arm, seed, work)
    trained_in = time.perf_counter() - began
    asked: dict[str, dict[str, list[float]]] = {name: {} for name in arm.asks}
    with sees(arm):
        for step, checkpoint in checkpoints.items():
            model = Assistant.load(checkpoint, template=TEMPLATES[FINETUNE.template])  # stage 1 leaves another
            for name in arm.asks:
                asked[name][str(step)] = [round(value, 3) for value in ask(model, SETS[name](), long_side=arm.long_side)]
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": asdict(arm),
        "seconds": {"train": round(trained_in, 1), "ask": round(time.perf_counter() - began - trained_in, 1)},
        "questions": {name: fingerprint(SETS[name]()) for name in arm.asks},
        "points": asked,
    }


def trained(arm: Arm, seed: int, work: Path) -> dict[int, Path]:
    """The checkpoints to ask, by step of stage 2."""
    own = work / f"{arm.series}-seed{seed}"
    start = start_of(arm, seed, work / "starts", own)
    images = data.images_of(work / "data", arm.data, arm.long_side)
    features = own / "features"
    shared = [f"images={images}", f"seed={seed}", *QUIET]
    if arm.align:
        name = f"align{arm.align}-{arm.projector}{arm.layer}-{arm.decoder}-{images.name}"  # arms that agree so far share it
        words = [f"start={start}", f"data={work}/data/pretrain.json", f"steps={arm.align}", f"cache_features={features}"]
        start = whole(parse(PRETRAIN, [*words, *shared, *STAGE_1, f"out={own}/{name}"]))
    if not arm.tune:
        return {0: start}
    every = arm.every or arm.tune
    words = [
        f"start={start}",
        f"data={work}/data/{arm.data}.json",
        f"steps={arm.tune}",
        f"save_every={every}",
        f"cache_features={features if arm.base_view else f'{features}-without-base'}",
    ]
    out = own / arm.name
    with sees(arm):
        whole(parse(FINETUNE, [*words, *shared, *STAGE_2, *arm.words, f"out={out}"]))
    return {step: out / f"step-{step}" for step in range(every, arm.tune + 1, every)}


def whole(config: TrainConfig) -> Path:
    """The last checkpoint of a run. A signal ends the series too: what was half trained is not asked, and goes on next time."""
    outcome = train(config)
    if outcome.signal is not None:
        raise SystemExit(outcome.exit_code)
    return outcome.checkpoint


@contextmanager
def sees(arm: Arm) -> Iterator[None]:
    """Inside, pictures in tiles are shown without the view of the whole where an arm says so: that view is the mean colour."""
    whole = Preprocess.views

    def tiles_only(self: Preprocess, *given: Any, **named: Any) -> Floats:
        views = whole(self, *given, **named)
        if len(views) > 1:
            views[0] = 0.0
        return views

    if not arm.base_view:
        Preprocess.views = tiles_only  # type: ignore[method-assign]
    try:
        yield
    finally:
        Preprocess.views = whole  # type: ignore[method-assign]


def run(arms: Sequence[Arm], seeds: Sequence[int], *, work: Path, results: Path, processes: int = 1) -> None:
    """All that has no result yet, seed by seed, so that a stopped series has whole pairs."""
    results.mkdir(parents=True, exist_ok=True)
    data.write(work / "data")
    for arm in arms:
        make_parts(arm, work / "starts")
    series: dict[tuple[int, str], list[Arm]] = {}
    for seed in seeds:
        for arm in arms:
            if seed in seeds_of(arm, seeds):
                series.setdefault((seed, arm.series), []).append(arm)
    todo = [partial(run_series, its, seed, work=work, results=results) for (seed, _), its in series.items()]
    if processes == 1:
        for one in todo:
            one()
        return
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        for ended in as_completed([pool.submit(one) for one in todo]):
            ended.result()


def run_series(arms: Sequence[Arm], seed: int, *, work: Path, results: Path) -> None:
    """One after the other."""
    for arm in arms:
        path = result_of(arm, seed, results)
        if path.exists():
            continue
        found = perform(arm, seed, work)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(found) + "\n")
        draft.rename(path)
        means = {name: round(100 * sum(row) / len(row), 1) for name, steps in found["points"].items() for row in list(steps.values())[-1:]}
        print(f"{time.strftime('%H:%M:%S')} {path.stem}: {means} {found['seconds']}", flush=True)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--work", type=Path, default=Path("build/ablations"))
    words.add_argument("--results", type=Path, default=Path("ablations/results"))
    words.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="NAME")
    words.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    words.add_argument("--processes", type=int, default=1, help="series at once; the machine's threads are divided among them")
    given = words.parse_args()
    arms = [ARMS[name] for name in given.arms]
    run(arms, given.seeds, work=given.work.absolute(), results=given.results.absolute(), processes=given.processes)


if __name__ == "__main__":
    main()
