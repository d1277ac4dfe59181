"""``llava miniature``: the base models of the built-in model, each trained from drawn scenes. ``runs/tiny.sh`` calls them in order."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from llavakit.cli import options

app = Typer(help="Train the base models of the built-in model.", no_args_is_help=True, rich_markup_mode="rich")

Folder = Annotated[Path, Argument(metavar="FOLDER", help="Where to save the model.")]
Words = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", show_default=False, help="Options; --options lists them.")]
Tokenizer = Annotated[Path, Option("--tokenizer", metavar="FOLDER", help="The trained tokenizer.")]
EXAMPLES = """Examples:

  llava miniature tokenizer runs/tiny/tokenizer

  llava miniature tower runs/tiny/tower --tokenizer runs/tiny/tokenizer steps=4000

  llava miniature decoder runs/tiny/decoder --tokenizer runs/tiny/tokenizer
"""


@app.command(epilog=EXAMPLES)
def tokenizer(folder: Folder, count: Annotated[int, Option("--count", min=1, help="Scenes whose text is read.")] = 6000) -> None:
    """Train the tokenizer on the text of drawn scenes."""
    options.quiet()
    from llavakit.miniature.tokenizer import run

    print(run(folder, count=count))


@app.command(epilog=EXAMPLES)
def tower(folder: Folder, tokenizer: Tokenizer, words: Words = None) -> None:
    """Train the tiny CLIP and keep its picture tower."""
    options.quiet()
    from llavakit.config import parse
    from llavakit.miniature.tower import TowerConfig, run

    print(run(folder, tokenizer=tokenizer, config=parse(TowerConfig(), words or ())))


@app.command(epilog=EXAMPLES)
def decoder(folder: Folder, tokenizer: Tokenizer, words: Words = None) -> None:
    """Train the small language model on text alone."""
    options.quiet()
    from llavakit.config import parse
    from llavakit.miniature.decoder import DecoderConfig, run

    print(run(folder, tokenizer=tokenizer, config=parse(DecoderConfig(), words or ())))
