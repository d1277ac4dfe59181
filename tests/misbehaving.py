"""An OpenAI-compatible server that misbehaves on purpose. Standard library only; in a thread (``serving``) or a process (``apart``).

    python tests/misbehaving.py --faults error=0.1 throttle=0.05 --latency 0.05        prints its address, serves until killed

What it does to a question depends on the seed and the question's hash alone, so that two runs compare. Two sorts of faults:

    on the way    the first one or two tries of a question meet it, a later one is answered
                  throttle throttle_date throttle_silent (429)  error (500)  overloaded (529)  slow  close  cut  malformed
    in the reply  the question has it for good: another seed is another question
                  unfinished  length  filter  refusal  empty  bad (400)
    for everyone  unauthorized (401)  forbidden (403)  no_model (404)  quota (429)

A call is *charged* when a reply is made. As gateways do, a repeated Idempotency-Key is answered again without charge unless ``forgetful``.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from time import process_time, time
from typing import Any

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 429: "Too Many Requests"}
ON_THE_WAY = ("throttle", "throttle_date", "throttle_silent", "error", "overloaded", "slow", "close", "cut", "malformed")
QUOTA = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
FAILURES: dict[str, tuple[int, dict[str, str]]] = {
    "throttle": (429, {"message": "slow down", "code": "rate_limit_exceeded"}),
    "throttle_date": (429, {"message": "slow down", "code": "rate_limit_exceeded"}),
    "throttle_silent": (429, {"message": "slow down", "code": "rate_limit_exceeded"}),
    "error": (500, {"message": "out of order"}),
    "overloaded": (529, {"message": "overloaded"}),
    "bad": (400, {"message": "not this question", "code": "invalid_value"}),
    "unauthorized": (401, {"message": "Incorrect API key provided: {key}", "code": "invalid_api_key"}),
    "forbidden": (403, {"message": "not from there"}),
    "no_model": (404, {"message": "The model does not exist", "code": "model_not_found"}),
    "quota": (429, QUOTA),
}


@dataclass(frozen=True, kw_only=True)
class Manners:
    """How the server behaves. ``faults`` are shares of the questions; ``room`` is how many calls it takes at once before it says 429."""

    seed: int = 0
    faults: Mapping[str, float] = field(default_factory=dict)
    latency: float = 0.0
    slow: float = 2.0
    retry_after: float = 0.05
    room: int | None = None
    credit: int | None = None
    forgetful: bool = False
    answer: Callable[[dict[str, Any]], str] | None = None


class Counts:
    """What a test wants to know afterwards."""

    def __init__(self) -> None:
        self.calls = self.under_way = self.most_under_way = 0
        self.charged: Counter[str] = Counter()  # by Idempotency-Key
        self.tries: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []


class Server:
    """The manners, and what is known of the calls so far."""

    def __init__(self, manners: Manners) -> None:
        self.manners, self.counts = manners, Counts()
        self.doors: list[_Door] = []
        self.url = ""

    def fault(self, body: Mapping[str, Any]) -> str | None:
        """What befalls this question, by its hash; the tries are counted here."""
        if not self.manners.faults:
            return None
        asked = hashlib.sha256(json.dumps([self.manners.seed, body["messages"], body.get("seed")]).encode()).hexdigest()
        self.counts.tries[asked] += 1
        place = int(asked[:12], 16) / 16**12
        for name, share in self.manners.faults.items():
            if place < share:
                over = name in ON_THE_WAY and self.counts.tries[asked] > 1 + int(asked[12], 16) % 2
                return None if over else name
            place -= share
        return None

    async def serve(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[str | None, bytes]:
        """One call: the fault that shapes how it is sent, and what is sent."""
        counts, manners = self.counts, self.manners
        counts.calls += 1
        if len(counts.headers) < 100:
            counts.headers.append(headers)
        fault = self.fault(body)
        if manners.credit is not None and counts.charged.total() >= manners.credit:
            fault = "quota"
        elif manners.room is not None and counts.under_way >= manners.room:
            fault = "throttle"
        if fault:
            counts.faults[fault] += 1
        if fault in FAILURES:
            return fault, self.refuse(fault, headers)
        counts.under_way += 1
        counts.most_under_way = max(counts.most_under_way, counts.under_way)
        try:
            wait = manners.slow if fault == "slow" else manners.latency
            if wait:
                await asyncio.sleep(wait)
        finally:
            counts.under_way -= 1
        if fault == "close":
            return fault, b""
        key = headers.get("idempotency-key", "")
        if manners.forgetful or not counts.charged[key]:
            counts.charged[key] += 1
        if body.get("stream"):
            return fault, _stream(body, fault, self.text(body, fault))
        return fault, _http(200, b'{"choices": [{"mess' if fault == "malformed" else _completion(body, fault, self.text(body, fault)))

    def text(self, body: dict[str, Any], fault: str | None) -> str:
        if fault in ("refusal", "empty"):
            return "I'm sorry, but I can't help with that." if fault == "refusal" else ""
        return self.manners.answer(body) if self.manners.answer else f"Reply to {_question(body)} with seed {body.get('seed')}"

    def refuse(self, fault: str, headers: dict[str, str]) -> bytes:
        status, error = FAILURES[fault]
        error = error | {"message": error["message"].replace("{key}", headers.get("authorization", ""))}
        more = {"throttle": f"{self.manners.retry_after}", "throttle_date": formatdate(time() + 1, usegmt=True)}
        return _http(status, json.dumps({"error": error}).encode(), {"Retry-After": more[fault]} if fault in more else {})

    def report(self) -> bytes:
        counts = self.counts
        seen = {"calls": counts.calls, "most_under_way": counts.most_under_way, "cpu_seconds": process_time()}
        return _http(200, json.dumps(seen | {"charged": counts.charged, "faults": counts.faults}).encode())


class _Door(asyncio.Protocol):
    """One connection: HTTP/1.1 with Content-Length, one call after another."""

    def __init__(self, server: Server) -> None:
        self.server, self.held = server, b""
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.server.doors.append(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server.doors.remove(self)

    def data_received(self, data: bytes) -> None:
        self.held += data
        head, blank, rest = self.held.partition(b"\r\n\r\n")
        if not blank:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.held = rest[length:]
        if first.startswith("GET"):
            self.transport.write(self.server.report())
        else:
            self.task = asyncio.create_task(self.answer(headers, json.loads(rest[:length])))

    async def answer(self, headers: dict[str, str], body: dict[str, Any]) -> None:
        fault, sent = await self.server.serve(headers, body)
        self.transport.write(sent[: len(sent) * 2 // 3] if fault == "cut" else sent)
        if fault in ("cut", "close"):
            self.transport.close()


def _http(status: int, body: bytes, more: Mapping[str, str] | None = None, kind: str = "application/json") -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in (more or {}).items())
    head = f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\nContent-Type: {kind}\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _question(body: Mapping[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text", "[picture]") for part in content)


def _usage(body: Mapping[str, Any], text: str) -> dict[str, int]:
    said = sum(len(str(message["content"]).split()) for message in body["messages"])
    replied = len(text.split())
    return {"prompt_tokens": said, "completion_tokens": replied, "total_tokens": said + replied}


def _finish(fault: str | None) -> str | None:
    return {"unfinished": None, "length": "length", "filter": "content_filter"}.get(fault or "", "stop")


def _completion(body: Mapping[str, Any], fault: str | None, text: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": _finish(fault)}
    made = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": body["model"] + "-2026", "choices": [choice]}
    return json.dumps(made | {"usage": _usage(body, text)}).encode()


def _stream(body: Mapping[str, Any], fault: str | None, text: str) -> bytes:
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": body["model"]}
    pieces = [({"content": word}, None) for word in text.split(" ")] + [({}, _finish(fault))]
    chunks = [base | {"choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in pieces]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    return _http(200, "".join(lines).encode(), kind="text/event-stream")


async def _listen(server: Server, ready: Callable[[asyncio.AbstractEventLoop, asyncio.Event], None]) -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    listening = await loop.create_server(lambda: _Door(server), "127.0.0.1", 0, backlog=1024)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    ready(loop, over)
    await over.wait()
    listening.close()
    for door in server.doors:
        door.transport.abort()
    await asyncio.sleep(0)  # their sockets are closed in the loop's next round


@contextmanager
def serving(manners: Manners | None = None) -> Iterator[Server]:
    """A server in a thread of this process, gone at the end."""
    server, up = Server(manners or Manners()), threading.Event()
    control: list[Any] = []

    def ready(*loop_and_end: Any) -> None:
        control.extend(loop_and_end)
        up.set()

    thread = threading.Thread(target=lambda: asyncio.run(_listen(server, ready)), daemon=True)
    thread.start()
    assert up.wait(30)
    loop, over = control
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


@contextmanager
def apart(*words: str) -> Iterator[str]:
    """A server in a process of its own, which outlives clients that are killed. Its address."""
    process = subprocess.Popen([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def told(url: str) -> dict[str, Any]:
    """The counts of a server, asked over its own door."""
    with urllib.request.urlopen(url) as answer:
        counts: dict[str, Any] = json.load(answer)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=[], help="NAME=SHARE")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=2.0)
    parser.add_argument("--retry-after", type=float, default=0.05)
    parser.add_argument("--room", type=int)
    parser.add_argument("--forgetful", action="store_true")
    parser.add_argument("--answer", help="MODULE:FUNCTION of the request's body -> the reply's text")
    given = vars(parser.parse_args())
    given["faults"] = {name: float(share) for name, _, share in (word.partition("=") for word in given["faults"])}
    if given["answer"]:
        module, _, name = given["answer"].partition(":")
        given["answer"] = getattr(__import__(module, fromlist=[name]), name)
    server = Server(Manners(**given))
    asyncio.run(_listen(server, lambda *_: print(server.url, flush=True)))


if __name__ == "__main__":
    main()
