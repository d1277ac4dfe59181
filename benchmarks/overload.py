"""Ten times as many requests as a server can serve: how soon is told who must come back later, and does everybody else get his reply?

    python benchmarks/overload.py [--model tiny] [--seconds 20] [--times 10]      `llava serve MODEL` in a process of its own

First eight clients ask one request after the other: that is what the server can do. Then requests arrive at random moments, ``times`` as
many a second, each with a photograph (of 32) and a question of its own. Asked is hardening S2: 503 with Retry-After within 50 ms of
the request, whoever is taken gets his reply, and afterwards the server replies as before. The clients share the machine with the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from functools import cache

from fixture import photograph

NEW = 32  # tokens a reply
PROMISED = 0.05
PHOTOGRAPHS = 32


@dataclass(frozen=True)
class Answer:
    """Status, whether it says when to come back, and seconds from the sent head to the first byte and to the last."""

    status: int
    code: str
    retry_after: bool
    first: float
    whole: float


@cache
def body(port: int, shown: int) -> tuple[bytes, bytes]:
    """Before and behind the number of a request."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    picture = base64.b64encode(photograph(shown)).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        {"type": "text", "text": "What is in the picture? NUMBER"},
    ]
    whole = json.dumps({"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": NEW}).encode()
    before, behind = whole.split(b"NUMBER")
    return before, behind


def request(port: int, number: int) -> bytes:
    before, behind = body(port, number % PHOTOGRAPHS)
    words = before + str(number).encode() + behind
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(words)}\r\n\r\n"
    )
    return head.encode() + words


async def ask(port: int, number: int) -> Answer:
    sent = request(port, number)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.perf_counter()
    writer.write(sent)
    answer = await reader.readuntil(b"\r\n\r\n")
    first = time.perf_counter() - begun
    length = next(int(line.split(b":")[1]) for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length"))
    said = json.loads(await reader.readexactly(length))
    spent = time.perf_counter() - begun
    writer.close()
    return Answer(int(answer.split()[1]), said.get("error", {}).get("code", ""), b"retry-after" in answer.lower(), first, spent)


async def capacity(port: int, seconds: float, clients: int = 8) -> float:
    """Requests a second when nobody waits in vain."""
    ends, served, numbers = time.perf_counter() + seconds, 0, iter(range(10**6, 2 * 10**6))

    async def client() -> None:
        nonlocal served
        while time.perf_counter() < ends:
            answer = await ask(port, next(numbers))
            assert answer.status == 200, answer
            served += 1

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return served / (time.perf_counter() - begun)


async def storm(port: int, rate: float, seconds: float) -> list[Answer | BaseException]:
    """Requests at random moments, ``rate`` a second."""
    dice, under_way, at = random.Random(0), [], time.perf_counter()
    ends = at + seconds
    while at < ends:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        under_way.append(asyncio.create_task(ask(port, len(under_way))))
        at += dice.expovariate(rate)
    return await asyncio.gather(*under_way, return_exceptions=True)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def told(answers: list[Answer | BaseException]) -> bool:
    lost = [answer for answer in answers if isinstance(answer, BaseException)]
    sound = [answer for answer in answers if isinstance(answer, Answer)]
    refused = sorted(answer.first for answer in sound if answer.status == 503)
    served = sorted(answer.whole for answer in sound if answer.status == 200)
    other = [answer for answer in sound if answer.status not in (200, 503)]
    silent = sum(answer.status == 503 and not answer.retry_after for answer in sound)
    print(f"{len(answers)} requests: {len(served)} served, {len(refused)} told to come back, {len(other)} other answers, {len(lost)} lost")
    for kind, times in (("refused", refused), ("served", served)):
        if times:
            p50, p90, p99 = (1e3 * times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.9, 0.99))
            print(f"  {kind:8} p50 {p50:7.1f} ms   p90 {p90:7.1f}   p99 {p99:7.1f}   most {1e3 * times[-1]:7.1f}")
    late = sum(seconds > PROMISED for seconds in refused)
    print(f"  {late} refusals took longer than {1e3 * PROMISED:.0f} ms, {silent} did not say when to come back")
    for error in lost[:3]:
        print(f"  lost: {error!r}")
    return not (late or silent or lost or other)


async def run(port: int, seconds: float, times: float) -> None:
    for shown in range(PHOTOGRAPHS):
        body(port, shown)
    await capacity(port, seconds / 4)  # once to warm up
    alone = [await ask(port, 3 * 10**6 + number) for number in range(5)]
    can = await capacity(port, seconds / 2)
    print(f"alone {1e3 * statistics.median(answer.whole for answer in alone):.0f} ms a reply; eight clients: {can:.1f} replies a second")
    met = told(await storm(port, times * can, seconds))
    after = await ask(port, 4 * 10**6)
    print(f"afterwards: {after.status} in {1e3 * after.whole:.0f} ms; S2 {'met' if met and after.status == 200 else 'MISSED'}")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--model", default="tiny")
    reader.add_argument("--seconds", type=float, default=20.0)
    reader.add_argument("--times", type=float, default=10.0)
    asked = reader.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "llavakit", "serve", asked.model, "--port", str(port)]
    server = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not ready(port):
            assert server.poll() is None, "the server has ended"
            time.sleep(0.1)
        asyncio.run(run(port, asked.seconds, asked.times))
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
