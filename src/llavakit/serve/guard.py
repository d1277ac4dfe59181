"""The outermost layer: what holds for every request, whatever its route.

    id -- host -- key -- [ route, with a body that is counted while it comes ] -- errors as JSON -- one line in the log

Pure ASGI, so that nothing is buffered. The log names ids, routes, numbers: never a header, a query, a prompt or a picture (S11, G10).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llavakit.errors import LlavaError, RequestError
from llavakit.serve.faults import MENDABLE, Fault, busy, fault, refuse
from llavakit.serve.service import Service
from llavakit.serve.stream import ClientGoneError

LOG = logging.getLogger("llavakit.serve")
OPEN = "/health"  # the one route that asks for no key: supervisors have none
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_UNPRINTABLE = re.compile(r"[^\x21-\x7e]")


@dataclass
class Record:
    """One request, for the log: routes add what they know."""

    id: str
    begun: float = field(default_factory=time.perf_counter)
    status: int = 0
    held: int = 0
    notes: dict[str, object] = field(default_factory=dict)


class Guard:
    """Around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self._key = None if service.settings.key is None else _digest(service.settings.key.encode())
        self._held = 0  # bytes of bodies in memory, of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # lifespan; nobody upgrades to anything here
            return
        headers = Headers(scope=scope)
        record = Record(_request_id(headers))
        scope.setdefault("state", {})["record"] = record
        try:
            with self.service.asking() if scope["method"] == "POST" else nullcontext():
                await self._answer(scope, headers, receive, send, record)
        finally:
            self._held -= record.held
            self._tell(scope, record)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, plain: Send, record: Record) -> None:
        body = _Body(self, record, headers, receive)
        send = _Sender(plain, record, body)
        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            await self.app(scope, body, send)
        except (ClientGoneError, ClientDisconnect):
            record.notes["gone"] = True
        except Exception as error:  # the last border: no route may end without an answer
            note(record, error)
            if record.status == 0:
                await send_fault(send, self._with_challenge(fault(error), headers))

    def hold(self, record: Record, count: int) -> None:
        """So many more bytes of a body are in memory. Raises BusyError where all bodies together are too many."""
        if self._held + count > self.service.settings.limits.bodies:
            raise busy("the server holds as many requests as it has memory for", code="overloaded")
        self._held += count
        record.held += count

    def _check_host(self, headers: Headers) -> None:
        allowed = self.service.settings.hosts
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if allowed and name not in allowed:
            remedy = "call it by the address it is bound to, or start it with --host-name"
            raise refuse("this server does not go by that name", code="host_not_allowed", status=403, remedy=remedy)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or path == OPEN:
            return
        if not hmac.compare_digest(_digest(_key_in(headers.get("authorization", ""))), self._key):
            remedy = "send it as 'Authorization: Bearer KEY'"
            raise refuse("the API key is missing or wrong", code="invalid_api_key", status=401, remedy=remedy)

    def _with_challenge(self, found: Fault, headers: Headers) -> Fault:
        if found.status == 401:  # a browser asks its user for the key (as the password of any name), a program reads the error
            scheme = 'Basic realm="llava", charset="UTF-8"' if "text/html" in headers.get("accept", "") else "Bearer"
            found.headers["www-authenticate"] = scheme
        return found

    def _tell(self, scope: Scope, record: Record) -> None:
        path = getattr(scope.get("route"), "path", None) or "other"
        self.service.metrics.responded(path, record.status)
        seconds = time.perf_counter() - record.begun
        notes = "".join(f" {name}={_harmless(value)}" for name, value in record.notes.items())
        asked = _harmless(scope.get("raw_path") or scope["path"])
        LOG.info("%s %s %s %d %.3fs%s", record.id, _harmless(scope["method"]), asked, record.status, seconds, notes)


class _Sender:
    """``send`` that gives every answer its id and remembers the status. An answer that comes before the body's end ends the connection,
    so that nobody reads the rest."""

    def __init__(self, send: Send, record: Record, body: _Body) -> None:
        self._send, self._record, self._body = send, record, body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            extra = [(b"x-request-id", self._record.id.encode()), (b"x-content-type-options", b"nosniff")]
            if not self._body.whole:
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await self._send(message)


class _Body:
    """``receive`` that counts (A4): a body that is announced or turns out too large, or comes too slowly, is not read on."""

    def __init__(self, guard: Guard, record: Record, headers: Headers, receive: Receive) -> None:
        self._guard, self._record, self._receive = guard, record, receive
        self._limits = guard.service.settings.limits
        self._announced = _length(headers)
        self._ends = time.monotonic() + self._limits.seconds_to_send
        self._read = 0
        self.whole = not self._announced and "transfer-encoding" not in headers

    async def __call__(self) -> Message:
        if self.whole:
            return await self._receive()
        if self._announced > self._limits.body:
            raise self._too_large()
        try:
            async with asyncio.timeout(max(0.0, self._ends - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            what = f"the body took longer than {self._limits.seconds_to_send:g} s"
            raise refuse(what, code="request_timeout", status=408, remedy="send it faster, or less of it") from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            self._read += count
            self.whole = not message.get("more_body", False)
            if self._read > self._limits.body:
                raise self._too_large()
            self._guard.hold(self._record, count)
        return message

    def _too_large(self) -> RequestError:
        what = f"the body is larger than the {self._limits.body:,} bytes that are allowed"
        return refuse(what, code="request_too_large", status=413, remedy="send smaller or fewer pictures")


async def send_fault(send: Send | _Sender, found: Fault) -> None:
    """An error as an answer of its own."""
    body = json.dumps(found.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | found.headers
    named = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": found.status, "headers": named})
    await send({"type": "http.response.body", "body": body})


def note(record: Record, error: BaseException) -> None:
    """An error for the log: its code where it is the client's, its kind and trace where it is ours."""
    record.notes["error"] = error.code if isinstance(error, LlavaError) else type(error).__name__
    if not isinstance(error, (*MENDABLE, RequestError)) and fault(error).status == 500:
        LOG.error("%s failed: %s", record.id, type(error).__name__, exc_info=error if LOG.isEnabledFor(logging.DEBUG) else None)


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req-{uuid4().hex}"


def _key_in(authorization: str) -> bytes:
    """The key of a Bearer header, or the password of a Basic one (a browser that was asked for it)."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip().encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _digest(key: bytes) -> bytes:
    """Of one length for every key, so that comparing takes the same time."""
    return hashlib.sha256(key).digest()


def _length(headers: Headers) -> int:
    given = headers.get("content-length", "0")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else 0


def _harmless(value: Any) -> str:
    """A value as a word of the log: printable, without blanks, not long."""
    text = value.decode("latin-1") if isinstance(value, bytes) else str(value)
    return _UNPRINTABLE.sub("?", text)[:200]
