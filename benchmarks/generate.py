"""Asking a server 10,000 questions: ``python benchmarks/generate.py [--count N] [--rounds N] [--concurrency N] [--latency SECONDS]``.

The server is a process of its own on this machine that does nothing but wait (tests/misbehaving.py without faults). Bound by latency
alone it would take count * latency / concurrency seconds. The official client costs CPU for every call, so it is measured as well:

    client         AsyncOpenAI and a semaphore, nothing else: no ledger, no retries, replies thrown away
    ours           ask_all over our own wire for plain http: ledger with fsync, judge, pace               goal: 1.5 times the bound
    ours-official  the same over the official client in lanes of 32, as https takes it                    goal: 1.5 times "client"

Each run is a process of its own, the sides take turns. Memory is what the process holds after a fifth of the questions and at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavakit.responder import Ledger, Limits, Progress, Query, ServerCompleter, ask_all
from llavakit.types import Conversation, Sampling

SERVER = Path(__file__).parent.parent / "tests" / "misbehaving.py"
SIDES = ("client", "ours", "ours-official")
CONTEXT = " ".join(f"person: [0.{n:03d}, 0.200, 0.300, 0.400]" for n in range(20))  # as long as a picture's boxes


def queries(count: int) -> Iterator[Query]:
    for number in range(count):
        asked = Conversation.ask(f"Picture {number}. {CONTEXT}")
        yield Query(id=str(number), conversation=asked, sampling=Sampling(seed=number, temperature=0.7))


def resident() -> float:
    """Megabytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def client(url: str, count: int, concurrency: int) -> None:
    """The official client, well used: one client whose pool has room for all, one semaphore."""
    import openai

    gate, waiting = asyncio.Semaphore(concurrency), set()
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as asked:

        async def one(query: Query) -> None:
            try:
                said: Any = query.conversation.to_openai()
                await asked.chat.completions.create(model="teacher", messages=said, seed=query.sampling.seed, temperature=0.7)
            finally:
                gate.release()

        for query in queries(count):
            await gate.acquire()
            task = asyncio.create_task(one(query))
            waiting.add(task)
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)


def ours(url: str, count: int, concurrency: int, folder: Path, *, direct: bool) -> list[float]:
    """Our pool; memory along the way."""
    held: list[float] = []

    def look(progress: Progress) -> None:
        if progress.done >= count * (len(held) + 1) / 5:
            held.append(resident())

    completer = ServerCompleter("teacher", base_url=url, direct=direct)
    with Ledger(folder / "ledger.sqlite") as ledger:
        outcome = ask_all(queries(count), completer, ledger, limits=Limits(concurrency=concurrency), on_progress=look)
        assert outcome.progress.accepted == ledger.spent("teacher").replies == count
    return [*held, resident()]


def run_side(side: str, url: str, count: int, concurrency: int) -> dict[str, Any]:
    """In this process: seconds, CPU seconds, memory."""
    import openai  # importing it is not what is measured
    import openai.resources.chat  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        began, cpu = time.perf_counter(), time.process_time()
        held = [0.0, 0.0]
        if side == "client":
            asyncio.run(client(url, count, concurrency))
        else:
            held = ours(url, count, concurrency, Path(folder), direct=side == "ours")
        return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "held": held}


def measured(side: str, given: argparse.Namespace) -> dict[str, Any]:
    """One run with a fresh server."""
    with subprocess.Popen([sys.executable, str(SERVER), "--latency", str(given.latency)], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            url = server.stdout.readline().strip()
            words = [sys.executable, __file__, "--side", side, "--url", url, "--count", str(given.count)]
            done = subprocess.run([*words, "--concurrency", str(given.concurrency)], check=True, stdout=subprocess.PIPE, text=True)
            with urllib.request.urlopen(url) as answer:
                counts = json.load(answer)
        finally:
            server.kill()
    assert counts["calls"] == given.count
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"server": counts["cpu_seconds"], "at_once": counts["most_under_way"]}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run_side(given.side, given.url, given.count, given.concurrency)))
        return
    bound = given.count * given.latency / given.concurrency
    print(f"{given.count} questions, {given.concurrency} at once, {given.latency * 1000:g} ms each: {bound:.2f} s by latency alone")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in given.only}
    for number in range(given.rounds):
        for side in list(runs)[:: -1 if number % 2 else 1]:
            runs[side].append(measured(side, given))
    for side, found in runs.items():
        seconds = [run["seconds"] for run in found]
        each, server = ([run[name] / given.count * 1000 for run in found] for name in ("cpu", "server"))
        most = max(run["at_once"] for run in found)
        print(f"{side:13} {spread(seconds)} s, {spread([s / bound for s in seconds])} of the bound; at most {most} at once")
        print(f"{'':13} CPU {spread(each)} ms a question, the server's {spread(server)}")
        if side != "client":
            held = ", ".join(f"{run['held'][0]:.0f} -> {run['held'][-1]:.0f}" for run in found)
            print(f"{'':13} memory {held} MB")
        if side != "client" and "client" in runs:
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(found, runs["client"], strict=True)]
            print(f"{'':13} {spread(ratios)} of the bare client's time")


if __name__ == "__main__":
    main()
