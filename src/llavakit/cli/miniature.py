"""``llava miniature``: the base models of the built-in model, each trained from drawn scenes. ``runs/tiny.sh`` calls them in order."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option, Typer

from llavakit.cli import options
from llavakit.cli.train import show_options

app = Typer(help="Train the base models of the built-in model.", no_args_is_help=True, rich_markup_mode="rich")

Words = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", show_default=False, help="Options; --options lists them.")]
ListOptions = Annotated[bool, Option("--options", help="List the options, what they take and what they are, and leave.")]
EXAMPLES = """Examples:

  llava miniature tokenizer out=build/tiny/tokenizer
  llava miniature tower out=build/tiny/tower tokenizer=build/tiny/tokenizer
  llava miniature decoder out=build/tiny/decoder tokenizer=build/tiny/tokenizer
  llava miniature tower --options
"""


@app.command(epilog=EXAMPLES)
def tokenizer(words: Words = None, list_options: ListOptions = False) -> None:
    """Train the tokenizer on the text of drawn scenes."""
    options.quiet()
    from llavakit.miniature.tokenizer import TokenizerConfig, run

    if list_options:
        show_options(TokenizerConfig())
    else:
        print(run(words or ()))


@app.command(epilog=EXAMPLES)
def tower(words: Words = None, list_options: ListOptions = False) -> None:
    """Train the tiny CLIP and keep its picture tower."""
    options.quiet()
    from llavakit.miniature.tower import TowerConfig, run

    if list_options:
        show_options(TowerConfig())
    else:
        print(run(words or ()))


@app.command(epilog=EXAMPLES)
def decoder(words: Words = None, list_options: ListOptions = False) -> None:
    """Train the small language model on text alone."""
    options.quiet()
    from llavakit.miniature.decoder import DecoderConfig, run

    if list_options:
        show_options(DecoderConfig())
    else:
        print(run(words or ()))
