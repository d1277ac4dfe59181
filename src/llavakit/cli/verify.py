"""``llava verify``: does a checkpoint compute here what it computes in transformers?"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from llavakit.cli import options

EXAMPLES = """Examples:

  llava verify                                     (the built-in model)
  llava verify my-llava --image photo.jpg -q "What is this?"
"""


def verify(
    model: Annotated[str | None, Argument(metavar="MODEL", show_default=False, help="A folder, a built-in model or a Hub id.")] = None,
    image: Annotated[Path | None, Option("--image", metavar="FILE", help="The picture to ask about (default: a made one).")] = None,
    question: Annotated[str, Option("--question", "-q", metavar="TEXT", help="The question.")] = "What is in the picture?",
    allow_pickle: options.AllowPickle = False,
    revision: options.Revision = None,
    base: options.Base = None,
    tower: options.Tower = None,
    as_json: options.Json = False,
) -> None:
    """Compare pixels, token ids, features, logits and greedy tokens with transformers; exit code 1 when a stage differs."""
    options.quiet()
    from llavakit.checkpoint import places
    from llavakit.checkpoint import verify as room
    from llavakit.types import Image

    folder = places.find(model, revision=revision, allow_pickle=allow_pickle)
    stages = room.verify(folder, Image(image) if image else None, question, allow_pickle=allow_pickle, base=base, tower=tower)
    first = next((stage.name for stage in stages if not stage.same), None)
    if as_json:
        rows = [{"stage": s.name, "same": s.same, "difference": s.difference if math.isfinite(s.difference) else None} for s in stages]
        print(json.dumps({"model": str(model or "tiny"), "same": first is None, "first_difference": first, "stages": rows}, indent=1))
    else:
        for stage in stages:
            word = "same" if stage.same else "DIFFERS"
            print(f"{stage.name:14}{word:9}{stage.difference:10.2e}  (allowed {stage.allowed:.2e})  {stage.what}")
        print("equal to transformers in every stage" if first is None else f"the first difference is in: {first}")
    if first is not None:
        raise Exit(1)
