"""A server on a real socket of this machine, in a thread, and raw talk with it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llavakit.serve.server import Server, bind
from llavakit.serve.service import Service


@dataclass(frozen=True, kw_only=True)
class Running:
    server: Server
    port: int
    codes: list[int]
    talks: list[socket.socket]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def talk(self, sent: bytes = b"", *, buffer: int | None = None) -> socket.socket:
        """A connection on which these bytes have been sent."""
        made = socket.socket()
        if buffer is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.talks.append(made)
        made.settimeout(10)
        made.connect(("127.0.0.1", self.port))
        made.sendall(sent)
        return made


@contextmanager
def serving(service: Service, **options: object) -> Iterator[Running]:
    listening = bind("127.0.0.1", 0)
    server = Server(service, listening, **options)  # type: ignore[arg-type]
    codes: list[int] = []
    talks: list[socket.socket] = []
    thread = threading.Thread(target=lambda: codes.append(server.serve_until_told()))
    thread.start()
    port = listening.getsockname()[1]
    try:
        until(lambda: server.started)
        yield Running(server=server, port=port, codes=codes, talks=talks)
    finally:
        for talk in talks:
            talk.close()
        server.force_exit = server.should_exit = True
        thread.join(10)
        listening.close()


def until(true: Callable[[], object], seconds: float = 5.0) -> float:
    """Wait for it; how long it took."""
    begun = time.perf_counter()
    while not true():
        assert time.perf_counter() - begun < seconds, "waited in vain"
        time.sleep(0.002)
    return time.perf_counter() - begun


def request(body: bytes, path: str = "/v1/chat/completions", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join((*lines, "", "")).encode() + body


def rest(talk: socket.socket) -> bytes:
    """Everything until the server ends the connection."""
    read = []
    while data := talk.recv(1 << 16):
        read.append(data)
    return b"".join(read)
