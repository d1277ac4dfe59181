"""The chat page: its files, and the few questions that only it asks. What it says to the model goes through ``/v1`` like any client's.

    GET  /                       the page                         open to all: it holds no secret, and asks for the key itself
    GET  /web/NAME               its styles, modules, pictures    from a table made at the start; no path is ever opened
    GET  /web/api/settings       what this server allows
    POST /web/api/see            a conversation in numbers: tokens, views, tiles, padding (``seen``)
    POST /web/api/attention      where the model looked when it wrote a word (``sight``)
    POST /web/api/vote           a line for the log; 404 unless the server was started with one

``routes`` is all that a server needs; ``is_open`` tells its guard which paths need no key.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llavakit.errors import BusyError, ConfigError, LlavaError, PromptError
from llavakit.types import Conversation, Image, Message, Sampling, Text

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
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
KINDS = ("up", "down", "flag", "none")
MAX_LINE = 1 << 18  # bytes of one vote
WAITING = 4  # looks that may wait for the one being computed


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A model as the page sees it. Without ``model`` there is no attention to show."""

    processor: Processor
    context: int
    model: Llava | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the page may do. ``votes``: a file that votes and flags are appended to; None: there are no such buttons.

    ``sampling``: what the page begins with. ``max_body``: bytes of a request, as everywhere on this server.
    """

    votes: Path | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=256))
    max_body: int = 1 << 26
    max_images: int = 32


def is_open(path: str) -> bool:
    """Whether a path of the page needs no key: its files do not, its questions do."""
    return path == "/" or (path.startswith("/web/") and not path.startswith("/web/api/"))


def routes(models: Mapping[str, Shown], settings: Settings) -> list[Route]:
    """The page's routes, for any Starlette or FastAPI router. ``models``: by the name that ``/v1/models`` gives them."""
    desk = Desk(models=models, settings=settings)
    assets = read_assets()
    return [
        Route("/", partial(send_asset, assets, "index.html"), methods=["GET"], name="page"),
        Route("/web/api/settings", told(desk.settings_), methods=["GET"]),
        Route("/web/api/see", told(desk.see), methods=["POST"]),
        Route("/web/api/attention", told(desk.attention), methods=["POST"]),
        Route("/web/api/vote", told(desk.vote), methods=["POST"]),
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
        return failed(ConfigError("there is no such file", code="not_found", where=request.url.path), status=404)
    headers = {**HEADERS, "ETag": asset.tag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == asset.tag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.kind, headers=headers)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Answers the page's own questions. Looks are computed one at a time, in one thread."""

    models: Mapping[str, Shown]
    settings: Settings
    looker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="look"))
    waiting: list[None] = field(default_factory=list)

    async def settings_(self, request: Request) -> Response:
        """What this server allows, for the page to say and to hold to."""
        limits = next(iter(self.models.values())).processor.limits
        sampling = self.settings.sampling
        questions = json.loads((files("llavakit") / "pictures" / "questions.json").read_text(encoding="utf-8"))
        examples = {row["image"]: row["question"] for row in reversed(questions)}
        return answer(
            {
                "models": [{"id": name, "context": one.context, "attention": one.model is not None} for name, one in self.models.items()],
                "votes": self.settings.votes is not None,
                "max_body": self.settings.max_body,
                "max_images": self.settings.max_images,
                "max_image_bytes": limits.max_bytes,
                "max_image_pixels": limits.max_pixels,
                "max_image_side": limits.max_side,
                "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens},
                "examples": [{"picture": f"web/pictures/{name}", "question": examples[name]} for name in reversed(examples)],
            }
        )

    async def see(self, request: Request) -> Response:
        """A conversation in numbers and places."""
        from llavakit.serve import seen

        shown, conversation, _ = await self._asked(request)
        found = await asyncio.to_thread(seen.see, conversation, shown.processor, context=shown.context)
        return answer(asdict(found))

    async def attention(self, request: Request) -> Response:
        """Where the model looked when it wrote a word of the last reply."""
        from llavakit.serve import sight

        shown, conversation, body = await self._asked(request)
        start, end, layers = word_of(body)
        if shown.model is None:
            raise ConfigError("this server shows no attention", code="unsupported_parameter", where="model")
        if len(self.waiting) >= WAITING:
            raise BusyError("several people are looking at attention already", code="overloaded", remedy="try again in a moment")
        work = partial(sight.look, shown.model, shown.processor, conversation, start=start, end=end, layers=layers)
        self.waiting.append(None)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.looker, work)
        finally:
            self.waiting.pop()
        return answer(asdict(found))

    async def vote(self, request: Request) -> Response:
        """One line for the log: what was said, the vote, and the pictures' digests; never the pictures."""
        if self.settings.votes is None:
            raise ConfigError("this server keeps no votes", code="not_found", remedy="start it with a file for them")
        body = await read_json(request, MAX_LINE)
        if body.get("kind") not in KINDS:
            raise ConfigError(f"{body.get('kind')!r:.40} is no vote", code="bad_parameter", where="kind", remedy=f"use one of {KINDS}")
        names = ("id", "kind", "model", "reply_id", "note", "messages", "parameters", "images")
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds")} | {name: body[name] for name in names if name in body}
        await asyncio.to_thread(append, self.settings.votes, json.dumps(line))
        return answer({"kept": True})

    async def _asked(self, request: Request) -> tuple[Shown, Conversation, dict[str, Any]]:
        body = await read_json(request, self.settings.max_body)
        shown = self.models.get(str(body.get("model")))
        if shown is None:
            names = ", ".join(self.models)
            raise ConfigError(f"there is no model {body.get('model')!r:.80}", code="model_not_found", where="model", remedy=f"use {names}")
        conversation = await asyncio.to_thread(conversation_of, body.get("messages"))
        if len(conversation.images) > self.settings.max_images:
            raise PromptError(f"{len(conversation.images)} pictures where {self.settings.max_images} are allowed", code="too_many_images")
        return shown, conversation, body


