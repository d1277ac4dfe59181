"""``llava capacity``: how many requests a second a GPU replies to, and how many GPUs a load needs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llavakit.cli import options
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from llavakit.model.cards import Card
    from llavakit.model.presets import ModelConfig
    from llavakit.model.sizes import Sizes
    from llavakit.serve.sizing import Fleet, Pace, Request

EXAMPLES = """Examples:

  llava capacity llava-v1.5-7b --gpu A100-80                      (what one card can do)
  llava capacity llava-v1.6-34b --gpu H100 --cards 2 --load 5 --size 1000x667 --reply-tokens 300
  llava capacity my-llava --gpu here --load 0.5                   (measured on this machine, in seconds)
"""
HERE = "here"


def capacity(
    model: Annotated[
        str | None, Argument(metavar="MODEL", show_default=False, help="A folder, a built-in model, a Hub id, or a published system.")
    ] = None,
    gpu: Annotated[str, Option("--gpu", metavar="CARD", help="The card, or here: this machine, measured.")] = "A100-80",
    cards: Annotated[int, Option("--cards", min=1, help="How many of them share one copy of the model (tensor parallel).")] = 1,
    load: Annotated[float | None, Option("--load", metavar="N", help="Requests a second that must be replied to.")] = None,
    size: Annotated[str | None, Option("--size", metavar="WxH", help="The usual picture (default: 640x480).")] = None,
    images: Annotated[int, Option("--images", min=0, help="Pictures in a request.")] = 1,
    prompt_tokens: Annotated[int, Option("--prompt-tokens", min=1, help="Tokens of text in a request.")] = 128,
    reply_tokens: Annotated[int, Option("--reply-tokens", min=1, help="Tokens of a reply.")] = 256,
    at_once: Annotated[int | None, Option("--at-once", min=1, help="Replies at a time at most (default: what memory holds).")] = None,
    share: Annotated[float, Option("--share", help="How much of a card's limit to plan with: requests do not come evenly.")] = 0.7,
    as_json: options.Json = False,
) -> None:
    """Say what a GPU can serve, and how many a load needs, with the time to the first token and to the last."""
    options.quiet()
    from llavakit.cli.info import _size, shape_of
    from llavakit.model.sizes import empty, sizes
    from llavakit.serve import sizing

    name, config, _ = shape_of(model)
    found = sizes(empty(config))
    grid = config.tiling.grid(*_size(None, size))
    request = sizing.Request(prompt=prompt_tokens + images * grid.tokens, reply=reply_tokens, views=images * grid.views)
    limit = int(config.text["max_position_embeddings"])
    if request.whole > limit:
        what = f"{request.prompt} tokens of prompt and {reply_tokens} of reply do not fit the model's {limit}"
        raise ConfigError(what, code="bad_value", where="--prompt-tokens", remedy="give shorter texts or fewer pictures")
    rates, memory, said = _rates(config, found, request, gpu, cards)
    most = min(sizing.most(found, request, memory), at_once or sizing.SEQUENCES)
    limit_rate = sizing.capacity(rates, reply_tokens, most)
    fleet = None if load is None else sizing.fleet(rates, request, most, load, cards=cards, headroom=share)
    if as_json:
        print(json.dumps(_record(name, said, request, rates, most, limit_rate, fleet), indent=1))
        return
    print(f"{name} on {f'{cards} x ' if cards > 1 else ''}{said}")
    print(f"  a request        {request.prompt} tokens to read ({images * grid.tokens} of {images} picture(s)), {reply_tokens} to write")
    print(f"  reading          {1000 * rates.prefill:.1f} ms")
    print(f"  a token          {1000 * rates.step(1):.1f} ms alone", end="")
    print(f", {1000 * rates.step(most):.1f} ms with {most} replies at a time: what the memory holds" if most else "")
    print(f"  at most          {limit_rate:.2f} requests/s" if most else "  not one conversation fits beside the weights")
    if fleet is not None:
        each = fleet.each
        print(f"\n{load:g} requests/s     {fleet.gpus} GPU(s): {fleet.copies} copies, each at {each.share:.0%} of its limit")
        print(f"  on each          {each.replies:.1f} replies at a time")
        print(f"  first token      {each.first:.2f} s, then {1000 * each.token:.0f} ms a token; the whole reply {each.whole:.1f} s")


def _rates(config: ModelConfig, found: Sizes, request: Request, gpu: str, cards: int) -> tuple[Pace, float, str]:
    """Pace, memory in bytes, and the card in words."""
    from llavakit.model.cards import card
    from llavakit.serve import sizing

    if gpu != HERE:
        chosen: Card = card(gpu)
        return sizing.pace(config, found, request, chosen, cards=cards), cards * chosen.memory * sizing.GIB, gpu.upper()
    if cards > 1:
        raise ConfigError("only one device is measured", code="bad_value", where="--cards", remedy="leave it away, or name the card")
    from llavakit.serve import measured

    return measured.measure(config, request), measured.memory(), "this machine, measured"


def _record(name: str, card: str, request: Request, rates: Pace, most: int, limit: float, fleet: Fleet | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "model": name, "card": card, "request": vars(request), "prefill_s": rates.prefill, "token_s_alone": rates.step(1),
        "token_s_full": rates.step(most), "at_once": most, "requests_per_s": limit,
    }  # fmt: skip
    if fleet is not None:
        record["fleet"] = {"gpus": fleet.gpus, "copies": fleet.copies, **vars(fleet.each)}
    return record
