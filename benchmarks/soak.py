"""Does serving keep its size? Thousands of mixed requests with new pictures, some given up in the middle, and the memory of the process.

    python benchmarks/soak.py [--requests 10000]      the built-in miniature; prints the resident size as it goes

After a quarter of the requests (everything remembered is as large as it may be) the size must stay within 2 %.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

import PIL.Image

from llavakit.assistant import Assistant
from llavakit.serve.engine import AssistantEngine
from llavakit.serve.protocol import Ask, Detail, End
from llavakit.serve.room import Limits
from llavakit.types import Conversation, Sampling, assistant, user

USERS = 12


def resident() -> int:
    """MiB of memory that this process has now."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) // 1024


def new_picture(dice: random.Random) -> PIL.Image.Image:
    size = dice.randint(20, 500), dice.randint(20, 500)
    return PIL.Image.frombytes("RGB", size, dice.randbytes(3 * size[0] * size[1]))


async def one(engine: AssistantEngine, dice: random.Random) -> None:
    """A conversation of one to three turns."""
    talk = Conversation.ask("What is in the picture?", *(new_picture(dice) for _ in range(dice.randint(0, 2))))
    for _ in range(dice.randint(1, 3)):
        detail: Detail = dice.choice(("auto", "low"))
        sampling = Sampling(max_new_tokens=dice.randint(1, 40), temperature=dice.choice((0, 1)), seed=dice.randint(0, 99))
        reply = await engine.submit(Ask(conversation=talk, sampling=sampling, detail=detail))
        words = []
        async for item in reply:
            if isinstance(item, End):
                assert item.finish != "error", item.error
                break
            words.append(item.text)
            if dice.random() < 0.02:
                reply.cancel()
        talk = talk.then(assistant("".join(words).replace("\0", "") or "Yes.")).then(user("And what else?"))


async def run(requests: int) -> None:
    limits = Limits(running=8, kv_bytes=64 << 20, feature_bytes=8 << 20, request_bytes=64 << 20)  # full soon: what is kept is no growth
    engine = AssistantEngine.start(Assistant.load(), limits=limits)
    dice = random.Random(0)
    sizes: list[int] = []

    async def user_of(number: int) -> None:
        mine = random.Random(number)
        while engine.stats().finished < requests:
            await one(engine, mine)

    async def watch() -> None:
        while (done := engine.stats().finished) < requests:
            if done >= len(sizes) * requests / 20:
                sizes.append(resident())
                print(f"{done:7} replies  {sizes[-1]} MiB  {engine.stats()}", flush=True)
            await asyncio.sleep(0.2)

    await asyncio.gather(watch(), *(user_of(dice.randint(0, 10**9)) for _ in range(USERS)))
    later = sizes[len(sizes) // 4 :]
    print(f"after a quarter: {min(later)} to {max(later)} MiB, {100 * (max(later) / later[0] - 1):+.1f} % at most")
    await engine.drain(5)


if __name__ == "__main__":
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--requests", type=int, default=10_000)
    asyncio.run(run(reader.parse_args().requests))
