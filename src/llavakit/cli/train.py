"""``llava train``: one stage of LLaVA's recipe, from options to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option, Typer

from llavakit.cli import options, terminal

if TYPE_CHECKING:
    from llavakit.config import TrainConfig

PRETRAIN_EXAMPLES = """Examples:

  llava train pretrain --options
  llava train pretrain data=scenes/pretrain.json tower=clip decoder=vicuna out=runs/pretrain
  llava train pretrain --config runs/pretrain/config.yaml lr=5e-4
"""
FINETUNE_EXAMPLES = """Examples:

  llava train finetune start=runs/pretrain data=scenes/finetune.json out=runs/finetune
  llava train finetune --config runs/finetune/config.yaml      (goes on where it stopped)
"""

LORA_EXAMPLES = """Examples:

  llava train lora start=llava-1.5-7b data=mine.json out=runs/mine
  llava train lora lora.bits=4 lora.r=64 lora.alpha=16 start=llava-1.5-7b data=mine.json      (QLoRA)
  llava convert runs/mine merged --base llava-1.5-7b
"""

Words = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", show_default=False, help="Options; --options lists them.")]
File = Annotated[Path | None, Option("--config", "-c", metavar="FILE", help="A YAML file of options, for example a run's config.yaml.")]
ListOptions = Annotated[bool, Option("--options", help="List the options, what they take and what they are, and leave.")]

app = Typer(help="Train a model in two stages.", no_args_is_help=True, rich_markup_mode="rich")


@app.command(epilog=PRETRAIN_EXAMPLES)
def pretrain(words: Words = None, config: File = None, list_options: ListOptions = False) -> None:
    """Stage 1: the projector alone learns, on pictures and captions."""
    from llavakit.config import PRETRAIN

    _stage(PRETRAIN, words, config, list_options)


@app.command(epilog=FINETUNE_EXAMPLES)
def finetune(words: Words = None, config: File = None, list_options: ListOptions = False) -> None:
    """Stage 2: the projector and the language model learn, on conversations."""
    from llavakit.config import FINETUNE

    _stage(FINETUNE, words, config, list_options)


@app.command(epilog=LORA_EXAMPLES)
def lora(words: Words = None, config: File = None, list_options: ListOptions = False) -> None:
    """Stage 2 with LoRA: small matrices beside the language model's frozen layers learn, and the projector."""
    from llavakit.config import LORA

    _stage(LORA, words, config, list_options)


def _stage(base: TrainConfig, words: list[str] | None, file: Path | None, list_options: bool) -> None:
    from llavakit.config import parse

    config = parse(base, words or (), file=file)
    if list_options:
        show_options(config)
        return
    options.quiet()
    from llavakit.train.loop import train

    outcome = train(config)
    print(outcome.checkpoint)
    if outcome.exit_code:
        raise Exit(outcome.exit_code)


def show_options(config: object) -> None:
    """A table of every option with its value; below a terminal's width the help goes under the name."""
    from rich.text import Text

    from llavakit.config import describe

    console = terminal.out()
    for option in describe(config):
        head = Text.assemble((option.name, "bold cyan"), f"={option.default}", (f"   {option.kind}", "dim"))
        console.print(head)
        if option.help:
            console.print(Text(f"    {option.help}"))
