"""The process: a socket, uvicorn on it, a model that is loaded meanwhile, and an end without losses.

    bind --> listen, /health 200 --load (a thread)--> /ready 200 ... SIGTERM --> /ready 503, 503 for new ones --drained--> exit 0
                                                        an engine dies --> /health 503 --a second--> exit 1

A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, NoReturn

import h11
import uvicorn
from starlette.routing import BaseRoute
from uvicorn.protocols.http.h11_impl import H11Protocol

from llavakit.errors import LlavaError
from llavakit.serve.api import build
from llavakit.serve.faults import Fault
from llavakit.serve.limits import Limits
from llavakit.serve.protocol import Engine
from llavakit.serve.service import Service

HEAD_SECONDS = 10.0  # for a request's head to arrive
LEAVING_SECONDS = 2.0  # for answers to leave, once nothing is computed any more
Load = Callable[[], Mapping[str, Engine]]


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything slow begins. Raises LlavaError ``port_in_use``, ``bad_host``, ``port_not_allowed``."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise LlavaError(f"{host!r} is no address of this machine", code="bad_host", remedy="use --host 127.0.0.1") from error
    listening = socket.socket(family, kind, number)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            remedy = f"take another, such as --port {port + 1}, or stop who uses it"
            raise LlavaError(f"port {port} of {host} is in use", code="port_in_use", remedy=remedy) from error
        if error.errno == errno.EACCES:
            raise LlavaError(f"port {port} is not for everybody", code="port_not_allowed", remedy="use one above 1023") from error
        raise LlavaError(f"{host} is no address of this machine", code="bad_host", remedy="use --host 127.0.0.1") from error
    return listening


class Server(uvicorn.Server):
    """uvicorn that drains before it leaves. ``serve_until_told`` returns the exit code and raises what loading raised."""

    def __init__(
        self,
        service: Service,
        listening: socket.socket,
        load: Load | None = None,
        *,
        grace: float = 30.0,
        routes: Sequence[BaseRoute] = (),
        ready: Callable[[], None] | None = None,
    ) -> None:
        """ready: called once requests for a reply are taken."""
        connection: Any = partial(Connection, limits=service.settings.limits)
        super().__init__(
            uvicorn.Config(
                build(service, routes), http=connection, ws="none", loop="asyncio", lifespan="off", log_config=None, log_level="critical",
                access_log=False, server_header=False, h11_max_incomplete_event_size=1 << 14, timeout_keep_alive=15,
                timeout_graceful_shutdown=int(LEAVING_SECONDS),
            )
        )  # fmt: skip
        self.service, self.grace, self.code = service, grace, 0
        self._listening, self._load, self._ready = listening, load, ready
        self._loading_error: BaseException | None = None
        self._told_to_leave = False
        self._drain: asyncio.Task[None] | None = None
        self._ticks_dead = 0

    def serve_until_told(self) -> int:
        asyncio.run(self.serve(sockets=[self._listening]))
        if self._loading_error is not None:
            raise self._loading_error
        return self.code

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._load is not None:
            threading.Thread(target=self._load_model, args=(self._load,), name="load", daemon=True).start()

    def _load_model(self, load: Load) -> None:
        try:
            engines = load()
            gc.collect()
            gc.freeze()  # a model's libraries are a million objects: looking through them takes a fifth of a second, and everybody waits
            for name, engine in engines.items():
                self.service.add(name, engine)
            if self._ready is not None:
                self._ready()
        except BaseException as error:  # told to whoever waits for the server
            self._loading_error = error
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: nothing more is taken, from this moment on. Second: leave now."""
        if self._told_to_leave:
            self.code = 128 + sig
            self.should_exit = self.force_exit = True
        self._told_to_leave = True
        self.service.refuse_more()

    async def on_tick(self, counter: int) -> bool:
        if self._told_to_leave and self._drain is None:
            self._drain = asyncio.create_task(self._drain_and_leave())
        if self.service.state == "failed":
            self._ticks_dead += 1  # a second in which those who ask for its health can see it
            if self._ticks_dead > 10:
                self.code, self.should_exit = 1, True
        return await super().on_tick(counter)

    async def _drain_and_leave(self) -> None:
        try:
            await self.service.drain(self.grace)
        finally:
            self.should_exit = True


def leave(code: int) -> NoReturn:
    """End the process as it is: everybody has been answered, a thread that still loads or computes cannot be interrupted, and taking torch
    apart piece by piece takes seconds."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Connection(H11Protocol):
    """uvicorn's, whose patience ends: with heads that do not come, and readers that do not read (S3). Bad requests are answered in JSON."""

    def __init__(self, *words: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*words, **named)
        self._seconds_to_read = limits.seconds_to_read
        self._head: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._head, self._reader)
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        """The clock runs while a request has begun to come, or none has come yet; between two, uvicorn's own runs."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.timeout_keep_alive_task is not None:
            _stop(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader = self.loop.call_later(self._seconds_to_read, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _stop(self._reader)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.loop.call_later(self._seconds_to_read, self.transport.abort)  # what is left of an answer is not kept for ever

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(Fault(status=400, message="this is no HTTP request, or its head is too large", code="bad_request").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer to the request before is under way
            self.transport.abort()
            return
        self.transport.close()


def _stop(*timers: asyncio.TimerHandle | None) -> None:
    for timer in timers:
        if timer is not None:
            timer.cancel()
