"""Plain HTTP/1.1 to a server on this machine or network: a request in one piece, one whole reply.

The official client spends more on a call than all the rest of the pool together (at 256 at once it looks through all its connections every
time), and a local server answers thousands a second. TLS, proxies and redirects stay with the client.

    Wire -- the connection that was free last --> _Line (one connection, one call at a time) --> server
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

_TOO_LARGE = 64 * 2**20
Reply = tuple[int, dict[str, str], bytes]  # status, headers with names in small letters, body


class Wire:
    """Connections to one server, in one event loop."""

    def __init__(self, host: str, port: int, *, connect_timeout: float) -> None:
        self.host, self.port, self.connect_timeout = host, port, connect_timeout
        self._idle: deque[_Line] = deque()

    async def post(self, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """One call. Raises OSError where there is no connection, where it breaks off, and where the other side speaks no HTTP."""
        line = await self._line()
        try:
            reply = await line.call(_written(path, headers, body))
        except BaseException:
            line.drop()
            raise
        if line.usable:
            self._idle.append(line)
        else:
            line.drop()
        return reply

    async def _line(self) -> _Line:
        while self._idle:
            line = self._idle.pop()  # the one used last: those longest idle are the likeliest to be gone
            if line.usable:
                return line
            line.drop()
        try:
            async with asyncio.timeout(self.connect_timeout):
                _, line = await asyncio.get_running_loop().create_connection(_Line, self.host, self.port)
        except TimeoutError:
            raise ConnectionError(f"no connection within {self.connect_timeout:g} s") from None
        return line

    async def close(self) -> None:
        while self._idle:
            self._idle.pop().drop()
        await asyncio.sleep(0)  # the loop closes the sockets in its next round


class _Line(asyncio.Protocol):
    """One connection. What is read is held until a reply is whole."""

    def __init__(self) -> None:
        self.usable = True
        self._held = bytearray()
        self._needed = 0  # bytes below which looking again is of no use
        self._reply: asyncio.Future[Reply] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    async def call(self, sent: bytes) -> Reply:
        """Send, and read one reply. Raises ConnectionError."""
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
            self._reply.set_exception(ConnectionError(f"this is not HTTP/1.1 ({error})"))
            return
        if found:
            self._reply.set_result(found)

    def _parse(self, ended: bool) -> Reply | None:
        end = self._held.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *lines = self._held[:end].decode("latin-1").split("\r\n")
        version, status = first.split(" ", 2)[:2]
        if not version.startswith("HTTP/1."):
            raise ValueError("another protocol")
        if status[:1] == "1":  # "continue" and the like: the reply is still to come
            del self._held[: end + 4]
            return self._parse(ended)
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if version == "HTTP/1.0" or headers.get("connection", "").lower() == "close":
            self.usable = False
        body = self._body(end + 4, headers, ended)
        return None if body is None else (int(status), headers, body)

    def _body(self, start: int, headers: dict[str, str], ended: bool) -> bytes | None:
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return self._chunks(start)
        if "content-length" in headers:
            self._needed = start + int(headers["content-length"])
            if len(self._held) > self._needed:
                raise ValueError("more than one reply")
            return bytes(self._held[start:]) if len(self._held) == self._needed else None
        self.usable = False
        return bytes(self._held[start:]) if ended else None

    def _chunks(self, at: int) -> bytes | None:
        parts: list[bytes] = []
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


def _written(path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A request as bytes, in one piece."""
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), f"Content-Length: {len(body)}"]
    assert not any("\r" in line or "\n" in line for line in lines)
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
