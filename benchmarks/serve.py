"""Many users at once: llavakit's engine, the same assistant one request after the other, and ``transformers serve``, on the same weights.

    python benchmarks/serve.py            CLIP-L/14-336 + 0.5B decoder, random weights, CPU, bf16      about half an hour
    python benchmarks/serve.py --quick    a toy, to see that it runs

    throughput of eight users, against transformers serve       target: 2 times
    first word about a picture seen before, against it          target: 2 times sooner
    first word of a third turn, against it                      target: 10 times sooner

Eight users ask about eight photographs at the same moment; no photograph is ever shown twice, but where the row says so. transformers
serves pictures one request after the other (its continuous batching is for text alone) and remembers nothing between requests. Rounds
take turns; medians, with the least and the most. The engine is asked in its own process, transformers through HTTP on this machine, which
costs milliseconds of seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import httpx
import torch
from fixture import FULL, QUESTION, QUICK, Shape, photograph, write_checkpoint
from measure import Times, faster, take_turns

from llavakit.assistant import Assistant
from llavakit.serve.engine import AssistantEngine
from llavakit.serve.protocol import Ask, End
from llavakit.types import Conversation, Image, Sampling, assistant, encode_data_url, user

USERS = 8


@dataclass(frozen=True)
class Answer:
    """A reply: its words and the seconds to the first of them."""

    text: str
    first: float


class Side(Protocol):
    async def ask(self, talk: Conversation, new: int) -> Answer: ...


class Engine:
    """``AssistantEngine``."""

    def __init__(self, assistant: Assistant) -> None:
        self.engine = AssistantEngine.start(assistant)

    async def ask(self, talk: Conversation, new: int) -> Answer:
        start, first, words = time.perf_counter(), 0.0, []
        async for item in await self.engine.submit(Ask(conversation=talk, sampling=Sampling(max_new_tokens=new))):
            if isinstance(item, End):
                assert item.finish == "length", item
                break
            first = first or time.perf_counter() - start
            words.append(item.text)
        return Answer("".join(words), first)


class OneByOne:
    """``Assistant.reply``, a request after the other."""

    def __init__(self, assistant: Assistant) -> None:
        self.assistant = assistant
        self._turn = asyncio.Lock()

    async def ask(self, talk: Conversation, new: int) -> Answer:
        start, first, words = time.perf_counter(), 0.0, []
        async with self._turn:
            for piece in self.assistant.reply(talk, Sampling(max_new_tokens=new)):
                first = first or time.perf_counter() - start
                words.append(piece)
        return Answer("".join(words), first)


class TransformersServe:
    """``transformers serve`` in a process of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url

    async def ask(self, talk: Conversation, new: int) -> Answer:
        how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        messages = [
            {"role": message.role, "content": [_part(part) for part in message.parts] if message.images else message.text}
            for message in talk.messages
        ]
        body = {"model": str(self.folder), "messages": messages, "stream": True, "generation_config": json.dumps(how)}
        start, first, words = time.perf_counter(), 0.0, []
        async with (
            httpx.AsyncClient(timeout=3600, trust_env=False) as client,
            client.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response,
        ):
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if choices and (text := choices[0]["delta"].get("content")):
                    first = first or time.perf_counter() - start
                    words.append(text)
        return Answer("".join(words), first)


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": {"url": encode_data_url(part)}}
    return {"type": "text", "text": part.text}


