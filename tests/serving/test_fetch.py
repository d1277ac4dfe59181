"""Pictures from the web: which addresses are asked, and what is taken from them (A7, A8). No address but this machine's is ever reached."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from served import look, png, post, run, service, wrong

from llavakit.errors import RequestError
from llavakit.serve.fetch import Remote, fetch, public

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
PUBLIC = "93.184.215.14"
PNG = png()


def sending(head: str, body: bytes = b"") -> Answer:
    async def send(writer: asyncio.StreamWriter) -> None:
        writer.write(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
        await writer.drain()

    return send


OK = f"HTTP/1.1 200 OK\nContent-Type: image/png\nContent-Length: {len(PNG)}"


class Web:
    """Names and their addresses; every connection is led to one server here, which counts and answers."""

    def __init__(self, answer: Answer, names: dict[str, Sequence[Sequence[str]]] | None = None) -> None:
        self.answer, self.hits, self.resolved = answer, 0, 0
        self.connected: list[tuple[str, int, str | None]] = []
        self.heads: list[bytes] = []
        self.names = {name: list(turns) for name, turns in (names or {}).items()}

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved += 1
        turns = self.names.get(host, [[PUBLIC]])
        return turns.pop(0) if len(turns) > 1 else turns[0]

    async def connect(self, address: str, port: int, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.connected.append((address, port, name))
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hits += 1
        self.heads.append(await reader.readuntil(b"\r\n\r\n"))
        try:
            await self.answer(writer)
        except OSError:
            pass
        finally:
            writer.close()

    def fetch(self, url: str, *, hosts: Sequence[str] = ("*",), most: int = 10_000, seconds: float = 5.0) -> bytes:
        async def fetching() -> bytes:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            async with server:
                remote = Remote(hosts=tuple(hosts), seconds=seconds, resolve=self.resolve, connect=self.connect)
                return await fetch(url, remote, where="messages[0].content[0].image_url.url", most=most)

        return run(fetching())

    def refuses(self, url: str, code: str, **options: Any) -> RequestError:
        with pytest.raises(RequestError) as caught:
            self.fetch(url, **options)
        assert caught.value.code == code
        return caught.value


def test_a6_an_allowed_picture_is_fetched_from_the_address_that_was_checked() -> None:
    web = Web(sending(OK, PNG))
    assert web.fetch("https://pictures.example.org/a.png?size=2", hosts=("*.example.org",)) == PNG
    assert web.connected == [(PUBLIC, 443, "pictures.example.org")]
    assert web.heads[0].startswith(b"GET /a.png?size=2 HTTP/1.1\r\nHost: pictures.example.org\r\n")
    assert b"authorization" not in web.heads[0].lower()


def test_a6_only_hosts_on_the_list() -> None:
    web = Web(sending(OK, PNG))
    for host in ("other.org", "example.org", "evil-example.org", "example.org.evil.com"):
        web.refuses(f"https://{host}/a.png", "image_url_not_allowed", hosts=("*.example.org", "pics.org"))
    assert web.fetch("http://pics.org/a.png", hosts=("*.example.org", "PICS.org")) == PNG
    assert web.hits == 1


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "fec0::1", "nonsense", "",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_a7_names_that_lead_inside_are_refused(address: str) -> None:
    assert not public(address)
    web = Web(sending(OK, PNG), {"inside.example.org": [[address]], "mixed.example.org": [[PUBLIC, address]]})
    web.refuses("https://inside.example.org/", "image_url_not_allowed")
    web.refuses("https://mixed.example.org/", "image_url_not_allowed")
    assert (web.hits, web.connected) == (0, [])


def test_a7_public_addresses_are_public() -> None:
    assert all(public(address) for address in ("93.184.215.14", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"))


SPELLINGS = [
    "http://127.0.0.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://10.0.0.1/", "http://169.254.169.254/latest", "http://0.0.0.0/",
    "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://0x7f.1/", "http://017700000001/",
    "http://user@example.org/", "http://example.org@127.0.0.1/", "http://user:pass@example.org/", "http://@example.org/",
    "http://example.org\\@127.0.0.1/", "http://127.0.0.1\\.example.org/", "http://example.org./", "http://localhost/", "http://localhost./",
    "http://exämple.org/", "http://ⓔxample.org/", "http://127。0。0。1/", "http://example.org:22/", "http://example.org:8080/",
    "https://example.org:80/", "http://example.org:99999/", "http://example.org:x/", "http:///etc/passwd", "http:example.org", "http://",
    "http://exa mple.org/", "http://example.org/\r\nX: y", "http://example.org/\nHost: b", "http://exa\tmple.org/", "http://[::1",
    "http://[::1%25lo]/", "http://-a.org/", "http://a..org/", "http://example.org#@127.0.0.1/",
    "http://" + "a" * 300 + ".org/", "http://example.org/" + "a" * 5000,
    "http://example.org:/", "http://xn--.org/", "http://%31%32%37.0.0.1/",
]  # fmt: skip


@pytest.mark.parametrize("url", SPELLINGS)
def test_a7_addresses_that_could_be_read_in_two_ways_are_refused(url: str) -> None:
    web = Web(sending(OK, PNG), {"localhost": [["127.0.0.1"]]})
    web.refuses(url, "image_url_not_allowed")
    assert (web.hits, web.connected) == (0, [])


def test_a7_a_name_server_that_changes_its_mind_is_asked_once() -> None:
    web = Web(sending(OK, PNG), {"rebind.example.org": [[PUBLIC], ["127.0.0.1"]]})
    assert web.fetch("https://rebind.example.org/") == PNG
    assert [address for address, *_ in web.connected] == [PUBLIC]
    assert web.resolved == 1


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/", "http://inside.example.org/", "file:///etc/passwd", "http://other.com/", "//10.0.0.1/", "gopher://a/"]
)
def test_a7_every_redirect_is_checked(target: str) -> None:
    web = Web(sending(f"HTTP/1.1 302 Found\nLocation: {target}\nContent-Length: 0"), {"inside.example.org": [["10.0.0.1"]]})
    web.refuses("https://example.org/", "image_url_not_allowed", hosts=("*.example.org", "example.org", "127.0.0.1", "10.0.0.1"))
    assert web.hits == 1


def test_a7_a_redirect_to_an_allowed_place_is_followed_at_its_own_address() -> None:
    answers = [sending("HTTP/1.1 301 Moved\nLocation: /b.png\nContent-Length: 0"), sending(OK, PNG)]

    async def answer(writer: asyncio.StreamWriter) -> None:
        await answers.pop(0)(writer)

    web = Web(answer, {"example.org": [[PUBLIC], ["8.8.8.8"]]})
    assert web.fetch("https://example.org/a.png") == PNG
    assert [address for address, *_ in web.connected] == [PUBLIC, "8.8.8.8"]
    assert b"GET /b.png " in web.heads[1]


def test_a8_a_thousand_redirects_end_after_a_few() -> None:
    web = Web(sending("HTTP/1.1 302 Found\nLocation: /again\nContent-Length: 0"))
    web.refuses("https://example.org/", "image_fetch_failed")
    assert web.hits == 4


BOMB = gzip.compress(bytes(10_000_000))
FAILING = {
    "404": sending("HTTP/1.1 404 Not Found\nContent-Length: 0"),
    "html": sending("HTTP/1.1 200 OK\nContent-Type: text/html\nContent-Length: 6", b"<html>"),
    "gzip bomb": sending(f"HTTP/1.1 200 OK\nContent-Type: image/png\nContent-Encoding: gzip\nContent-Length: {len(BOMB)}", BOMB),
    "announced too large": sending("HTTP/1.1 200 OK\nContent-Type: image/png\nContent-Length: 99999999"),
    "cut": sending("HTTP/1.1 200 OK\nContent-Type: image/png\nContent-Length: 100", b"half"),
    "no http": sending("SSH-2.0-OpenSSH_9"),
    "endless head": sending("HTTP/1.1 200 OK\nX: " + "x" * 100_000),
    "redirect to nowhere": sending("HTTP/1.1 302 Found\nContent-Length: 0"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a8_what_is_no_picture_is_refused(name: str) -> None:
    error = Web(FAILING[name]).refuses("https://example.org/a.png", "image_fetch_failed")
    assert PUBLIC not in str(error)


def test_a8_an_endless_body_is_read_to_the_limit_only() -> None:
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        while True:
            writer.write(bytes(10_000))
            await writer.drain()
            sent += 10_000

    Web(endless).refuses("https://example.org/", "image_fetch_failed", most=100_000)
    assert sent < 20_000_000  # what lay in the sockets' buffers


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"])
def test_a8_a_slow_host_is_left_after_the_deadline(head: bytes) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    begun = time.perf_counter()
    Web(drip).refuses("https://example.org/", "image_fetch_failed", seconds=0.3)
    assert time.perf_counter() - begun < 1


def test_a8_a_host_that_cannot_be_reached_tells_nothing() -> None:
    async def refused(address: str, port: int, name: str | None) -> Any:
        raise ConnectionRefusedError(f"connect to {address}")

    web = Web(sending(OK, PNG))
    web.connect = refused  # type: ignore[method-assign]
    assert PUBLIC not in str(web.refuses("https://example.org/", "image_fetch_failed"))


def test_remote_pictures_come_through_the_api() -> None:
    async def through() -> Any:
        web = Web(sending(OK, PNG))
        server = await asyncio.start_server(web._serve, "127.0.0.1", 0)
        web.port = server.sockets[0].getsockname()[1]
        async with server:
            remote = Remote(hosts=("example.org",), resolve=web.resolve, connect=web.connect)
            served = service(remote=remote)
            good = await post(served, look("https://example.org/a.png"))
            bad = await post(served, look("https://example.com/a.png"))
            return good, bad

    good, bad = run(through())
    assert good.json()["choices"][0]["message"]["content"] == "I see 1 pictures."
    assert wrong(bad, 400, "image_url_not_allowed")["param"] == "messages[0].content[0].image_url.url"
