"""``llava scenes``: drawn pictures that know their truth."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from llavakit.cli import options, terminal

DRAW_EXAMPLES = """Examples:

  llava scenes draw scene.png --seed 7            (the picture, and what is true of it)
  llava scenes draw small.jpg --seed 7 --side 112
"""
EXPORT_EXAMPLES = """Examples:

  llava scenes export data/train --count 40000
  llava scenes export data/test --split test --count 2000
  llava scenes export data/print --small-print 0.75 --turns 3 --described 0.15
"""
SCORE_EXAMPLES = """Examples:

  llava scenes score                               (the built-in model, 200 questions of each type)
  llava scenes score --model runs/finetune --per-type 50 --json
"""


class SplitName(StrEnum):
    train = "train"
    test = "test"


app = Typer(help="Draw pictures that know their truth.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(epilog=DRAW_EXAMPLES)
def draw(
    out: Annotated[Path, Argument(metavar="FILE", help="Where to write the picture (.png or .jpg).")],
    seed: Annotated[int, Option("--seed", min=0, help="Which scene.")] = 0,
    side: Annotated[int | None, Option("--side", min=16, max=4096, help="The long side in pixels (default: the scene's own).")] = None,
) -> None:
    """Draw one scene; its captions, questions and answers go to stdout as JSON."""
    from llavakit.scenes.draw import draw as draw_scene
    from llavakit.scenes.questions import questions
    from llavakit.scenes.statements import captions
    from llavakit.scenes.world import make_scene

    scene = make_scene(seed)
    options.save_picture(draw_scene(scene, long_side=side), out)
    rng = random.Random(seed)
    asked = [{"type": q.kind, "question": q.question, "answer": q.answer} for q in questions(scene, rng)]
    print(json.dumps({"seed": seed, "split": scene.split, "captions": captions(scene, rng), "questions": asked}, indent=1))


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    folder: Annotated[Path, Argument(help="The folder to write.")],
    count: Annotated[int, Option("--count", "-n", min=1, help="How many scenes.")] = 1000,
    split: Annotated[SplitName, Option("--split", help="Train and test share no scene.")] = SplitName.train,
    seed: Annotated[int, Option("--seed", min=0, help="Where in the split to begin.")] = 0,
    workers: Annotated[int, Option("--workers", min=1, help="Processes that draw.")] = 2,
    turns: Annotated[int, Option("--turns", min=1, help="Questions in a conversation.")] = 8,
    described: Annotated[float, Option("--described", min=0, max=1, help="Share of conversations with a description of the whole.")] = 0.8,
    close_ups: Annotated[float, Option("--close-ups", min=0, max=1, help="Share shown as close-ups of one small sign.")] = 0.0,
    small_print: Annotated[
        float | None,
        Option("--small-print", min=0, max=1, help="Share with small print, always asked for (default: as they come)."),
    ] = None,
    numbers: Annotated[
        float | None,
        Option("--numbers", min=0, max=1, help="Share with a number in large print, always asked for (default: as they come)."),
    ] = None,
) -> None:
    """Write pictures with COCO files, LLaVA JSON for both stages, and a benchmark."""
    from llavakit.datagen.drawn import export as export_scenes

    with progress("drawing", count) as tell:
        print(
            export_scenes(
                folder,
                count,
                split=split.value,
                seed=seed,
                workers=workers,
                turns=turns,
                small_print=small_print,
                numbers=numbers,
                described=described,
                close_ups=close_ups,
                progress=lambda done, _: tell(done),
            )
        )


@app.command(epilog=SCORE_EXAMPLES)
@options.spread
def score(
    per_type: Annotated[int, Option("--per-type", min=1, help="Questions of each type.")] = 200,
    seed: Annotated[int, Option("--seed", min=0, help="Where in the test split to begin.")] = 0,
    as_json: options.Json = False,
    *,
    loading: options.Loading,
) -> None:
    """Ask held-out questions about held-out scenes, with the picture and with a blank one."""
    from llavakit.eval import scenes as judge
    from llavakit.types import Sampling

    assistant = loading.assistant()
    short = Sampling(max_new_tokens=64)
    asked = judge.held_out(per_type, seed=seed)
    with progress("asking", 2 * len(asked)) as tell:
        seen = judge.ask(lambda batch: assistant.reply_batch(batch, short), asked, done=tell)
        unseen = judge.ask(
            lambda batch: assistant.reply_batch(batch, short), asked, sighted=False, done=lambda done: tell(len(asked) + done)
        )
    with_picture, without = judge.score(asked, seen), judge.score(asked, unseen)
    if not as_json:
        print(judge.table(with_picture, without, judge.best_guess(asked)))
        return
    rows = {s.kind: {"right": s.right, "total": s.total, "blank_right": b.right} for s, b in zip(with_picture, without, strict=True)}
    whole = judge.overall(with_picture)
    print(json.dumps({"overall": whole.share, "types": rows}))


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while something counts up to ``total``; nothing when stderr is no terminal."""
    from rich.progress import Progress

    with Progress(console=terminal.err(), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
