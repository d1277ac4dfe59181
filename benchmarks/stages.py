"""What the two stages do, in miniature, three seeds each (LLaVA 1.0, section 4; the claims of issue 2).

    stage 1 alone     does aligning the projector make captions better than an untrained projector?
    stage 2           with and without stage 1, the same steps, samples and order

    python benchmarks/stages.py --work build/tiny [--seeds 0 1 2] [--align 200] [--tune 400] [--per-kind 50]

``--work`` is a folder made by ``runs/tiny.sh`` (tower, decoder, scenes). Runs are resumable; the table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from llavakit.assistant import Assistant
from llavakit.config import FINETUNE, PRETRAIN, parse
from llavakit.eval.scenes import ask, caption_f1, held_out, overall, score
from llavakit.scenes.draw import draw
from llavakit.scenes.export import START
from llavakit.scenes.world import scenes
from llavakit.train.loop import train
from llavakit.types import Conversation, Sampling


def aligned(work: Path, seed: int, steps: int) -> Path:
    """A checkpoint after ``steps`` of stage 1; 1 step at rate 0 gives the untrained projector in the same files."""
    rate = "2e-3" if steps > 1 else "0"
    words = [
        "aspect=pad",
        f"tower={work}/tower",
        f"decoder={work}/decoder",
        f"data={work}/scenes/pretrain.json",
        f"images={work}/scenes/images",
    ]
    words += [f"out={work}/stages/align{steps}-seed{seed}", "batch_size=32", "accumulation=1", f"steps={steps}", f"lr={rate}"]
    return train(parse(PRETRAIN, [*words, f"seed={seed}"])).checkpoint


def tuned(work: Path, start: Path, name: str, seed: int, steps: int) -> Path:
    """A checkpoint after ``steps`` of stage 2 from ``start``."""
    words = [f"start={start}", f"data={work}/scenes/finetune.json", f"images={work}/scenes/images", f"out={work}/stages/{name}-seed{seed}"]
    words += ["batch_size=16", "accumulation=1", f"steps={steps}", f"seed={seed}", "group=16"]
    words += ["optimizer=muon", "lr=3e-3", "betas=[0.9,0.98]"]  # as in runs/tiny.sh
    return train(parse(FINETUNE, words)).checkpoint


def caption_score(checkpoint: Path, count: int) -> float:
    """F1 of the things named in greedy captions of held-out scenes, asked for as stage 1 trains them (picture, then caption)."""
    model = Assistant.load(checkpoint)
    chosen = list(itertools.islice(scenes("test", start=START["test"]), count))
    asked = [Conversation.ask("", draw(scene)) for scene in chosen]
    greedy = Sampling(max_new_tokens=64, stop=("\n",))
    replies = [text for at in range(0, count, 64) for text in model.reply_batch(asked[at : at + 64], greedy)]
    return caption_f1([scene.seed for scene in chosen], replies)


def answer_score(checkpoint: Path, per_kind: int) -> float:
    """Share of held-out questions answered rightly (small print left out)."""
    model = Assistant.load(checkpoint)
    asked = held_out(per_kind)
    replies = ask(lambda batch: model.reply_batch(batch, Sampling(max_new_tokens=24)), asked)
    return overall(score(asked, replies)).share


def line(name: str, values: Sequence[float]) -> str:
    """One row: every seed, mean and standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"| {name} | {' / '.join(f'{100 * v:.1f}' for v in values)} | {100 * statistics.mean(values):.1f} ± {100 * spread:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--align", type=int, default=200, help="steps of stage 1")
    parser.add_argument("--tune", type=int, default=400, help="steps of stage 2")
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--captions", type=int, default=256)
    given = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for seed in given.seeds:
        raw, ready = aligned(given.work, seed, 1), aligned(given.work, seed, given.align)
        rows.setdefault("captions, untrained projector (F1)", []).append(caption_score(raw, given.captions))
        rows.setdefault("captions, after stage 1 (F1)", []).append(caption_score(ready, given.captions))
        both = tuned(given.work, ready, "both", seed, given.tune)
        only = tuned(given.work, raw, "only2", seed, given.tune)
        rows.setdefault("answers, stage 1 + stage 2", []).append(answer_score(both, given.per_kind))
        rows.setdefault("answers, stage 2 without stage 1", []).append(answer_score(only, given.per_kind))
    print("| what | seeds, % | mean ± sd, % |\n| --- | --- | --- |")
    for name, values in rows.items():
        print(line(name, values))


if __name__ == "__main__":
    main()
