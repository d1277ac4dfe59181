"""``llava plan``: hours, memory and money of a training run, before anything is downloaded or rented."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llavakit.cli import options

if TYPE_CHECKING:
    from llavakit.train.plan import Plan
    from llavakit.train.published import Published

EXAMPLES = """Examples:

  llava plan                                                     (the recipes and the cards)
  llava plan v1.5-7b-finetune --gpu A100-80 --devices 8 --price 1.8
  llava plan v1.5-7b-finetune --gpu RTX4090 samples=20000 padding=1
"""


def plan(
    recipe: Annotated[
        str | None, Argument(metavar="RECIPE", show_default=False, help="A published run; without one, all are listed.")
    ] = None,
    words: Annotated[list[str] | None, Argument(metavar="KEY=VALUE", show_default=False, help="Changes; --options lists them.")] = None,
    gpu: Annotated[str | None, Option("--gpu", metavar="CARD", help="The card (default: the published run's).")] = None,
    devices: Annotated[int | None, Option("--devices", min=1, help="How many (default: as many as in the published run).")] = None,
    sharding: Annotated[str | None, Option("--sharding", help="none, ddp or fsdp (default: the simplest that fits).")] = None,
    utilisation: Annotated[float | None, Option("--utilisation", help="The share of the card's peak that is reached.")] = None,
    price: Annotated[float | None, Option("--price", help="Of one device for an hour.")] = None,
    list_options: Annotated[bool, Option("--options", help="List what may be changed, and leave.")] = False,
    as_json: options.Json = False,
) -> None:
    """Say what a training run takes: hours, memory a device, cost, and what to change when it does not fit."""
    from typing import get_args

    from llavakit.config import parse
    from llavakit.errors import ConfigError
    from llavakit.train import plan as plans
    from llavakit.train.cards import card
    from llavakit.train.published import published

    if recipe is None:
        _list()
        return
    if sharding is not None and sharding not in get_args(plans.Sharding):
        raise ConfigError(f"no sharding {sharding!r}", code="bad_value", where="--sharding", remedy="use none, ddp or fsdp")
    entry = published(recipe)
    run = parse(entry.run, words or ())
    if list_options:
        from llavakit.cli.train import show_options

        show_options(run, hidden=("config",))
        return
    chosen = card(gpu or entry.card)
    share = utilisation if utilisation is not None else plans.UTILISATION
    made = plans.plan(run, chosen, devices=devices or entry.devices, sharding=sharding, utilisation=share)  # type: ignore[arg-type]
    others = [] if made.fits else list(plans.remedies(made, chosen))
    if as_json:
        print(json.dumps(_record(recipe, (gpu or entry.card).upper(), made, others, price), indent=1))
        return
    _print(recipe, (gpu or entry.card).upper(), made, price)
    if entry.hours is not None:
        print(f"\npublished         {entry.hours:g} h on {entry.devices} x {entry.card}")
    if not made.fits:
        _print_remedies(others)


def _list() -> None:
    """The recipes with what was published about them, and the cards."""
    from llavakit.train.cards import CARDS
    from llavakit.train.published import RUNS

    for name, entry in RUNS.items():
        said = f"{entry.hours:g} h" if entry.hours is not None else "not said"
        print(f"{name:20}{entry.run.samples * entry.run.epochs:>10,} samples   published: {_where(entry)}, {said}")
    print("\ncards: " + ", ".join(f"{name} ({entry.memory:g} GiB)" for name, entry in CARDS.items()))


def _where(entry: Published) -> str:
    return f"{entry.devices} x {entry.card}"


def _record(recipe: str, card: str, made: Plan, others: list[tuple[str, Plan]], price: float | None) -> dict[str, Any]:
    run = {name: value for name, value in vars(made.run).items() if name not in ("config", "sizes")}
    return {
        "recipe": recipe,
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


def _print(recipe: str, card: str, made: Plan, price: float | None) -> None:
    from llavakit.train.plan import GIB

    run = made.run
    print(f"{recipe} on {made.devices} x {card}")
    tokens = f"{run.tokens:.0f} tokens ({run.image_tokens:.0f} of images), {run.padding:.2f} positions each"
    print(f"  {run.samples * run.epochs:,} samples of {tokens}")
    print(f"  {run.learned:,} parameters learn; {run.steps:,} steps of {run.batch}: {made.rows} at a time on each device", end="")
    print(f", {made.accumulation} times; sharding {made.sharding}; checkpointing {'on' if run.checkpointing else 'off'}")
    print("\noperations of a sample, 10^12")
    for name, value in asdict(made.flops).items():
        if value:
            print(f"  {name.replace('_', ' '):16}{value / 1e12:>9.2f}")
    print("\nmemory on a device, GiB")
    for name, value in asdict(made.memory).items():
        print(f"  {name:16}{value / GIB:>9.2f}")
    verdict = "fits" if made.fits else "DOES NOT FIT"
    print(f"  {'total':16}{made.memory.total / GIB:>9.2f}   of {made.room / GIB:.2f}: {verdict}")
    print(f"\nhours           {made.hours:>11.2f}   at {made.utilisation:.0%} of the peak")
    if price is not None:
        print(f"cost            {made.cost(price):>11.2f}   at {price:g} for a device and hour")


def _print_remedies(others: list[tuple[str, Plan]]) -> None:
    from llavakit.train.plan import GIB

    print("\nwhat fits instead" if others else "\nno smaller change fits; take a larger card")
    for words, other in others:
        print(f"  {words:44}{other.memory.total / GIB:>7.2f} GiB {other.hours:>9.2f} h   {other.rows} at a time, {other.sharding}")
