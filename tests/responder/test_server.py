"""The official client against a server that misbehaves: every fault is one of our errors, and the key is in none (hardening G1-G4, G10)."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from typing import Any

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import question

from llavakit.errors import ConfigError, MissingExtraError, RefusedError, ResponderError, SamplingError, ThrottledError, UnavailableError
from llavakit.responder import Completion, Query, ServerCompleter, Usage, faults
from llavakit.types import Conversation, Image, Pixels, Sampling, assistant, system, user
from misbehaving import Manners, Server, serving

SECRET = "sk-" + "very-secret-" * 3


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith("OPENAI_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


@pytest.fixture(params=["direct", "official"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our own wire for plain http, and the official client, which https takes."""
    if request.param == "official":
        monkeypatch.setattr("llavakit.responder.server._has_proxy", lambda host: True)  # which is one reason to take the client
    return str(request.param)


def ask(url: str, *queries: Query, **options: Any) -> list[Any]:
    """Replies and errors, in the order of the questions."""

    async def work() -> list[Any]:
        completer = ServerCompleter("teacher", base_url=url, **options)
        try:
            return await asyncio.gather(*map(completer.complete, queries), return_exceptions=True)
        finally:
            await completer.close()

    return asyncio.run(work())


def ask_one(url: str, query: Query | None = None, **options: Any) -> Any:
    return ask(url, query or question(1), **options)[0]


@contextmanager
def always(fault: str, **manners: Any) -> Iterator[Server]:
    with serving(Manners(faults={fault: 1.0}, **manners)) as server:
        yield server


def test_a_reply_with_all_that_belongs_to_it(transport: str) -> None:
    with serving() as server:
        replies = ask(server.url, *(question(number) for number in range(40)))
    for number, reply in enumerate(replies):
        text = f"Reply to What is {number}? with seed 0"
        assert reply == Completion(text=text, finish="stop", model="teacher-2026", usage=Usage(prompt_tokens=3, reply_tokens=8))
    assert server.counts.calls == 40


def test_what_is_sent(transport: str) -> None:
    bodies: list[dict[str, Any]] = []

    def note(body: dict[str, Any]) -> str:
        bodies.append(body)
        return "yes"

    photo = io.BytesIO()
    PIL.Image.new("RGB", (3, 2), "red").save(photo, "JPEG")
    talk = Conversation((system("Be brief."), user(Image(photo.getvalue()), "What?"), assistant("A"), user(Image(Pixels(2, 1, b"abcdef")))))
    query = Query(id="x", conversation=talk, sampling=Sampling(seed=7, temperature=0.5, stop=("\n",), max_new_tokens=9))
    with serving(Manners(answer=note)) as server:
        ask(server.url, query, extra={"reasoning_effort": "low"})
        headers = server.counts.headers[0]
    (body,) = bodies
    assert {name: body[name] for name in ("seed", "temperature", "top_p", "stop", "max_tokens", "reasoning_effort", "model")} == {
        "seed": 7, "temperature": 0.5, "top_p": 1.0, "stop": ["\n"], "max_tokens": 9, "reasoning_effort": "low", "model": "teacher",
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    urls = [part["image_url"]["url"] for message in (1, 3) for part in body["messages"][message]["content"] if part["type"] == "image_url"]
    assert urls[0] == "data:image/jpeg;base64," + base64.b64encode(photo.getvalue()).decode()
    png = PIL.Image.open(io.BytesIO(base64.b64decode(urls[1].removeprefix("data:image/png;base64,"))))
    assert (png.size, png.tobytes()) == ((2, 1), b"abcdef")
    assert headers["authorization"] == f"Bearer {SECRET}"
    completer = ServerCompleter("teacher", base_url=server.url, extra={"reasoning_effort": "low"})
    assert headers["idempotency-key"] == query.key(completer.name)
    assert completer.name != ServerCompleter("teacher", base_url=server.url).name


KINDS: dict[str, tuple[type[ResponderError], str]] = {
    "throttle": (ThrottledError, "throttled"),
    "throttle_silent": (ThrottledError, "throttled"),
    "throttle_date": (ThrottledError, "throttled"),
    "error": (UnavailableError, "server_error"),
    "overloaded": (UnavailableError, "server_error"),
    "slow": (UnavailableError, "timeout"),
    "close": (UnavailableError, "no_connection"),
    "cut": (UnavailableError, "no_connection"),
    "malformed": (UnavailableError, "malformed"),
    "bad": (RefusedError, "refused"),
    "unauthorized": (ResponderError, "bad_key"),
    "forbidden": (ResponderError, "forbidden"),
    "no_model": (ResponderError, "no_such_model"),
    "quota": (ResponderError, "no_credit"),
}


@pytest.mark.parametrize("fault", KINDS)
def test_every_fault_is_one_of_our_errors_without_the_key(fault: str, transport: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with always(fault, slow=1.0) as server:
        error = ask_one(server.url, timeout=0.3 if fault == "slow" else 20)
    assert (type(error), error.code) == KINDS[fault]
    assert error.where == server.url
    assert error.remedy
    assert server.counts.calls == 1  # no retries of the client's own
    told = "".join(traceback.format_exception(error)) + repr(error) + str(vars(error)) + caplog.text
    assert SECRET not in told
    assert error.__context__ is None  # no request hangs on it
    if fault == "unauthorized":
        assert "Bearer (the key)" in error.what


def test_waits_are_read() -> None:
    with always("throttle", retry_after=1.5) as server:
        assert ask_one(server.url).retry_after == 1.5
    with always("throttle_silent") as server:
        assert ask_one(server.url).retry_after is None
    with always("throttle_date") as server:
        assert 0 <= ask_one(server.url).retry_after <= 1


@given(st.integers(0, 10**6), st.integers(-(10**6), 10**6))
def test_a_wait_as_seconds_or_as_a_date(now: int, ahead: int) -> None:
    assert faults.wait_asked({"retry-after": str(ahead)}) == max(0, ahead)
    assert faults.wait_asked({"retry-after-ms": str(ahead)}) == max(0, ahead) / 1000
    assert faults.wait_asked({"retry-after": formatdate(now + max(0, ahead), usegmt=True)}, now=now) == max(0, ahead)


@given(st.text(max_size=20) | st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ (GMT|[+-]\d+)", fullmatch=True))
def test_whatever_a_server_says_a_wait_is_a_number_or_nothing(said: str) -> None:
    wait = faults.wait_asked({"retry-after": said})
    assert wait is None or 0 <= wait < float("inf")


json = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.sampled_from(["error", "message", "code", "type", "detail", "x"]), x, max_size=4), max_leaves=8)  # fmt: skip


@given(st.integers(300, 999), json)
def test_whatever_a_server_answers_is_one_line(status: int, body: object) -> None:
    error = faults.fault(status, body, {}, where="http://x")
    assert isinstance(error, ResponderError)
    assert error.code
    assert "\n" not in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("fault", "finish"), [("unfinished", "cut"), ("length", "length"), ("filter", "filter"), ("refusal", "stop"), ("empty", "stop")]
)
def test_why_a_reply_ended(fault: str, finish: str) -> None:
    with always(fault) as server:
        assert ask_one(server.url).finish == finish


