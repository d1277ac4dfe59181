"""``llava train``: a recipe of the papers, from options to a checkpoint; and a run's report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option, Typer

from llavakit.cli import options, preflight, terminal
from llavakit.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from llavakit.config import TrainConfig

EXAMPLES = """Examples:

  llava train pretrain data=captions.json images=pictures tower=clip decoder=vicuna out=runs/pretrain
  llava train finetune data=talks.json images=pictures start=runs/pretrain out=runs/finetune
  llava train task-lora data=mine.json start=llava-1.5-7b out=runs/mine --dry-run
  llava train finetune --config runs/finetune/config.yaml      (goes on where it stopped)
  torchrun --nproc-per-node 8 -m llavakit train finetune ... shard=full
"""
RECIPE_EXAMPLES = """Examples:

  llava train {name} --options
  llava train {name} data=FILE images=FOLDER start=CHECKPOINT out=runs/{name} --dry-run
"""

Words = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", show_default=False, help="Options; --options lists them.")]
File = Annotated[Path | None, Option("--config", "-c", metavar="FILE", help="A YAML file of options, for example a run's config.yaml.")]
DryRun = Annotated[bool, Option("--dry-run", help="Check the data, rehearse save and resume, predict memory, hours and cost, and leave.")]
Price = Annotated[float | None, Option("--price", help="Of one device for an hour: the cost is predicted too.")]
ListOptions = Annotated[bool, Option("--options", help="List the options, what they take and what they are, and leave.")]

app = Typer(help="Train a model by one of the papers' recipes.", no_args_is_help=True, rich_markup_mode="rich", epilog=EXAMPLES)


def _command(recipe: Recipe) -> Callable[..., None]:
    """The command of one recipe."""

    def run(
        words: Words = None, config: File = None, dry_run: DryRun = False, price: Price = None, list_options: ListOptions = False
    ) -> None:
        _train(recipe.config, words, config, dry_run, price, list_options)

    return run


for _recipe in RECIPES.values():
    _help = _recipe.help[0].upper() + _recipe.help[1:] + "." + (f" ({_recipe.note}.)" if _recipe.note else "")
    app.command(_recipe.name, help=_help, epilog=RECIPE_EXAMPLES.format(name=_recipe.name))(_command(_recipe))


@app.command(epilog="Examples:\n\n  llava train report runs/finetune\n")
def report(run: Annotated[Path, Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Make report.html of a run again."""
    from llavakit.train.report import write_report

    print(write_report(run))


def _train(base: TrainConfig, words: list[str] | None, file: Path | None, dry_run: bool, price: float | None, list_options: bool) -> None:
    from llavakit.config import parse

    config = parse(base, words or (), file=file)
    if list_options:
        show_options(config)
        return
    options.quiet()
    from llavakit.train import start
    from llavakit.train.loop import train
    from llavakit.train.ranks import joined

    with joined(start.device(config).type, config.timeout):  # once for rehearsal and run: torchrun's store keeps a first group's addresses
        if preflight.before(config, only=dry_run, price=price):
            return
        outcome = train(config)
    print(outcome.checkpoint)
    if outcome.exit_code:
        raise Exit(outcome.exit_code)


def show_options(config: object, *, hidden: tuple[str, ...] = ()) -> None:
    """A table of every option with its value, but for the hidden; below a terminal's width the help goes under the name."""
    from rich.text import Text

    from llavakit.config import describe

    console = terminal.out()
    for option in describe(config):
        if option.name in hidden:
            continue
        head = Text.assemble((option.name, "bold cyan"), f"={option.default}", (f"   {option.kind}", "dim"))
        console.print(head)
        if option.help:
            console.print(Text(f"    {option.help}"))
