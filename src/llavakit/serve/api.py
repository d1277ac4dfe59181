"""OpenAI's HTTP over engines: ``build`` makes the application.

    POST /v1/chat/completions    GET /v1/models  /v1/models/{id}    GET /health /ready /version /metrics    and the chat page's routes

    body --schema--> request --pictures--> Ask --Engine.submit--> Reply --stream--> JSON | events

Every error has one shape (``faults``), every request one line in the log (``guard``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute

from llavakit import __version__
from llavakit.errors import ImageError, LlavaError
from llavakit.serve import schema
from llavakit.serve.faults import Fault, busy, fault, refuse
from llavakit.serve.fetch import fetch
from llavakit.serve.guard import Guard, Record, note
from llavakit.serve.limits import check_bytes, check_count, data_url_bytes, within_budget
from llavakit.serve.metrics import CONTENT_TYPE
from llavakit.serve.schema import ChatRequest
from llavakit.serve.service import Service
from llavakit.serve.stream import Events, Told, chunks, while_connected, whole
from llavakit.types import decode_data_url

_ERROR = {
    "description": "What went wrong, and what to do",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": _ERROR, "503": _ERROR}


def build(service: Service, routes: Sequence[BaseRoute] = ()) -> FastAPI:
    """The application. ``routes`` are further ones, such as the chat page's; they are guarded as all others are."""
    app = FastAPI(title="llavakit", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, responses=RESPONSES)
    app.state.service = service
    app.add_exception_handler(LlavaError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    _add_state(app, service)
    _add_models(app, service)
    _add_chat(app, service)
    app.router.routes.extend(routes)
    app.add_middleware(Guard, service=service)
    return app


def _add_chat(app: FastAPI, service: Service) -> None:
    reading = {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(ChatRequest.model_json_schema())}}}}

    streamed = {"text/event-stream": {"schema": {"type": "string"}}}

    @app.post("/v1/chat/completions", openapi_extra=reading, responses={200: {"content": streamed}})
    async def chat_completions(request: Request) -> Response:
        """A reply to a conversation about pictures."""
        service.check_room()
        record: Record = request.state.record
        check_content_type(request)
        return await while_connected(_chat(service, await request.body(), record), request.receive)


async def _chat(service: Service, body: bytes, record: Record) -> Response:
    request = schema.read(schema.parse(body))
    with placed(request):
        told = await begin(service, request, record)
        if not request.stream:
            return JSONResponse(await whole(told))
        usage = bool(request.stream_options and request.stream_options.include_usage)
        rest = chunks(told, include_usage=usage, ping=service.settings.ping)
        return Events(await anext(rest), rest)


async def begin(service: Service, request: ChatRequest, record: Record) -> Told:
    """Ask the engine. Raises whatever makes the request impossible."""
    if unknown := schema.unknown(request):
        record.notes["ignored"] = ",".join(name[:40] for name in unknown[:8])
    with service.coming(request.model) as engine:
        record.notes["model"] = request.model
        ask = schema.ask(request, await pictures(service, request))
    return Told(await engine.submit(ask), request.model, service.metrics, record.begun, record.notes)


async def pictures(service: Service, request: ChatRequest) -> list[bytes]:
    """The bytes of every picture, within the budgets; no pixel has been decoded."""
    limits, wanted = service.settings.limits, list(request.pictures)
    check_count(len(wanted), limits)
    check_bytes((data_url_bytes(picture.url) for _, picture in wanted if picture.url.startswith("data:")), limits)
    found: list[tuple[str, bytes]] = []
    for where, picture in wanted:
        if picture.url.startswith("data:"):
            found.append((where, decode_data_url(picture.url, where=where)))
        else:
            left = limits.bytes - sum(len(data) for _, data in found)
            found.append((where, await fetch(picture.url, service.settings.remote, where=where, most=left)))
    await within_budget(found, limits)
    return [data for _, data in found]


@contextmanager
def placed(request: ChatRequest) -> Iterator[None]:
    """The engine numbers pictures; a client knows its fields."""
    try:
        yield
    except ImageError as error:
        places = {f"images[{index}]": where for index, (where, _) in enumerate(request.pictures)}
        raise ImageError(error.what, code=error.code, where=places.get(error.where, error.where), remedy=error.remedy) from error


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        engine = service.engines[name]
        return {
            "id": name, "object": "model", "created": service.started, "owned_by": "llavakit", "root": engine.model_id,
            "max_model_len": engine.context,
        }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The models that are served."""
        service.check_ready()
        return {"object": "list", "data": [card(name) for name in service.engines]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        service.engine(model)
        return card(model)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Alive: also while the model is being loaded."""
        if service.state == "failed":
            return _told(fault(busy("an engine has died", code="engine_dead")))
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """Requests are taken."""
        service.check_ready()
        return {"status": "ready"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Which llavakit this is."""
        return {"version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        stats = {name: engine.stats() for name, engine in service.engines.items()}
        return PlainTextResponse(service.metrics.text(stats), media_type=CONTENT_TYPE)


def check_content_type(request: Request) -> None:
    """JSON only: a page elsewhere can make a browser post a form or plain text to us, but not JSON."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json":
        raise refuse("the body's type is not application/json", code="invalid_json", remedy="send 'Content-Type: application/json'")


async def _on_error(request: Request, error: Exception) -> Response:
    note(request.state.record, error)
    return _told(fault(error))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        found = Fault(status=404, message="there is nothing at this address. /openapi.json lists what there is", code="not_found")
    elif error.status_code == 405:
        found = Fault(
            status=405, message="this address is not called in this way", code="method_not_allowed", headers=dict(error.headers or {})
        )
    else:
        found = Fault(status=error.status_code, message=str(error.detail), code="http_error")
    return _told(found)


def _told(found: Fault) -> Response:
    return JSONResponse(found.body, status_code=found.status, headers=found.headers)


def _inlined(given: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, as it stands inside another document."""
    named = given.get("$defs", {})

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return walk(named[value["$ref"].rpartition("/")[2]])
        return {name: walk(inner) for name, inner in value.items() if name != "$defs"}

    walked = walk(given)
    assert isinstance(walked, dict)
    return walked