json_replies = st.fixed_dictionaries({}, optional={
    "choices": json | st.lists(st.fixed_dictionaries({}, optional={
        "message": json | st.fixed_dictionaries({"content": st.text() | json}), "finish_reason": json}), max_size=2),
    "usage": json | st.fixed_dictionaries({"prompt_tokens": st.integers() | json, "completion_tokens": st.integers() | json}),
    "model": json, "error": json,
})  # fmt: skip


@given(json | json_replies)
def test_any_json_is_a_reply_or_a_fault_and_can_be_kept(reply: object) -> None:
    """Also halves of characters and counts beyond all measure, which no ledger could write."""
    completer = ServerCompleter("m", base_url="http://localhost:1/v1")
    try:
        read = completer._read(reply)
    except (ResponderError, ValueError):
        return
    assert (read.text + read.model).encode()
    assert read.usage is None or 0 <= read.usage.prompt_tokens < 2**63


def test_a_gateways_error_with_status_200() -> None:
    completer = ServerCompleter("m", base_url="http://localhost:1/v1")
    for body, kind in (
        ({"error": {"code": 429, "message": "slow"}}, ThrottledError),
        ({"error": {"code": 502, "message": "upstream"}}, UnavailableError),
        ({"error": "upstream", "choices": []}, UnavailableError),
        ({"error": {"code": 400}}, RefusedError),
    ):
        with pytest.raises(kind):
            completer._read(body)
    assert completer._read({"choices": [{"message": {"content": "\ud83d!"}, "finish_reason": "stop"}]}).text == "?!"
    assert completer._read({"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]}).text == "No."


REPLY = '{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}'
RAW = {  # what a server sends -> the text, or the code of the error
    f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(REPLY)}\r\n\r\n{REPLY}": "hi",
    f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{REPLY}": "hi",  # ends with the connection
    f"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n{REPLY}": "hi",
    f"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(REPLY)}\r\n\r\n{REPLY}": "hi",
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    f"5\r\n{REPLY[:5]}\r\n{len(REPLY) - 5:x};x=y\r\n{REPLY[5:]}\r\n0\r\n\r\n": "hi",
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc": "no_connection",
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{}": "no_connection",
    "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<hi>": "malformed",
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]": "malformed",
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{\"choices\": []}": "no_connection",
    "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n": "malformed",
    "HTTP/1.1 nonsense\r\n\r\n": "no_connection",
    "SSH-2.0-OpenSSH_9.0\r\n\r\n": "no_connection",
    "": "no_connection",
}  # fmt: skip


@contextmanager
def saying(said: bytes) -> Iterator[str]:
    """A server that says one thing and hangs up."""
    door = socket.create_server(("127.0.0.1", 0))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(answer, sock=door))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}/v1"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        loop.run_until_complete(server.wait_closed())
        loop.close()


