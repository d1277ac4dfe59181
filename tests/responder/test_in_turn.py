"""Our own model where many are asked: one reply after another, in a thread that does not outlive its use; and it goes through the pool."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from simulated import question, questions

from llavakit.responder import InTurn, Ledger, Limits, ScriptedResponder, ask_all
from llavakit.types import Conversation, Sampling


class Slow:
    """A responder that counts how many replies it is at."""

    def __init__(self, pieces: int) -> None:
        self.pieces, self.at, self.most, self.said = pieces, 0, 0, 0

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        self.at += 1
        self.most = max(self.most, self.at)
        try:
            for _ in range(self.pieces):
                time.sleep(0.002)
                self.said += 1
                yield f"{conversation.messages[-1].text} "
        finally:
            self.at -= 1


def test_one_after_another(tmp_path: Path) -> None:
    slow = Slow(2)
    with Ledger(tmp_path / "l.sqlite") as ledger:
        outcome = ask_all(questions(30), InTurn(slow, "tiny@abc"), ledger, limits=Limits(concurrency=16))
        found = ledger.get(question(3).key("tiny@abc"))
    assert slow.most == 1
    assert outcome.progress.accepted == 30
    assert outcome.progress.spent.uncounted == 30
    assert found is not None
    assert (found.text, found.model) == ("What is 3? What is 3? ", "tiny@abc")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("responder", "ledger"))]


def test_a_script_replies_in_order(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger:
        ask_all(questions(4), InTurn(ScriptedResponder(f"reply {n}" for n in range(4)), "script"), ledger)
        assert [(name, reply.text) for _, name, reply in ledger.replies()] == [(f"q{n}", f"reply {n}") for n in range(4)]


def test_a_reply_that_nobody_waits_for_ends_soon() -> None:
    slow = Slow(100_000)

    async def work() -> None:
        completer = InTurn(slow, "tiny")
        task = asyncio.create_task(completer.complete(question(1)))
        await asyncio.sleep(0.05)
        task.cancel()
        await completer.close()

    asyncio.run(work())
    assert slow.at == 0
    assert slow.said < 10_000
