"""``llava verify``: does a checkpoint compute here what it computes in transformers, or at an endpoint what it computes here?"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from llavakit.cli import options

if TYPE_CHECKING:
    from llavakit.assistant import Assistant
    from llavakit.serve.same import Compared, Row

EXAMPLES = """Examples:

  llava verify                                     (the built-in model)
  llava verify my-llava --image photo.jpg -q "What is this?"
  llava verify my-llava --api http://127.0.0.1:8000          (does that server answer as the checkpoint does here?)
"""


def verify(
    model: Annotated[str | None, Argument(metavar="MODEL", show_default=False, help="A folder, a built-in model or a Hub id.")] = None,
    image: Annotated[Path | None, Option("--image", metavar="FILE", help="The picture to ask about (default: a made one).")] = None,
    question: Annotated[str, Option("--question", "-q", metavar="TEXT", help="The question.")] = "What is in the picture?",
    api: Annotated[str | None, Option("--api", metavar="URL", help="Compare with a server of the same model instead.")] = None,
    served: Annotated[str | None, Option("--served", metavar="NAME", help="The model's name there (default: the first it lists).")] = None,
    key: Annotated[str, Option("--api-key-env", metavar="VARIABLE", help="The variable that holds the server's key.")] = "LLAVA_API_KEY",
    dtype: Annotated[str, Option("--dtype", help="With --api: our arithmetic, auto, float32, bfloat16 or float16.")] = "auto",
    allow_pickle: options.AllowPickle = False,
    revision: options.Revision = None,
    base: options.Base = None,
    tower: options.Tower = None,
    as_json: options.Json = False,
) -> None:
    """Compare pixels, token ids, features, logits and greedy tokens with transformers; exit code 1 when a stage differs.

    With --api, ask a server and this package the same questions and say what a difference means.
    """
    if api is not None:
        loading = options.Loading(model=model, revision=revision, base=base, tower=tower, dtype=dtype, allow_pickle=allow_pickle)
        found = against(api, loading.assistant(), name=served, key=os.environ.get(key))
        show(found, api, as_json=as_json)
        if not found.agrees:
            raise Exit(1)
        return
    _stages(model, image, question, allow_pickle, revision, base, tower, as_json)


def against(api: str, ours: Assistant, *, name: str | None, key: str | None) -> Compared:
    """A server and our own model, asked the same."""
    from llavakit.serve.endpoint import Endpoint
    from llavakit.serve.same import compare

    return compare(Endpoint(api, model=name, key=key).ask, ours)


def show(found: Compared, api: str, *, as_json: bool) -> None:
    """The rows and what they mean."""
    if as_json:
        rows = [_record(row) for row in found.rows]
        meanings = [vars(meaning) | {"rows": list(meaning.rows)} for meaning in found.meanings]
        print(json.dumps({"api": api, "agrees": found.agrees, "rows": rows, "meanings": meanings}, indent=1))
        return
    from llavakit.cli.border import harmless

    for row in found.rows:
        word = "same" if row.same else "refused" if row.refused else "near tie" if row.near else "DIFFERS"
        counts = f"{row.prompt} tokens" + ("" if row.counted else f", there {row.their_prompt}")
        more = "" if row.place is None else f"   from token {row.place}: {row.ours[:40]!r}, there {harmless(row.theirs[:40])!r}"
        print(f"{row.name:14}{word:10}{counts}{more}")
    for meaning in found.meanings:
        print(f"\n{harmless(meaning.what)}\n  in: {', '.join(meaning.rows)}\n  do: {meaning.remedy}")
    print(
        "\nthe server answers as the checkpoint does here" if found.agrees else "\nthe server does NOT answer as the checkpoint does here"
    )


def _record(row: Row) -> dict[str, Any]:
    return {
        "question": row.name, "same": row.same, "near_tie": row.near, "ours": row.ours, "theirs": row.theirs, "prompt_tokens": row.prompt,
        "their_prompt_tokens": row.their_prompt, "first_difference": row.place, "margin_nats": row.margin,
        "top_token_agreement": row.agreement, "refused": row.refused or None,
    }  # fmt: skip


def _stages(
    model: str | None, image: Path | None, question: str, allow_pickle: bool, revision: str | None, base: Path | None, tower: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """The comparison with transformers."""
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
