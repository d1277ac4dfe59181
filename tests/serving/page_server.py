"""A server with the chat page, in a thread: the real border, the built-in model, and replies by script where a test needs them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from scripted_engine import ScriptedEngine, ScriptedReply, Step

from llavakit.assistant import Assistant
from llavakit.model.generation import check_context, context_length
from llavakit.serve.api import build
from llavakit.serve.engine import AssistantEngine
from llavakit.serve.limits import Limits
from llavakit.serve.protocol import Ask
from llavakit.serve.service import Service, Settings
from llavakit.serve.web import PageSettings, Shown, routes
from llavakit.types import Sampling

LONG = "Tell me everything."  # a reply that takes its time
UNSAFE = "Write a page."
HTML = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> **bold** `code` [a](javascript:alert(1))"


class SeeingEngine(ScriptedEngine):
    """Counts and refuses as the real one does, by the processor; replies by the model, or by script to the questions above."""

    def __init__(self, assistant: Assistant, *, context: int) -> None:
        super().__init__(self._speak, context=context)
        self.assistant = assistant

    def _speak(self, ask: Ask) -> Sequence[Step]:
        question = ask.conversation.messages[-1].text.strip()
        if question == LONG:
            return [step for number in range(1, 400) for step in (f"{number}, ", 0.03)]
        if question == UNSAFE:
            return [HTML]
        return [step for piece in self.assistant.reply(ask.conversation, ask.sampling) for step in (piece, 0.01)]

    async def submit(self, ask: Ask) -> ScriptedReply:
        tokens, _ = self.assistant.processor.count(ask.conversation)
        check_context(self.assistant.model, prompt=tokens, new=ask.sampling.max_new_tokens)
        inputs = self.assistant.processor.encode(ask.conversation, learn=False, room=ask.sampling.max_new_tokens)
        self.context, context = 1 << 30, self.context  # the processor has counted
        try:
            reply = await super().submit(ask)
        finally:
            self.context = context
        reply.image_tokens = sum(grid.tokens for grid in inputs.grids)
        reply.prompt_tokens = len(inputs.input_ids)
        return reply


@dataclass
class PageServer:
    """``start`` and ``stop`` may alternate; the port stays."""

    assistants: dict[str, Assistant]
    votes: Path | None = None
    key: str | None = None
    limits: Limits = field(default_factory=Limits)
    real: bool = False
    "Replies come from the real engine, not from the script."
    port: int = 0
    engines: dict[str, SeeingEngine] = field(default_factory=dict)
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        self.engines = {name: SeeingEngine(one, context=context_length(one.model)) for name, one in self.assistants.items()}
        shown = {name: Shown(processor=one.processor, model=one.model) for name, one in self.assistants.items()}
        settings = PageSettings(votes=self.votes, sampling=Sampling(max_new_tokens=96))

        def serve(listening: socket.socket) -> None:
            engines = (
                {name: AssistantEngine.start(one, model_id=name) for name, one in self.assistants.items()} if self.real else self.engines
            )
            service = Service(dict(engines), Settings(key=self.key, limits=self.limits))
            app = build(service, routes(service, shown, settings))
            self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            self._server.run([listening])

        listening = socket.create_server(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        self._thread = threading.Thread(target=serve, args=(listening,), daemon=True)
        self._thread.start()
        self._until(lambda: self._server is not None and self._server.started)

    def stop(self) -> None:
        assert self._server is not None
        assert self._thread is not None
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(10)
        self._server = None

    def _until(self, ready: object, seconds: float = 10.0) -> None:
        assert callable(ready)
        ends = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < ends, "the server does not start"
            time.sleep(0.02)

    def __enter__(self) -> PageServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError):
            self.stop()
