"""The chat page: its files, and the few questions that only it asks. What it says to the model goes through ``/v1`` like any client's.

    GET  /                       the page
    GET  /web/NAME               its styles, modules and pictures: from a table made at the start; no path is ever opened
    GET  /web/api/settings       what this server allows, for the page to say and to hold to
    POST /web/api/see            a conversation in numbers: tokens, views, tiles, padding (``seen``)
    POST /web/api/attention      where the model looked when it wrote a word (``sight``)
    POST /web/api/vote           a line for the log; 404 unless the server was started with one

``api.build(service, routes(service, models, settings))`` guards them as all others. Bodies are read, and pictures budgeted, as those of
``/v1/chat/completions`` are, so what is shown is what would be computed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llavakit.serve import schema
from llavakit.serve.api import check_content_type, pictures
from llavakit.serve.faults import busy, refuse
from llavakit.serve.service import Service
from llavakit.types import Conversation, Sampling

if TYPE_CHECKING:
    from llavakit.model.llava import Llava
    from llavakit.processor import Processor

TYPES: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
KINDS = ("up", "down", "flag", "none")
MAX_VOTE = 1 << 18  # bytes
WAITING = 4  # looks that may wait while one is computed


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A model as the page sees it. Without ``model`` there is no attention to show."""

    processor: Processor
    model: Llava | None = None


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """``votes``: a file that votes and flags are appended to; None: the page has no such buttons. ``sampling``: what it begins with."""

    votes: Path | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256))


def routes(service: Service, models: Mapping[str, Shown], settings: PageSettings | None = None) -> list[Route]:
    """The page's routes. ``models``: by the names of ``service.engines``; asked at every request, so it may be filled later."""
    desk, assets = Desk(service=service, models=models, settings=settings or PageSettings()), read_assets()
    return [
        Route("/", partial(send_asset, assets, "index.html"), methods=["GET"]),
        Route("/web/api/settings", desk.allowed, methods=["GET"]),
        Route("/web/api/see", desk.see, methods=["POST"]),
        Route("/web/api/attention", desk.attention, methods=["POST"]),
        Route("/web/api/vote", desk.vote, methods=["POST"]),
        Route("/web/{name:path}", partial(send_asset, assets, None), methods=["GET"]),
    ]


@dataclass(frozen=True)
class Asset:
    """A file of the page in memory."""

    body: bytes
    kind: str

    @cached_property
    def tag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:24]}"'


def read_assets() -> dict[str, Asset]:
    """Every file of ``serve/web`` and the shipped pictures, by name."""
    found = {}
    for folder, prefix in ((files("llavakit") / "serve" / "web", ""), (files("llavakit") / "pictures", "pictures/")):
        for entry in folder.iterdir():
            kind = TYPES.get(Path(entry.name).suffix)
            if kind is not None:
                found[prefix + entry.name] = Asset(entry.read_bytes(), kind)
    return found


