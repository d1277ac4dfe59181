"""``llava info``: what a checkpoint is and what it needs, from its small files alone; no weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from llavakit.cli import options
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from llavakit.model.presets import ModelConfig
    from llavakit.model.sizes import Sizes
    from llavakit.tiling import Grid, Size

EXAMPLES = """Examples:

  llava info                                        (the built-in model)
  llava info my-llava --image photo.jpg --card 24
  llava info llava-v1.6-34b --size 1000x667         (a published system, by name: nothing is downloaded)
"""
GIB = 2**30


def info(
    model: Annotated[
        str | None, Argument(metavar="MODEL", show_default=False, help="A folder, a built-in model, a Hub id, or a published system.")
    ] = None,
    image: Annotated[Path | None, Option("--image", metavar="FILE", help="Count this picture's tokens.")] = None,
    size: Annotated[str | None, Option("--size", metavar="WxH", help="Count the tokens of a picture of this size.")] = None,
    card: Annotated[float | None, Option("--card", metavar="GIB", help="How many conversations fit on a card of so much memory.")] = None,
    tree: Annotated[bool, Option("--tree", help="Print the module tree.")] = False,
    revision: options.Revision = None,
    allow_pickle: options.AllowPickle = False,
    base: options.Base = None,
    tower: options.Tower = None,
    as_json: options.Json = False,
) -> None:
    """Say what a model is made of, what a picture costs, and what memory it needs."""
    options.quiet()
    from llavakit.model import sizes

    name, config, template = shape_of(model, revision, allow_pickle, base, tower)
    shown = _size(image, size)
    made = sizes.empty(config)
    found = sizes.sizes(made)
    grid = config.tiling.grid(*shown)
    tokens = grid.tokens + sizes.ROOM
    rows: dict[str, Any] = {
        "model": name,
        "template": template,
        "tower": _tower(config),
        "language_model": f"{config.text['model_type']}, {found.layers} layers, width {found.width}, {config.rows} rows",
        "parameters": {
            "tower": found.tower,
            "of these never run": found.idle,
            "projector": found.projector,
            "row end": found.row_end,
            "language model": found.language_model,
            "total": found.total,
        },
        "picture": {"size": list(shown), "canvas": config.tiling.canvas(*shown), "views": grid.views, "tokens": grid.tokens},
        "gib": {kind: round(found.weights(kind) / GIB, 3) for kind in sizes.BITS},
        "cache_bytes_per_token": found.cache(1),
    }
    if card is not None:
        fits = {kind: found.batch(card * GIB, tokens, kind) for kind in sizes.BITS}
        rows["batch"] = {"card_gib": card, "tokens_each": tokens, "conversations": fits}
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    _print(rows, found, grid, shown)
    if tree:
        print()
        for depth, line, count in sizes.outline(made):
            print(f"{'  ' * depth}{line}  {count:,}")


def shape_of(
    model: str | None, revision: str | None = None, allow_pickle: bool = False, base: Path | None = None, tower: Path | None = None
) -> tuple[str, ModelConfig, str]:
    """Name, shape and prompt format. A published system's name counts where there is no such folder."""
    from llavakit.checkpoint import places, store
    from llavakit.model.released import SYSTEMS

    if model is not None and model in SYSTEMS and not Path(model).exists():
        return model, SYSTEMS[model].config, SYSTEMS[model].template
    folder = places.find(model, revision=revision, allow_pickle=allow_pickle)
    config, processor = store.outline(folder, base=base, tower=tower, allow_pickle=allow_pickle)
    return str(model or "tiny (built in)"), config, processor.template.name


def _size(image: Path | None, size: str | None) -> Size:
    from llavakit.images import image_size
    from llavakit.types import Image

    if image is not None:
        return image_size(Image(image))
    width, _, height = (size or "640x480").lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError(f"{size!r} is no size", code="bad_value", where="--size", remedy="write width x height, as 1000x667")
    return int(width), int(height)


def _tower(config: ModelConfig) -> str:
    side, patch = config.image_size, config.patch_size
    read = f"layer {config.select_layer} of {config.vision['num_hidden_layers']}"
    return f"CLIP, views of {side} pixels, patches of {patch}, {read}, projector {config.projector}"


def _print(rows: dict[str, Any], found: Sizes, grid: Grid, shown: Size) -> None:
    for name in ("model", "template", "tower", "language_model"):
        print(f"{name.replace('_', ' '):16}{rows[name]}")
    print("\nparameters")
    for name, count in rows["parameters"].items():
        print(f"  {name:20}{count:>16,}")
    print(f"\na picture of {shown[0]} x {shown[1]}")
    print("\n".join(f"  {line}" for line in drawing(grid, rows["picture"]["canvas"])))
    print("\nmemory           " + "".join(f"{kind:>10}" for kind in rows["gib"]))
    print("  weights, GiB   " + "".join(f"{value:>10.2f}" for value in rows["gib"].values()))
    print(f"  keys and values  {found.cache(1) / 1024:.0f} KiB a token, {found.cache(grid.tokens) / GIB:.2f} GiB for this picture")
    if "batch" in rows:
        batch = rows["batch"]
        print(f"  at a time      {''.join(f'{count:>10}' for count in batch['conversations'].values())}", end="")
        print(f"   conversations of {batch['tokens_each']} tokens on {batch['card_gib']:g} GiB")


def drawing(grid: Grid, canvas: Size | None) -> list[str]:
    """The views of a picture as boxes, the base apart, and the sum of its tokens."""
    if canvas is None or not grid.columns:
        return ["+------+", "| view |", "+------+", f"{grid.tokens} tokens"]
    edge, tile = "+" + "------+" * grid.columns, "|" + " tile |" * grid.columns
    right = [edge] + [line for _ in range(grid.rows) for line in (tile, edge)]
    left = ["+------+", "| base |", "+------+"]
    width = max(len(left), len(right))
    lines = [f"{a:10}{b}" for a, b in zip(left + [""] * (width - len(left)), right + [""] * (width - len(right)), strict=True)]
    parts = [f"{grid.view_tokens} of the base", f"{grid.kept_rows} x {grid.kept_columns} of the tiles"]
    if grid.merge == "flat":
        parts[1] = f"{grid.views - 1} x {grid.view_tokens} of the tiles"
    ends = [f"{grid.row_ends} row ends"] if grid.row_ends else []
    return [*lines, f"canvas {canvas[0]} x {canvas[1]}: " + " + ".join([*parts, *ends]) + f" = {grid.tokens} tokens"]
