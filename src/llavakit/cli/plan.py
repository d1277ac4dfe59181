"""``llava plan``: hours, memory and money of a training run, before anything is downloaded or rented."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llavakit.cli import options
from llavakit.errors import ConfigError
from llavakit.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from llavakit.config import TrainConfig
    from llavakit.model.cards import Card
    from llavakit.train.plan import Plan, Run
    from llavakit.train.published import Time

EXAMPLES = """Examples:

  llava plan                                                     (the recipes, what they make, the cards)
  llava plan finetune --model llava-v1.5-13b --gpu A100-80 --devices 8 --price 1.8
  llava plan lora --gpu RTX4090 --devices 2 samples=20000 gradient_checkpointing=true
  llava plan task-lora --model my-llava samples=5000 lora.bits=4 --gpu here
"""

HERE = "here"


def plan(
    recipe: Annotated[
        str | None, Argument(metavar="RECIPE", show_default=False, help="A recipe of llava train; without one, all are listed.")
    ] = None,
    words: Annotated[
        list[str] | None,
        Argument(metavar="KEY=VALUE", show_default=False, help="Options of llava train, and of the samples; --options lists them."),
    ] = None,
    model: Annotated[
        str | None,
        Option("--model", "-m", metavar="NAME", help="A published system or a checkpoint (default: the first the recipe makes)."),
    ] = None,
    gpu: Annotated[
        str | None,
        Option("--gpu", metavar="CARD", help="The card (default: the published run's), or here: measured by a few steps on this machine."),
    ] = None,
    devices: Annotated[int | None, Option("--devices", min=1, help="How many (default: as many as in the published run).")] = None,
    sharding: Annotated[str | None, Option("--sharding", help="none, ddp or fsdp (default: the simplest that fits).")] = None,
    utilisation: Annotated[float | None, Option("--utilisation", help="The share of the card's peak that is reached.")] = None,
    price: Annotated[float | None, Option("--price", help="Of one device for an hour.")] = None,
    list_options: Annotated[bool, Option("--options", help="List what may be changed, and leave.")] = False,
    as_json: options.Json = False,
) -> None:
    """Say what a training run takes: hours, memory a device, cost, and what to change when it does not fit."""
    from llavakit.cli.info import shape_of
    from llavakit.config import parse
    from llavakit.train.described import Samples, planned
    from llavakit.train.plan import remedies
    from llavakit.train.published import TIMES, Time, samples

    if recipe is None:
        _list()
        return
    chosen = _recipe(recipe)
    options.quiet()
    of_samples = {field.name for field in fields(Samples)}
    mine = [word for word in words or () if word.partition("=")[0] in of_samples]
    config = parse(chosen.config, [word for word in words or () if word not in mine])
    name, shape, _ = shape_of(model or chosen.makes[0])
    data = parse(samples(chosen, config, shape), mine)
    if list_options:
        from llavakit.cli.train import show_options

        show_options(data)
        show_options(config)
        return
    run = planned(config, shape, data)
    time = TIMES.get((recipe, name), Time())
    made, on, said = _made(run, config, time, gpu, devices, sharding, utilisation)
    others = [] if made.fits else list(remedies(made, on))
    if as_json:
        print(json.dumps(_record(recipe, name, said, made, others, price), indent=1))
        return
    _print(f"{recipe} of {name}", said, made, price)
    if chosen.data is None and not mine[1:]:
        print("\nthe samples are taken to be as long as LLaVA-1.5's; text_tokens=, learned_tokens= and others say otherwise")
    if time.hours is not None:
        print(f"\npublished         {time.hours:g} h on {_where(time)}, rows filled up, activations computed again")
    if not made.fits:
        _print_remedies(others)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ConfigError(f"no recipe '{name}'", code="unknown_recipe", where="RECIPE", remedy=f"use one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _made(
    run: Run, config: TrainConfig, time: Time, gpu: str | None, devices: int | None, sharding: str | None, utilisation: float | None
) -> tuple[Plan, Card, str]:
    """The plan on a card of the table, or on this machine, which is measured; and the card in words."""
    from typing import get_args

    from llavakit.model.cards import card
    from llavakit.train import plan as plans

    if sharding is not None and sharding not in get_args(plans.Sharding):
        raise ConfigError(f"no sharding {sharding!r}", code="bad_value", where="--sharding", remedy="use none, ddp or fsdp")
    if gpu == HERE:
        from llavakit.train import pace

        found = pace.measure(run, config)
        said = f"this machine, {found.rate / 1e12:.3f} TFLOP/s by {found.steps} steps of shallow models"
        on, update, share, count = pace.here(config, found), found.update, 1.0, devices or 1
    else:
        on, update, said = card(gpu or time.card), 0.0, (gpu or time.card).upper()
        share, count = utilisation if utilisation is not None else plans.UTILISATION, devices or time.devices
    return plans.plan(run, on, devices=count, sharding=sharding, utilisation=share, update=update), on, said  # type: ignore[arg-type]


def _list() -> None:
    """The recipes with what they make and what was published about it, and the cards."""
    from llavakit.model.cards import CARDS
    from llavakit.train.published import TIMES, Time

    for recipe in RECIPES.values():
        for name in recipe.makes:
            time = TIMES.get((recipe.name, name), Time())
            said = f"{time.hours:g} h on {_where(time)}" if time.hours is not None else "not said"
            print(f"{recipe.name:15}{name:24}{_count(recipe):>18}   published: {said}")
    print("\ncards: " + ", ".join(f"{name} ({entry.memory:g} GiB)" for name, entry in CARDS.items()))


def _count(recipe: Recipe) -> str:
    from llavakit.data.manifest import shipped

    count = shipped(recipe.data).count if recipe.data is not None else None
    return "give samples=N" if count is None else f"{count * recipe.config.epochs:,} samples"


def _where(time: Time) -> str:
    return f"{time.devices} x {time.card}"


def _record(recipe: str, model: str, card: str, made: Plan, others: list[tuple[str, Plan]], price: float | None) -> dict[str, Any]:
    run = {name: value for name, value in vars(made.run).items() if name not in ("config", "sizes")}
    return {
        "recipe": recipe,
        "model": model,
        "run": run,
        "card": card,
        "devices": made.devices,
        "sharding": made.sharding,
        "rows": made.rows,
        "accumulation": made.accumulation,
        "utilisation": made.utilisation,
        "steps": made.run.steps,
        "hours": made.hours,
        "cost": None if price is None else made.cost(price),
        "flops_of_a_sample": asdict(made.flops),
        "bytes_on_a_device": asdict(made.memory) | {"total": made.memory.total, "room": made.room},
        "fits": made.fits,
        "remedies": {words: {"hours": other.hours, "bytes": other.memory.total} for words, other in others},
    }


def _print(title: str, card: str, made: Plan, price: float | None) -> None:
    from llavakit.train.plan import GIB

    run = made.run
    print(f"{title} on {made.devices} x {card}")
    tokens = f"{run.tokens:.0f} tokens ({run.image_tokens:.0f} of images), {run.padding:.2f} positions each"
    print(f"  {run.samples * run.epochs:,} samples of {tokens}")
    print(f"  {run.learned:,} parameters learn; {run.steps:,} steps of {run.batch}: {made.rows} at a time on each device", end="")
    print(f", {made.accumulation} times; sharding {made.sharding}; checkpointing {'on' if run.checkpointing else 'off'}")
    print(f"  as options: {made.words}")
    print("\noperations of a sample, 10^12")
    for name, value in asdict(made.flops).items():
        if value:
            print(f"  {name.replace('_', ' '):16}{value / 1e12:>9.3g}")
    print("\nmemory on a device, GiB")
    for name, value in asdict(made.memory).items():
        print(f"  {name:16}{value / GIB:>9.2f}")
    verdict = "fits" if made.fits else "DOES NOT FIT"
    print(f"  {'total':16}{made.memory.total / GIB:>9.2f}   of {made.room / GIB:.2f}: {verdict}")
    print(
        f"\nhours           {made.hours:>11.2f}   at {made.utilisation:.0%} of the {'measured rate' if card.startswith('this') else 'peak'}"
    )
    if price is not None:
        print(f"cost            {made.cost(price):>11.2f}   at {price:g} for a device and hour")


def _print_remedies(others: list[tuple[str, Plan]]) -> None:
    from llavakit.train.plan import GIB

    print("\nwhat fits instead" if others else "\nno smaller change fits; take a larger card")
    for words, other in others:
        print(f"  {words:44}{other.memory.total / GIB:>7.2f} GiB {other.hours:>9.2f} h   {other.rows} at a time, {other.sharding}")
