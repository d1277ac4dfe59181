"""An engine without a model: it replies by script, one piece a beat, so that the border can be tested alone.

script(ask) -> ["I ", 0.01, "see", LlavaError(...)]      text is a piece, a number a pause in seconds, an error the end
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import count

from llavakit.errors import BusyError, ContextError, LlavaError
from llavakit.serve.protocol import Ask, End, Finish, Piece, Stats

Step = str | float | LlavaError
Script = Callable[[Ask], Sequence[Step]]
_NUMBERS = count()


def hello(ask: Ask) -> Sequence[Step]:
    return ["I ", "see ", f"{len(ask.conversation.images)} ", "pictures."]


class ScriptedReply:
    def __init__(self, engine: ScriptedEngine, ask: Ask) -> None:
        self.id, self._engine, self._ask = f"reply-{next(_NUMBERS)}", engine, ask
        self.image_tokens = 10 * len(ask.conversation.images)
        self.prompt_tokens = self.image_tokens + sum(len(message.text) for message in ask.conversation.messages)
        self.cancelled = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def cancel(self) -> None:
        self._engine.cancels += 1
        self._loop.call_soon_threadsafe(self.cancelled.set)

    async def __aiter__(self) -> AsyncIterator[Piece | End]:
        engine, told = self._engine, 0
        engine.running += 1
        finish: Finish = "cancelled"  # where nobody reads to the end
        error: LlavaError | None = None
        try:
            for step in engine.script(self._ask):
                if isinstance(step, LlavaError):
                    finish, error = "error", step
                    break
                if isinstance(step, str):
                    if told == self._ask.sampling.max_new_tokens:
                        finish = "length"
                        break
                    told += 1
                    engine.told += 1
                    yield Piece(text=step, tokens=1)
                    step = 0.0
                if await self._wait(step):
                    break
            else:
                finish = "stop"
        finally:
            engine.running -= 1
            engine.ended.append(finish)
        yield End(finish=finish, prompt_tokens=self.prompt_tokens, reply_tokens=told, cached_tokens=0, error=error)

    async def _wait(self, seconds: float) -> bool:
        """Whether the reply was given up meanwhile."""
        await asyncio.sleep(0)
        if not self.cancelled.is_set() and seconds:
            try:
                async with asyncio.timeout(seconds):
                    await self.cancelled.wait()
            except TimeoutError:
                pass
        return self.cancelled.is_set()


class ScriptedEngine:
    """``room``: how many replies may be under way; one more is refused with a BusyError."""

    def __init__(self, script: Script = hello, *, room: int = 1000, context: int = 2048) -> None:
        self.model_id, self.context, self.script, self.room = "scripted", context, script, room
        self.asked: list[Ask] = []
        self.replies: list[ScriptedReply] = []
        self.ended: list[Finish] = []
        self.running = self.refused = self.cancels = self.told = 0
        self.alive, self.drained = True, False

    def check_room(self, coming: int = 0) -> None:
        if self.running + coming >= self.room:
            self.refused += 1
            raise BusyError("the queue is full", code="overloaded", remedy="try again later")

    async def submit(self, ask: Ask) -> ScriptedReply:
        if self.running >= self.room or self.drained:
            self.refused += 1
            raise BusyError("the queue is full", code="overloaded", remedy="try again later")
        reply = ScriptedReply(self, ask)
        if reply.prompt_tokens + (1 if ask.fitted else ask.sampling.max_new_tokens) > self.context:
            raise ContextError(f"more than {self.context} tokens", code="context_length_exceeded", where="conversation")
        self.asked.append(ask)
        self.replies.append(reply)
        return reply

    def stats(self) -> Stats:
        return Stats(
            running=self.running, waiting=0, kv_bytes=1, kv_limit=4, feature_bytes=0, feature_limit=0, reply_tokens=self.told,
            refused=self.refused, finished=len(self.ended),
        )  # fmt: skip

    async def drain(self, grace: float) -> None:
        self.drained = True
        for reply in self.replies:
            reply.cancel()
