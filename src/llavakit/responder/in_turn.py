"""Our own model, or any other ``Responder``, where many questions are asked: it replies to one after another, in a thread of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from llavakit.responder.protocol import Completion, Query, Responder


class InTurn:
    """A ``Completer`` over a ``Responder``. ``name`` must say which weights reply: it goes into keys and provenance.

    A responder gives text and says neither why it ended nor what it counted: ``finish`` is "stop" and ``usage`` None.
    """

    at_once = 1

    def __init__(self, responder: Responder, name: str) -> None:
        self.responder, self.name = responder, name
        self._thread: ThreadPoolExecutor | None = None

    async def complete(self, query: Query) -> Completion:
        self._thread = self._thread or ThreadPoolExecutor(max_workers=1, thread_name_prefix="responder")
        unwanted = Event()
        try:
            text = await asyncio.get_running_loop().run_in_executor(self._thread, self._reply, query, unwanted)
        finally:
            unwanted.set()  # a reply that nobody waits for any more ends with its next piece
        return Completion(text=text, finish="stop", model=self.name)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread:  # waited for elsewhere: those who want no reply any more must be able to say so meanwhile
            await asyncio.to_thread(thread.shutdown, cancel_futures=True)

    def _reply(self, query: Query, unwanted: Event) -> str:
        pieces: list[str] = []
        for piece in self.responder.reply(query.conversation, query.sampling):
            if unwanted.is_set():
                break
            pieces.append(piece)
        return "".join(pieces)