async def send_asset(assets: Mapping[str, Asset], name: str | None, request: Request) -> Response:
    """One file, or 304 when the browser has this very one."""
    asset = assets.get(name or request.path_params["name"])
    if asset is None:
        raise refuse("there is no such file", code="not_found", status=404)
    headers = {**HEADERS, "ETag": asset.tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.kind, headers=headers)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Answers the page's own questions. Looks are computed one at a time, in one thread."""

    service: Service
    models: Mapping[str, Shown]
    settings: PageSettings
    looker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="look"))
    looks: set[object] = field(default_factory=set)

    async def allowed(self, request: Request) -> Response:
        """What this server allows."""
        self.service.check_ready()
        limits, sampling = self.service.settings.limits, self.settings.sampling
        of_one = [shown.processor.limits for shown in self.models.values()]
        questions = json.loads((files("llavakit") / "pictures" / "questions.json").read_text(encoding="utf-8"))
        examples = {row["image"]: row["question"] for row in reversed(questions)}
        return answer(
            {
                "models": [
                    {"id": name, "context": self.service.engines[name].context, "attention": one.model is not None}
                    for name, one in self.models.items()
                ],
                "votes": self.settings.votes is not None,
                "max_body": limits.body,
                "max_images": limits.images,
                "max_image_bytes": min([limits.bytes, *(one.max_bytes for one in of_one)]),
                "max_image_pixels": min([limits.pixels, *(one.max_pixels for one in of_one)]),
                "max_image_side": min((one.max_side for one in of_one), default=1),
                "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens},
                "examples": [{"picture": f"web/pictures/{name}", "question": examples[name]} for name in reversed(examples)],
            }
        )

    async def see(self, request: Request) -> Response:
        """A conversation in numbers and places."""
        from llavakit.serve import seen

        shown, conversation, body = await self._asked(request)
        context = self.service.engine(body["model"]).context
        found = await asyncio.to_thread(seen.see, conversation, shown.processor, context=context)
        return answer(asdict(found))

    async def attention(self, request: Request) -> Response:
        """Where the model looked when it wrote a word of the last reply."""
        from llavakit.model.teams import disband
        from llavakit.serve import sight

        shown, conversation, body = await self._asked(request)
        start, end, layers = word_of(body)
        model = shown.model
        if model is None:
            raise refuse("this server shows no attention", code="unsupported_parameter", where="model")
        if len(self.looks) > WAITING:
            raise busy("several people are looking at attention already", code="overloaded")

        def work() -> sight.Look:
            try:
                return sight.look(model, shown.processor, conversation, start=start, end=end, layers=layers)
            finally:
                disband()  # the engine's thread has one

        mine = object()
        self.looks.add(mine)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.looker, work)
        finally:
            self.looks.discard(mine)
        return answer(asdict(found))

    async def vote(self, request: Request) -> Response:
        """One line for the log: what was said and the vote; never a picture."""
        if self.settings.votes is None:
            raise refuse("this server keeps no votes", code="not_found", remedy="start it with a file for them", status=404)
        check_content_type(request)
        body = await request.body()
        if len(body) > MAX_VOTE:
            raise refuse(f"a vote of more than {MAX_VOTE:,} bytes", code="body_too_large", status=413)
        value = schema.parse(body)
        if value.get("kind") not in KINDS:
            raise refuse("this is no vote", code="bad_parameter", where="kind", remedy=f"use one of {', '.join(KINDS)}")
        names = ("kind", "model", "reply_id", "messages", "parameters")
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds")} | {name: value[name] for name in names if name in value}
        await asyncio.to_thread(append, self.settings.votes, json.dumps(line))
        return answer({"kept": True})

    async def _asked(self, request: Request) -> tuple[Shown, Conversation, dict[str, Any]]:
        """The model and the conversation that a request is about, read as a chat request is."""
        self.service.check_ready()
        check_content_type(request)
        value = schema.parse(await request.body())
        asked = schema.read(value)
        shown = self.models.get(asked.model)
        if shown is None:
            served = ", ".join(sorted(self.models))
            raise refuse("no such model is shown here", code="model_not_found", where="model", remedy=f"shown: {served}", status=404)
        return shown, schema.ask(asked, await pictures(self.service, asked)).conversation, value


def word_of(body: Mapping[str, Any]) -> tuple[int, int, tuple[int, int] | None]:
    """Start, end and layers of a question about attention."""
    start, end, layers = body.get("start"), body.get("end"), body.get("layers")
    if type(start) is not int or type(end) is not int:
        raise refuse("a word is given by its first character and the one behind it", code="bad_parameter", where="start")
    if layers is None:
        return start, end, None
    if not (isinstance(layers, list) and len(layers) == 2 and all(type(number) is int for number in layers)):
        raise refuse("layers are given by the first and the last, from 1", code="bad_parameter", where="layers")
    return start, end, (layers[0], layers[1])


def append(path: Path, line: str) -> None:
    """One line in one write, so that lines of several servers do not mix."""
    with path.open("ab", buffering=0) as stream:
        stream.write(line.encode() + b"\n")


def answer(value: Any) -> Response:
    return JSONResponse(value, headers={**HEADERS, "Cache-Control": "no-store"})
