"""``llava batch``: a file of requests answered into a file of responses, many at once, going on after a break."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from llavakit.cli import options
from llavakit.cli.serve import AllowHost, Bounds, Names, RemoteImages, Room, engine, named
from llavakit.errors import ConfigError

if TYPE_CHECKING:
    from llavakit.serve.batch import Counts

EXAMPLES = """Examples:

  llava batch requests.jsonl responses.jsonl
  llava batch requests.jsonl responses.jsonl --model my-llava --served-name llava-1.5 --at-once 64
A line of requests.jsonl, as OpenAI's batches and vllm run-batch have it:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "tiny", "messages": [...]}}
"""
EVERY = 5.0  # seconds between lines that say how far it has come


@options.spread
def batch(
    requests: Annotated[Path, Argument(metavar="REQUESTS", help="One request a line.")],
    responses: Annotated[Path, Argument(metavar="RESPONSES", help="One response a line; what is in it already is not asked again.")],
    served_name: Names = None,
    allow_host: AllowHost = None,
    remote_images: RemoteImages = False,
    at_once: Annotated[int, Option("--at-once", min=1, max=4096, help="Requests under way at once, at most.")] = 32,
    *,
    bounds: Bounds,
    room: Room,
    loading: options.Loading,
) -> None:
    """Answer a file of requests."""
    wanted = named(None, served_name, loading)
    for path in (requests, responses.parent):
        if not path.exists():
            raise ConfigError("there is no such file or folder", code="bad_value", where=str(path), remedy="check the path")
    from llavakit.serve.batch import answer_all
    from llavakit.serve.fetch import Remote
    from llavakit.serve.service import Service, Settings

    hosts = ("*",) if remote_images else tuple(allow_host or ())
    settings = Settings(limits=bounds.limits(), remote=Remote(hosts=hosts) if hosts else None)
    service = Service({name: engine(one, name, room) for name, one in wanted.items()}, settings)
    counts = asyncio.run(answer_all(service, requests, responses, at_once=at_once, tell=_teller()))
    known = f", {counts.known:,} known before" if counts.known else ""
    print(f"batch: {counts.good:,} answered, {counts.bad:,} in error{known}", file=sys.stderr)
    if counts.bad and not counts.good:
        raise Exit(1)


def _teller() -> Callable[[Counts], None]:
    """A plain line now and then."""
    begun = said = time.monotonic()

    def tell(counts: Counts) -> None:
        nonlocal said
        now, done = time.monotonic(), counts.good + counts.bad
        if now - said >= EVERY:
            said = now
            print(f"batch: {done:,} done, {done / (now - begun):.1f}/s", file=sys.stderr, flush=True)

    return tell
