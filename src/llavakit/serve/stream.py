"""A reply under way as what a client reads: one JSON object, or server-sent events as they come.

    Reply --Piece--> data: {"choices": [{"delta": {"content": ...}}]}   ... --End--> finish_reason, usage, [DONE]
          nothing for a while --> ": ping"                                  error --> data: {"error": ...}, [DONE]

A client that has gone is given up at once (S1). One that reads too slowly is cut off by the connection (``server.Connection``, S3): it has
gone then too.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from llavakit.errors import LlavaError
from llavakit.serve.faults import busy, fault
from llavakit.serve.metrics import Metrics
from llavakit.serve.protocol import End, Piece, Reply

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass
class Told:
    """One reply as it is told: its identity on the wire, what was measured, and how it ended."""

    reply: Reply
    model: str
    metrics: Metrics
    begun: float
    notes: dict[str, object]
    "For the log's line."
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    end: End | None = None
    _last: float | None = None

    async def events(self) -> AsyncIterator[Piece | End]:
        """The reply's pieces and its end. A reply that breaks off has an end too: one of error."""
        try:
            async for event in self.reply:
                self._measure(event)
                yield event
                if isinstance(event, End):
                    return
            cut = LlavaError("the reply broke off", code="cut")
            event = End(finish="error", prompt_tokens=self.reply.prompt_tokens, reply_tokens=0, error=cut)
            self._measure(event)
            yield event
        finally:
            self.reply.cancel()  # of no effect where it has ended
            if self.end is None:
                self.metrics.finished(self.model, "cancelled")

    def _measure(self, event: Piece | End) -> None:
        now = time.perf_counter()
        if isinstance(event, Piece):
            if self._last is None:
                self.metrics.observe("time_to_first_token_seconds", self.model, now - self.begun)
            elif event.tokens:
                self.metrics.observe("inter_token_latency_seconds", self.model, (now - self._last) / event.tokens, event.tokens)
            self._last = now
            return
        self.end = event
        self.notes |= {"prompt": event.prompt_tokens, "cached": event.cached_tokens, "reply": event.reply_tokens, "finish": event.finish}
        self.metrics.finished(self.model, event.finish)
        self.metrics.observe("e2e_request_latency_seconds", self.model, now - self.begun)
        self.metrics.observe("request_prompt_tokens", self.model, event.prompt_tokens)
        self.metrics.observe("request_generation_tokens", self.model, event.reply_tokens)

    def usage(self, end: End) -> dict[str, Any]:
        images = self.reply.image_tokens
        return {
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.reply_tokens,
            "total_tokens": end.prompt_tokens + end.reply_tokens,
            "prompt_tokens_details": {
                "text_tokens": end.prompt_tokens - images,
                "image_tokens": images,
                "cached_tokens": end.cached_tokens,
            },
        }

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def failure(end: End) -> LlavaError | None:
    """Why a reply has no good end, as an error for the client, or None."""
    if end.finish in ("stop", "length"):
        return None
    if end.finish == "cancelled":
        return busy("the server gave the reply up", code="shutting_down")
    return end.error or LlavaError("the reply failed", code="internal_error")


async def whole(told: Told) -> dict[str, Any]:
    """The reply as one object. Raises what made it fail."""
    words = [event.text async for event in told.events() if isinstance(event, Piece)]
    assert told.end is not None, "events end with an End"
    if error := failure(told.end):
        raise error
    message = {"role": "assistant", "content": "".join(words), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": told.end.finish}
    return told.head("chat.completion") | {"choices": [choice], "usage": told.usage(told.end)}


async def chunks(told: Told, *, include_usage: bool, ping: float) -> AsyncIterator[bytes]:
    """The reply as server-sent events. What fails before the first piece is raised, so that it gets a status of its own."""
    head = told.head("chat.completion.chunk")
    tail = {"usage": None} if include_usage else {}

    def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
        return _data(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]} | tail)

    sent = spoken = False
    async for event in _pinged(told.events(), ping):
        if isinstance(event, End) and (error := failure(event)):
            if not sent:
                raise error
            yield _data(fault(error).body)
            yield DONE
            return
        sent = True
        if event is None:
            yield PING
            continue
        if not spoken:
            spoken = True
            yield chunk({"role": "assistant", "content": ""})
        if isinstance(event, Piece):
            if event.text:
                yield chunk({"content": event.text})
            continue
        yield chunk({}, event.finish)
        if include_usage:
            yield _data(head | {"choices": [], "usage": told.usage(event)})
        yield DONE


async def _pinged(events: AsyncIterator[Piece | End], every: float) -> AsyncIterator[Piece | End | None]:
    """The events, and None whenever none has come for so many seconds."""
    following: asyncio.Task[Piece | End] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))  # type: ignore[arg-type]
            done, _ = await asyncio.wait((following,), timeout=every)
            if not done:
                yield None
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield event
    finally:
        if following is not None:
            following.cancel()
            await asyncio.wait((following,))
        await events.aclose()  # type: ignore[attr-defined]


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


async def while_connected(work: Awaitable[T], receive: Callable[[], Awaitable[Message]]) -> T:
    """Do the work and give it up when the client goes. Raises ClientGoneError then."""
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGoneError
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.wait((doing, gone))


class ClientGoneError(Exception):
    """Nobody waits for this answer any more."""


async def _gone(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Response):
    """A response of server-sent events that ends with its reader."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], headers: Sequence[tuple[bytes, bytes]] = HEADERS) -> None:
        self.first, self.rest, self.background = first, rest, None
        self.head = {"type": "http.response.start", "status": 200, "headers": list(headers)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(self._send(send), receive)

    async def _send(self, send: Send) -> None:
        try:
            await send(self.head)
            await send({"type": "http.response.body", "body": self.first, "more_body": True})
            async for data in self.rest:
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self.rest.aclose()  # type: ignore[attr-defined]
