"""The shortest way from the official client to a server that speaks plain HTTP/1.1, such as one on this machine.

The client's own transport looks through all its connections at every call, which at 256 of them costs more than all else. This one takes the
connection that was free last, writes the request in one piece and reads one whole reply. TLS and proxies stay with the client's own.

    client -- request --> Wire --> _Line (one connection, one call at a time) --> server
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import ModuleType
from typing import Any

_TOO_LARGE = 64 * 2**20


class Wire:
    """A transport for ``httpx.AsyncClient`` (or ``httpx2``: ``kit`` is whichever the client uses). Connections live in one event loop."""

    def __init__(self, kit: ModuleType) -> None:
        self.kit: Any = kit
        self._idle: dict[tuple[str, int], deque[_Line]] = {}

    async def handle_async_request(self, request: Any) -> Any:
        """One call. Raises the kit's own exceptions, as its transports do."""
        kit, url = self.kit, request.url
        place, timeouts = (url.host, url.port or 80), request.extensions.get("timeout", {})
        sent = _written(request, await request.aread(), kit)
        try:
            async with asyncio.timeout(timeouts.get("connect")):
                line = await self._line(place)
        except TimeoutError:
            raise kit.ConnectTimeout("no connection in time", request=request) from None
        except OSError as error:
            raise kit.ConnectError(error.strerror or str(error), request=request) from None
        try:
            async with asyncio.timeout(timeouts.get("read")):
                status, headers, body = await line.call(sent)
        except TimeoutError:
            line.drop()
            raise kit.ReadTimeout("no reply in time", request=request) from None
        except (OSError, ValueError) as error:
            line.drop()
            raise kit.RemoteProtocolError(str(error), request=request) from None
        except asyncio.CancelledError:
            line.drop()
            raise
        if line.usable:
            self._idle[place].append(line)
        else:
            line.drop()
        return kit.Response(status, headers=headers, stream=kit.ByteStream(body), request=request)

    async def _line(self, place: tuple[str, int]) -> _Line:
        idle = self._idle.setdefault(place, deque())
        while idle:
            line = idle.pop()  # the one used last: those longest idle are the likeliest to be gone
            if line.usable:
                return line
            line.drop()
        _, line = await asyncio.get_running_loop().create_connection(_Line, *place)
        return line

    async def aclose(self) -> None:
        for idle in self._idle.values():
            while idle:
                idle.pop().drop()
        await asyncio.sleep(0)  # the loop closes the sockets in its next round

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Line(asyncio.Protocol):
    """One connection. What is read is held until a reply is whole."""

    def __init__(self) -> None:
        self.usable = True
        self._held = bytearray()
        self._needed = 0  # bytes below which looking again is of no use
        self._reply: asyncio.Future[tuple[int, list[tuple[bytes, bytes]], bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    async def call(self, sent: bytes) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        """Send and read one reply: status, headers, body. Raises OSError where it breaks off, ValueError where it is not HTTP."""
        self._held.clear()
        self._needed = 0
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(sent)
        return await self._reply

    def drop(self) -> None:
        self.usable = False
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._reply is None or self._reply.done():
            self.drop()  # nobody asked
            return
        self._held += data
        if len(self._held) >= self._needed:
            self._look(ended=False)

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._reply and not self._reply.done():
            self._look(ended=True)
        if self._reply and not self._reply.done():
            self._reply.set_exception(ConnectionError("the connection broke off"))

    def _look(self, *, ended: bool) -> None:
        """Take the reply if it is whole; ``ended``: no more will come."""
        assert self._reply
        try:
            if len(self._held) > _TOO_LARGE:
                raise ValueError("the reply is too large")
            found = self._parse(ended)
        except (ValueError, IndexError) as error:
            self.usable = False
            self._reply.set_exception(ValueError(f"this is not HTTP/1.1 ({error})"))
            return
        if found:
            self._reply.set_result(found)

    def _parse(self, ended: bool) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = bytes(self._held[:end]).split(b"\r\n")
        version, status = first.split(b" ", 2)[:2]
        if not version.startswith(b"HTTP/1."):
            raise ValueError("another protocol")
        if status[:1] == b"1":  # "continue" and the like: the reply is still to come
            del self._held[: end + 4]
            return self._parse(ended)
        headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        known = {name.lower(): value.lower() for name, value in headers}
        if version == b"HTTP/1.0" or known.get(b"connection") == b"close":
            self.usable = False
        body = self._body(end + 4, known, ended)
        return None if body is None else (int(status), headers, body)

    def _body(self, start: int, known: dict[bytes, bytes], ended: bool) -> bytes | None:
        if b"chunked" in known.get(b"transfer-encoding", b""):
            return self._chunks(start)
        if b"content-length" in known:
            self._needed = start + int(known[b"content-length"])
            if len(self._held) > self._needed:
                raise ValueError("more than one reply")
            return bytes(self._held[start:]) if len(self._held) == self._needed else None
        self.usable = False
        return bytes(self._held[start:]) if ended else None

    def _chunks(self, at: int) -> bytes | None:
        parts = []
        while True:
            end = self._held.find(b"\r\n", at)
            if end < 0:
                return None
            size = int(bytes(self._held[at:end]).split(b";")[0], 16)
            if size == 0:
                return b"".join(parts) if self._held.endswith(b"\r\n\r\n") else None
            if len(self._held) < end + 2 + size + 2:
                return None
            parts.append(bytes(self._held[end + 2 : end + 2 + size]))
            at = end + 2 + size + 2


def _written(request: Any, body: bytes, kit: Any) -> bytes:
    """A request as bytes, in one piece."""
    head = [request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1"]
    for name, value in request.headers.raw:
        if b"\r" in value or b"\n" in value or b"\r" in name or b"\n" in name:
            raise kit.LocalProtocolError("a line break in a header", request=request)
        head.append(name + b": " + value)
    return b"\r\n".join(head) + b"\r\n\r\n" + body
