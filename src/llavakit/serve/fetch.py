"""Pictures from the web, for servers that are told to fetch them (A6-A9). Off by default.

    address --syntax--> host on the list? --resolve--> every address public? --connect to that address--> at most N bytes --> bytes
       ^                                                                                                      |
       '------------------------------------------- redirect: all of it anew ---------------------------------'

The address that was checked is the one we connect to, so that a name server cannot answer differently the second time; the name is kept
for ``Host`` and for TLS. Nothing is unpacked: a server that sends gzip is refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import h11

from llavakit.errors import RequestError
from llavakit.serve.faults import refuse

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Connect = Callable[[str, int, str | None], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
PORTS = {"https": 443, "http": 80}
_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_UNWANTED = re.compile(r"[^\x21-\x7e]|[\\@#]")
# IPv6 networks that carry an IPv4 address, which may be anybody's
_CARRIERS = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96"))


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Which pictures are fetched: from these hosts (``*.example.org``: any name under it; ``*``: any public host), and at what cost."""

    hosts: tuple[str, ...]
    seconds: float = 10.0
    "For one picture, redirects included."
    redirects: int = 3
    resolve: Resolve | None = None
    connect: Connect | None = None

    def allows(self, host: str) -> bool:
        return any(
            allowed in ("*", host) or (allowed.startswith("*.") and host.endswith(allowed[1:])) for allowed in map(str.lower, self.hosts)
        )


async def fetch(url: str, remote: Remote | None, *, where: str, most: int) -> bytes:
    """The bytes at an address. Raises RequestError: remote_images_disabled, image_url_not_allowed, image_fetch_failed."""
    scheme = url[:12].partition(":")[0].lower()
    if scheme not in PORTS:
        remedy = "send the picture itself: data:image/png;base64,<data>"
        raise refuse("this is no picture that the server may open", code="image_url_not_allowed", where=where, remedy=remedy)
    if remote is None:
        remedy = "send the picture itself (data:image/png;base64,<data>), or start the server with --allow-host"
        raise refuse("pictures are not fetched from the web here", code="remote_images_disabled", where=where, remedy=remedy)
    try:
        async with asyncio.timeout(remote.seconds):
            for _ in range(remote.redirects + 1):
                found = await _hop(url, remote, where, most)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
            raise _failed("it is redirected too often", where)
    except TimeoutError:
        raise _failed(f"it took longer than {remote.seconds:g} s", where) from None
    except (OSError, h11.ProtocolError, ssl.SSLError):  # no more than this: the answer must not map what lies behind us
        raise _failed("its server cannot be reached or does not speak HTTP", where) from None


async def _hop(url: str, remote: Remote, where: str, most: int) -> bytes | str:
    """One request: the picture, or where to look instead."""
    parts = _checked(url, remote, where)
    host, port = str(parts.hostname), PORTS[parts.scheme]
    addresses = [host] if _literal(host) else await (remote.resolve or resolve)(host, port)
    if not addresses or not all(public(address) for address in addresses):
        raise _not_allowed(where)
    reader, writer = await (remote.connect or connect)(addresses[0], port, host if parts.scheme == "https" else None)
    try:
        return await _get(reader, writer, parts, where, most)
    finally:
        writer.transport.abort()


def _checked(url: str, remote: Remote, where: str) -> SplitResult:
    """The parts of an address that is spelled plainly and allowed; whatever could be read in two ways is refused."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _not_allowed(where) from None
    plain = (
        len(url) <= 4096 and not _UNWANTED.search(url) and parts.netloc.lower() in (host, f"{host}:{port}", f"[{host}]", f"[{host}]:{port}")
    )
    if not plain or parts.scheme not in PORTS or port not in (None, PORTS[parts.scheme]):
        raise _not_allowed(where)
    if not (_NAME.fullmatch(host) or _literal(host)) or not remote.allows(host):
        raise _not_allowed(where)
    return parts


def _literal(host: str) -> bool:
    """An address in its one usual spelling: not 2130706433, 0x7f.1 or 0177.0.0.1."""
    try:
        return str(ipaddress.ip_address(host)) == host and "%" not in host
    except ValueError:
        return False


def public(address: str) -> bool:
    """Whether an address belongs to the public internet, and not to this machine, its neighbours or a network behind a prefix."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            return public(str(found.ipv4_mapped))
        if found.is_site_local or any(found in network for network in _CARRIERS):
            return False
    return found.is_global and not (
        found.is_multicast or found.is_reserved or found.is_unspecified or found.is_loopback or found.is_link_local
    )


async def resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


async def connect(address: str, port: int, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To this very address; ``name`` is whose certificate it must show."""
    secured: dict[str, Any] = {"ssl": ssl.create_default_context(), "server_hostname": name} if name else {}
    return await asyncio.open_connection(address, port, **secured)


async def _get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: SplitResult, where: str, most: int) -> bytes | str:
    wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 14)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    headers = [
        ("Host", parts.netloc),
        ("User-Agent", "llavakit"),
        ("Accept", "image/*"),
        ("Accept-Encoding", "identity"),
        ("Connection", "close"),
    ]
    writer.write(wire.send(h11.Request(method="GET", target=target, headers=headers)) + wire.send(h11.EndOfMessage()))
    await writer.drain()
    body = bytearray()
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(await reader.read(1 << 16))
        elif isinstance(event, h11.Response):
            if (redirect := _read_head(event, where, most)) is not None:
                return redirect
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > most:
                raise _failed(f"it is larger than the {most:,} bytes that are left for it", where)
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise _failed("the connection broke off", where)


def _read_head(event: h11.Response, where: str, most: int) -> str | None:
    """Where a redirect leads; None for a head that a picture may follow."""
    headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
    if event.status_code in (301, 302, 303, 307, 308) and "location" in headers:
        return headers["location"]
    if event.status_code != 200:
        raise _failed(f"its server answers {event.status_code}", where)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _failed("its server packs it although it was told not to", where)
    if headers.get("content-type", "").lower().startswith(("text/", "application/json", "application/xhtml")):
        raise _failed("its server sends a text instead", where)
    if (length := headers.get("content-length", "")).isdigit() and int(length) > most:
        raise _failed(f"it is larger than the {most:,} bytes that are left for it", where)
    return None


def _not_allowed(where: str) -> RequestError:
    remedy = "use a host that the server allows, by https, with nothing unusual in the address"
    return refuse("pictures are not fetched from this address", code="image_url_not_allowed", where=where, remedy=remedy)


def _failed(why: str, where: str) -> RequestError:
    remedy = "check the address, or send the picture itself"
    return refuse(f"the picture could not be fetched: {why}", code="image_fetch_failed", where=where, remedy=remedy)