def conversation_of(messages: Any) -> Conversation:
    """OpenAI's messages; words that follow a picture stand on their own line, as LLaVA was trained (spec 3.4)."""
    try:
        conversation = Conversation.from_openai(messages)
    except (KeyError, TypeError, AttributeError) as error:
        raise PromptError("these are no messages", code="bad_content", where="messages", remedy="send role and content") from error
    return Conversation(tuple(_on_own_line(message) for message in conversation.messages))


def _on_own_line(message: Message) -> Message:
    parts = list(message.parts)
    for at, (before, part) in enumerate(zip(message.parts, message.parts[1:], strict=False), 1):
        if isinstance(before, Image) and isinstance(part, Text) and part.text and not part.text.startswith("\n"):
            parts[at] = Text("\n" + part.text)
    return Message(message.role, tuple(parts))


def word_of(body: Mapping[str, Any]) -> tuple[int, int, tuple[int, int] | None]:
    """Start, end and layers of a question about attention."""
    start, end, layers = body.get("start"), body.get("end"), body.get("layers")
    if type(start) is not int or type(end) is not int:
        raise ConfigError("a word is given by its first character and the one behind it", code="bad_parameter", where="start")
    if layers is None:
        return start, end, None
    if not (isinstance(layers, list) and len(layers) == 2 and all(type(number) is int for number in layers)):
        raise ConfigError("layers are given by the first and the last, from 1", code="bad_parameter", where="layers")
    return start, end, (layers[0], layers[1])


def append(path: Path, line: str) -> None:
    """One line in one write, so that lines of several servers do not mix."""
    with path.open("ab") as stream:
        stream.write(line.encode() + b"\n")


async def read_json(request: Request, limit: int) -> dict[str, Any]:
    """The body, which must be a JSON object of at most ``limit`` bytes from a page of this server (or from no page at all)."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise ConfigError("the body is not said to be JSON", code="invalid_json", where="content-type", remedy="send application/json")
    origin = request.headers.get("origin")
    if origin is not None and origin.split("://")[-1] != request.headers.get("host"):
        raise ConfigError("another site's page may not ask this", code="forbidden", where="origin")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise ConfigError(f"more than {limit:,} bytes", code="body_too_large", where="body", remedy="send fewer or smaller pictures")
        chunks.append(chunk)
    try:
        body = json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise ConfigError("the body is no JSON", code="invalid_json", where="body") from error
    if not isinstance(body, dict):
        raise ConfigError("the body is no JSON object", code="invalid_json", where="body")
    return body


STATUS: Mapping[str, int] = {"not_found": 404, "model_not_found": 404, "body_too_large": 413, "forbidden": 403}


def told(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The same, but what is wrong on purpose is answered in OpenAI's shape."""

    async def answered(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=400)
        except LlavaError as error:
            return failed(error)

    return answered


def failed(error: LlavaError, *, status: int | None = None) -> Response:
    """An error in the one shape that all of this server's have."""
    busy = isinstance(error, BusyError)
    status = status or STATUS.get(error.code, 503 if busy else 400)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": str(error), "type": kind, "param": error.where or None, "code": error.code}}
    wait = {"Retry-After": str(max(1, round(error.retry_after)))} if isinstance(error, BusyError) else {}
    return JSONResponse(body, status, {**HEADERS, **wait})


def answer(value: Any) -> Response:
    return JSONResponse(value, headers={**HEADERS, "Cache-Control": "no-store"})
