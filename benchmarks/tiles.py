"""What higher resolution is worth, in miniature, three seeds each: the claim of LLaVA-1.5-HD and NeXT (AnyRes), on small print.

    pad               trained and asked with one padded view
    hd                a padded base and up to six tiles
    anyres, n tiles   one model of up to four tiles (the grid of NeXT's announcement), shown at most n of them when it is asked

    python benchmarks/tiles.py --start CHECKPOINT --tower TOWER --data FOLDER [--seeds 0 1 2] [--steps 100] [--per-kind 40]

Every run starts from the same model that has seen padded views only, and the same tower that has met print at tile scale; same samples,
same order, same steps, tower unfrozen at a lower rate (NeXT's stage 2). ``--data`` is made by ``llava scenes export --small-print 0.75
--turns 3``. Finished runs are skipped, stopped ones resume; the table is printed as Markdown after each seed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from stages import line

from llavakit.assistant import Assistant
from llavakit.config import FINETUNE, parse
from llavakit.eval.scenes import SMALL_PRINT, ask, held_out, overall, score
from llavakit.tiling import tiles_of
from llavakit.train.loop import train
from llavakit.types import Sampling

RUNS: Mapping[str, tuple[str, ...]] = {
    "pad": ("aspect=pad",),
    "anyres": ("aspect=anyres", "tiles=blog"),
    "hd": ("aspect=anyres", "base=pad", "tiles=hd"),
}
ROWS: Mapping[str, tuple[str, int]] = {  # the run, and at most so many tiles
    "pad": ("pad", 0),
    "hd": ("hd", 6),
    **{f"anyres, {tiles} tile{'s' if tiles > 1 else ''}": ("anyres", tiles) for tiles in (1, 2, 3, 4)},
}
ONE = (1, 1)  # base and one tile: for a limit of 1, which no announced canvas has


def tuned(given: argparse.Namespace, name: str, seed: int) -> Path:
    """One run and seed, to its last checkpoint."""
    out = given.out / f"{name}-seed{seed}"
    words = [
        f"start={given.start}",
        f"tower={given.tower}",
        f"data={given.data}/finetune.json",
        f"images={given.data}/images",
        f"out={out}",
    ]
    words += ["batch_size=16", "accumulation=1", f"steps={given.steps}", f"seed={seed}", "group=16", "workers=1", "save_every=25", "keep=1"]
    words += ["optimizer=muon", "lr=2e-3", "betas=[0.9,0.98]", r'rates=[["vision_tower\\..*",0.2]]']
    return train(parse(FINETUNE, [*words, *RUNS[name]])).checkpoint


def scored(checkpoint: Path, tiles: int, per_kind: int) -> tuple[float, float]:
    """(small print, all other types): shares of held-out questions answered rightly, with at most ``tiles`` tiles."""
    found = checkpoint.parent / f"score-{per_kind}-tiles{tiles}.json"
    if not found.exists():
        model = limited(Assistant.load(checkpoint), tiles)
        asked = held_out(per_kind)
        scores = score(asked, ask(lambda batch: model.reply_batch(batch, Sampling(max_new_tokens=24)), asked))
        small = next(one.share for one in scores if one.kind == SMALL_PRINT)
        found.write_text(json.dumps([small, overall(one for one in scores if one.kind != SMALL_PRINT).share]))
    small, rest = json.loads(found.read_text())
    return small, rest


def limited(assistant: Assistant, tiles: int) -> Assistant:
    """The same model choosing among its canvases of at most ``tiles`` tiles."""
    config, side = assistant.model.config, assistant.model.config.image_size
    if not config.canvases:
        return assistant
    canvases = tuple(one for one in config.canvases if one[0] * one[1] <= tiles * side * side) or tiles_of([ONE], side)
    assistant.model.config = replace(config, canvases=canvases)
    assistant.processor.tiling = assistant.model.config.tiling
    return assistant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="a model of one padded view")
    parser.add_argument("--tower", type=Path, required=True, help="its tower after close-ups")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("build/tiles"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--per-kind", type=int, default=40)
    given = parser.parse_args()
    rows: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in given.rows}
    for seed in given.seeds:
        for name in given.rows:
            for values, value in zip(rows[name], scored(tuned(given, ROWS[name][0], seed), ROWS[name][1], given.per_kind), strict=True):
                values.append(value)
        print(f"\nafter seed {seed}\n| views | small print, % | mean ± sd, % |\n| --- | --- | --- |")
        for name, (small, _) in rows.items():
            print(line(name, small))
        print("\n| views | other types, % | mean ± sd, % |\n| --- | --- | --- |")
        for name, (_, rest) in rows.items():
            print(line(name, rest), flush=True)


if __name__ == "__main__":
    main()