@contextmanager
def served_by_transformers(folder: Path) -> Iterator[TransformersServe]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
    options = ["serve", str(folder), "--device", "cpu", "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    process = subprocess.Popen([*line, *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, "transformers serve has ended"
            try:
                if httpx.get(f"{url}/health", timeout=1, trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield TransformersServe(folder, url)
    finally:
        process.terminate()
        process.wait(30)


class Asked:
    """Questions that nobody asked before."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def fresh(self) -> Conversation:
        """About a photograph that nobody has shown."""
        number = next(self._numbers)
        return Conversation.ask(f"w{number} {QUESTION}", Image(photograph(number)))


async def together(side: Side, talks: list[Conversation], new: int) -> float:
    """Seconds until all who asked at the same moment have their whole reply."""
    start = time.perf_counter()
    answers = await asyncio.gather(*(side.ask(talk, new) for talk in talks))
    spent = time.perf_counter() - start
    assert all(len(answer.text.split()) > 0.8 * new for answer in answers), "replies of one length: a word is a token"
    return spent


async def turns(side: Side, talk: Conversation, new: int) -> list[float]:
    """Seconds to the first word in: a first turn, a second about the same, a third; and another conversation about the first picture."""
    spent = []
    pictures = talk.images
    for number in range(3):
        answer = await side.ask(talk, new)
        spent.append(answer.first)
        talk = talk.then(assistant(answer.text)).then(user(f"w{number + 31} {QUESTION}"))
    again = await side.ask(Conversation.ask(f"w77 {QUESTION}", *pictures), new)
    return [*spent, again.first]


def report(name: str, times: dict[str, Times], tokens: int | None = None, target: float | None = None) -> None:
    """``target``: how many times faster the first side means to be than the last."""
    print(f"\n{name}")
    for side, one in times.items():
        rate = f"  {tokens / one.median:7.1f} tokens/s" if tokens else ""
        print(f"  {side:20} {one.median:8.3f} s  [{one.least:.3f} - {one.most:.3f}]{rate}")
    first = next(iter(times))
    for side in list(times)[1:]:
        gain = faster(times[side], times[first])
        met = "" if target is None or side != list(times)[-1] else f"  target {target:g} {'met' if gain.median >= target else 'MISSED'}"
        print(f"  {first} / {side}: {gain.median:.2f} times faster  [{gain.least:.2f} - {gain.most:.2f}]{met}")


def measured(loop: asyncio.AbstractEventLoop, work: Callable[[], Coroutine[Any, Any, float]]) -> Callable[[int], float]:
    return lambda _: loop.run_until_complete(work())


def throughput(loop: asyncio.AbstractEventLoop, sides: dict[str, Side], asked: Asked, new: int, rounds: int) -> None:
    def work(side: Side) -> Callable[[int], float]:
        return measured(loop, lambda: together(side, [asked.fresh() for _ in range(USERS)], new))

    report(
        f"{USERS} users, {USERS} photographs, replies of {new} tokens",
        take_turns({n: work(s) for n, s in sides.items()}, rounds),
        USERS * new,
        target=2,
    )


def first_words(loop: asyncio.AbstractEventLoop, sides: dict[str, Side], asked: Asked, new: int, rounds: int) -> None:
    spent: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            found = loop.run_until_complete(turns(side, asked.fresh(), new))
            if number:
                spent[name].append(found)
    kinds = (("a first question", None), ("second turn", None), ("third turn", 10), ("the same picture, another question", 2))
    for place, (what, target) in enumerate(kinds):
        times = {name: Times(tuple(one[place] for one in rows)) for name, rows in spent.items()}
        report(f"time to the first word: {what}", times, target=target)
    rows = spent[next(iter(sides))]
    for place, what in ((2, "third turn"), (3, "repeated picture")):
        shares = [row[place] / row[0] for row in rows]
        print(f"  engine, {what} / first question: {statistics.median(shares):.3f}  [{min(shares):.3f} - {max(shares):.3f}]")


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--quick", action="store_true")
    reader.add_argument("--rounds", type=int, default=0)
    reader.add_argument("--new", type=int, nargs="*", default=[])
    reader.add_argument("--folder", type=Path, help="keep the checkpoint here")
    asked = reader.parse_args()
    shape: Shape = QUICK if asked.quick else FULL
    rounds = asked.rounds or (2 if asked.quick else 3)
    lengths = asked.new or ([16] if asked.quick else [64, 256])
    with tempfile.TemporaryDirectory() as scratch:
        folder = (asked.folder or Path(scratch)) / shape.name.replace("/", "-").replace(" ", "_")
        if not folder.exists():
            write_checkpoint(folder, shape, torch.bfloat16)
        print(f"{shape.name}, {torch.get_num_threads()} threads, {rounds} rounds")
        helper = Assistant.load(folder, dtype="bf16", device="cpu")
        helper.stop_ids = frozenset()
        loop, questions = asyncio.new_event_loop(), Asked()
        with served_by_transformers(folder) as peer:
            engine = Engine(helper)
            sides: dict[str, Side] = {"engine": engine, "one by one": OneByOne(helper), "transformers serve": peer}
            for new in lengths:
                throughput(loop, sides, questions, new, rounds)
            first_words(loop, sides, questions, lengths[0], rounds)
            print(f"\n{engine.engine.stats()}")
            loop.run_until_complete(engine.engine.drain(0))


if __name__ == "__main__":
    main()
