"""The original demo's worker contract on the same engines, for clients written for it. Off by default; no controller is called or kept.

    POST /worker_generate_stream   {model, prompt, images: [base64], ...} --> {"text": prompt + reply so far, "error_code": 0}\\0 ...
    POST /worker_get_status        --> {model_names, speed, queue_length}

Such a prompt is finished text. It is read back into a conversation by the formats that we know (``conversation``), and counts as understood
when writing it anew gives the same text; the model is then asked in its own format. Errors come as text with ``error_code`` 1, status 200.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from fastapi import Request
from pydantic import ValidationError
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llavakit.errors import ContextError, LlavaError, PromptError
from llavakit.prompts import TEMPLATES, Template, spelled
from llavakit.serve import schema
from llavakit.serve.api import check_content_type
from llavakit.serve.faults import fault, refuse
from llavakit.serve.guard import Record, note
from llavakit.serve.limits import bare_base64, within_budget
from llavakit.serve.protocol import Ask, Piece
from llavakit.serve.service import Service
from llavakit.serve.stream import Events, Told, failure, while_connected
from llavakit.types import IMAGE_MARKER, Conversation, Image, Message, Part, Sampling, Text, assistant, system

MOST = 1024  # tokens of a reply, as the original allows
OwnFormat = Callable[[str], Template]
HEADERS = ((b"content-type", b"application/octet-stream"), (b"cache-control", b"no-cache"))
GREEDY = 0.001  # temperatures up to this one mean 0


class WorkerRequest(schema.Body):
    """``POST /worker_generate_stream``."""

    prompt: str
    model: str | None = None
    images: list[str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: str | None = None


def routes(service: Service, own_format: OwnFormat) -> list[Route]:
    """Further routes for ``api.build``. ``own_format``: the prompt format of a model that is served."""

    async def generate(request: Request) -> Response:
        check_content_type(request)
        record: Record = request.state.record
        service.check_room()
        return await while_connected(_generate(service, own_format, await request.body(), record), request.receive)

    async def status(request: Request) -> Response:
        service.check_ready()
        stats = [engine.stats() for engine in service.engines.values()]
        queue = sum(one.running + one.waiting for one in stats)
        return JSONResponse({"model_names": list(service.engines), "speed": 1, "queue_length": queue})

    return [
        Route("/worker_generate_stream", generate, methods=["POST"]),
        Route("/worker_get_status", status, methods=["POST"]),
    ]


async def _generate(service: Service, own_format: OwnFormat, body: bytes, record: Record) -> Response:
    value = schema.parse(body)
    try:
        asked = WorkerRequest.model_validate(value)
    except ValidationError as error:
        raise schema.mistyped(error) from None
    try:
        told = await _begin(service, own_format, asked, record)
    except ContextError as error:
        return Events(_chunk(f"{asked.prompt} {error.what}.", 0), _nothing(), HEADERS)
    except LlavaError as error:
        note(record, error)
        return Events(_chunk(fault(error).message, 1), _nothing(), HEADERS)
    return Events(_chunk(asked.prompt, 0), _chunks(told, asked.prompt), HEADERS)


async def _begin(service: Service, own_format: OwnFormat, asked: WorkerRequest, record: Record) -> Told:
    name = next(iter(service.engines)) if len(service.engines) == 1 else asked.model or ""
    with service.coming(name) as engine:
        record.notes["model"] = name
        data = [(f"images[{index}]", bare_base64(text, f"images[{index}]")) for index, text in enumerate(asked.images or ())]
        await within_budget(data, service.settings.limits)
    sampling = Sampling(
        temperature=0.0 if 0 <= asked.temperature <= GREEDY else asked.temperature,
        top_p=asked.top_p,
        max_new_tokens=min(asked.max_new_tokens, MOST),
        stop=(asked.stop,) if asked.stop else (),
    )
    talk = conversation(
        asked.prompt,
        [Image(picture) for _, picture in data],
        [one for one in (own_format(name), *TEMPLATES.values()) if one.images == "inline"],
    )
    reply = await engine.submit(Ask(conversation=talk, sampling=sampling, fitted=True))
    return Told(reply, name, service.metrics, record.begun, record.notes)


async def _chunks(told: Told, prompt: str) -> AsyncIterator[bytes]:
    text = prompt
    async for event in told.events():
        if isinstance(event, Piece):
            text += event.text
            yield _chunk(text, 0)
        elif error := failure(event):
            yield _chunk(fault(error).message, 1)


async def _nothing() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for data in nothing:
        yield data


def _chunk(text: str, code: int) -> bytes:
    return json.dumps({"text": text, "error_code": code}).encode() + b"\0"


def conversation(prompt: str, images: Sequence[Image], templates: Sequence[Template]) -> Conversation:
    """The open conversation that one of the formats writes as this prompt. Raises PromptError where there is none."""
    wanted = prompt.count(IMAGE_MARKER)
    if wanted != len(images):
        what = f"{wanted} {IMAGE_MARKER} in the prompt but {len(images)} images"
        raise PromptError(what, code="image_count", where="images", remedy=f"write {IMAGE_MARKER} once for each image")
    for template in templates:
        try:
            found = _read(prompt, template, iter(images))
            if found.open and spelled(template.render(found)).strip() == prompt.strip():
                return found
        except (PromptError, ValueError):
            continue
    remedy = "end it where the assistant begins to speak, or use /v1/chat/completions"
    raise refuse("the prompt has none of the formats that are known here", code="unknown_prompt_format", where="prompt", remedy=remedy)


def _read(prompt: str, template: Template, images: Iterator[Image]) -> Conversation:
    """A prompt taken apart at a format's marks. Raises ValueError where one is missing."""
    reply_start, end = template.user_end + template.reply_start, template.reply_end + template.end
    before, rest = _cut(prompt.rstrip() + reply_start[len(reply_start.rstrip()) :], template.user_start)
    if template.system_inside and rest.startswith(template.system_start):
        before, rest = _cut(rest, template.system_end)
        before += template.system_end
    said = before.removeprefix(template.system_start).removesuffix(template.system_end)
    messages = [] if said == template.system else [system(said)]
    while True:
        question, rest = _cut(rest, reply_start)
        messages.append(Message("user", tuple(_parts(question, images))))
        if not rest:
            return Conversation(tuple(messages))
        reply, rest = _cut(rest.removeprefix(template.reply_space), end)
        messages.append(assistant(reply))
        _, rest = _cut(rest, template.glue + template.user_start)


def _parts(question: str, images: Iterator[Image]) -> Iterator[Part]:
    for index, words in enumerate(question.split(IMAGE_MARKER)):
        if index:
            yield next(images)
        if words:
            yield Text(words)


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(mark)
    return before, after