@pytest.mark.parametrize("said", RAW)
def test_http_in_all_its_forms(said: str) -> None:
    with saying(said.encode()) as url:
        reply = ask_one(url, timeout=5)
    assert (reply.text if isinstance(reply, Completion) else reply.code) == RAW[said]


def test_nobody_there(transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    error = ask_one(f"http://127.0.0.1:{port}/v1")
    assert (type(error), error.code) == (UnavailableError, "no_connection")
    error = ask_one("http://no-such-host.invalid/v1")
    assert (type(error), error.code) == (UnavailableError, "no_connection")


def test_connections_are_used_again_and_few(transport: str) -> None:
    made: list[object] = []

    async def work(url: str) -> None:
        completer = ServerCompleter("teacher", base_url=url)
        for round_ in range(4):
            await asyncio.gather(*(completer.complete(question(10 * round_ + number)) for number in range(10)))
        await completer.close()

    with serving() as server:
        original = asyncio.BaseEventLoop.create_connection

        async def counted(self: Any, *given_: Any, **more: Any) -> Any:
            made.append(given_)
            return await original(self, *given_, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio.BaseEventLoop, "create_connection", counted)
            asyncio.run(work(server.url))
    assert len(made) == 10


# reading along


def test_a_reply_comes_in_pieces() -> None:
    with serving() as server:
        pieces = list(ServerCompleter("teacher", base_url=server.url).reply(question(1).conversation, Sampling(seed=3)))
    assert len(pieces) > 3
    assert "".join(pieces) == "ReplytoWhatis1?withseed3"


@pytest.mark.parametrize(("fault", "code"), [("unfinished", "cut"), ("cut", "cut"), ("unauthorized", "bad_key"), ("bad", "refused")])
def test_a_stream_that_breaks_off_is_no_reply(fault: str, code: str) -> None:
    with always(fault) as server, pytest.raises(ResponderError) as caught:
        list(ServerCompleter("teacher", base_url=server.url).reply(question(1).conversation))
    assert caught.value.code == code
    assert SECRET not in "".join(traceback.format_exception(caught.value))


# addresses and keys


@pytest.mark.parametrize(
    "address",
    ["https://user:pw@api.example/v1", "https://api.example/v1?key=abc", "ftp://x/v1", "localhost:8000", "http://", "http://x:y/"],
)
def test_addresses_that_cannot_be_used(address: str) -> None:
    with pytest.raises(ConfigError):
        ServerCompleter("m", base_url=address)


def test_which_key_goes_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(url: str, **options: Any) -> str | None:
        return ServerCompleter("m", base_url=url, **options)._key

    assert sent("https://api.openai.com/v1") == SECRET
    assert sent("http://localhost:8000/v1") == SECRET
    assert sent("http://gpu-box:8000/v1") is None  # not in the clear over a network
    monkeypatch.setenv("BOX_KEY", " box \n")
    assert sent("http://gpu-box:8000/v1", key_variable="BOX_KEY") == "box"
    monkeypatch.setenv("BOX_KEY", "bo\nx")
    with pytest.raises(ResponderError) as caught:
        sent("https://gpu-box/v1", key_variable="BOX_KEY")
    assert caught.value.code == "bad_key"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert sent("http://localhost:8000/v1") is None
    with pytest.raises(ResponderError, match="OPENAI_API_KEY") as caught:
        sent("https://api.openai.com/v1")
    assert caught.value.code == "no_key"


def test_the_key_may_come_from_the_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    class Keyring:
        @staticmethod
        def get_password(service: str, name: str) -> str:
            return f"{service}/{name}"

    monkeypatch.setitem(sys.modules, "keyring", Keyring)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ServerCompleter("m")._key == "llavakit/OPENAI_API_KEY"


def test_the_key_is_in_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    completer = ServerCompleter("m")
    assert SECRET not in repr(completer) + completer.name + str(completer)


def test_without_the_package_the_remedy_is_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"llavakit\[generate\]"):
        ServerCompleter("m")


def test_servers_do_not_search() -> None:
    query = Query(id="x", conversation=Conversation.ask("?"), sampling=Sampling(num_beams=2))
    with serving() as server:
        assert isinstance(ask_one(server.url, query), SamplingError)
