"""What is served, and in which state the process is. One for a process; every route asks it.

loading --add--> ready --drain--> draining            an engine's thread has died: failed, from anywhere
/ready 503       200              503                 503
/health 200      200              200                 503
asking  503      engines          503                 503
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from llavakit.serve.faults import busy, refuse
from llavakit.serve.fetch import Remote
from llavakit.serve.limits import Limits
from llavakit.serve.metrics import Metrics
from llavakit.serve.protocol import Engine

State = Literal["loading", "ready", "draining", "failed"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve. ``key``: who knows it may ask. ``remote``: which pictures are fetched; None: none at all."""

    key: str | None = None
    limits: Limits = field(default_factory=Limits)
    remote: Remote | None = None
    hosts: tuple[str, ...] = ()
    "Names under which browsers may call this server; empty: any. A page elsewhere must not speak to a server on 127.0.0.1."
    ping: float = 15.0
    "Seconds without a piece after which a stream says that it is alive."


class Service:
    """The engines by the names under which they are served; the first is what ``/v1/models`` lists first."""

    def __init__(self, engines: Mapping[str, Engine] | None = None, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.engines: dict[str, Engine] = dict(engines or {})
        self.metrics = Metrics()
        self.started = int(time.time())
        self._draining = False
        self._under_way = 0
        self._coming: Counter[str] = Counter()
        self._idle = asyncio.Event()

    @property
    def state(self) -> State:
        if not all(engine.alive for engine in self.engines.values()) and not self._draining:
            return "failed"
        if self._draining:
            return "draining"
        return "ready" if self.engines else "loading"

    @property
    def under_way(self) -> int:
        """Requests for a reply that have not ended."""
        return self._under_way

    def add(self, name: str, engine: Engine) -> None:
        self.engines[name] = engine

    def engine(self, name: str) -> Engine:
        """Whom to ask. Raises BusyError while there is nobody, RequestError for a name that is not served."""
        self.check_ready()
        if name not in self.engines:
            served = ", ".join(sorted(self.engines))
            what = f"no model {name[:100]!r} is served here"
            raise refuse(what, code="model_not_found", where="model", remedy=f"served: {served}", status=404)
        return self.engines[name]

    def check_ready(self) -> None:
        """Raises BusyError unless requests are taken."""
        match self.state:
            case "loading":
                raise busy("the model is still being loaded", code="model_loading", retry_after=2)
            case "draining":
                raise busy("the server is about to stop", code="shutting_down", retry_after=5)
            case "failed":
                raise busy("the engine has died and the server is about to be started anew", code="engine_dead", retry_after=10)

    def check_room(self) -> None:
        """For a request of which nothing has been read. Raises BusyError where it would be turned away in any case."""
        self.check_ready()
        if len(self.engines) == 1:
            ((name, engine),) = self.engines.items()
            engine.check_room(self._coming[name])

    @contextmanager
    def coming(self, name: str) -> Iterator[Engine]:
        """Around the work on a request before its engine knows of it: who comes meanwhile finds less room. Raises what ``engine`` raises,
        and BusyError where there is none."""
        engine = self.engine(name)
        engine.check_room(self._coming[name])
        self._coming[name] += 1
        try:
            yield engine
        finally:
            self._coming[name] -= 1

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Around a request for a reply: a drain waits for it."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    def refuse_more(self) -> None:
        """From now on ``/ready`` and every new request is answered 503."""
        self._draining = True

    async def drain(self, grace: float) -> None:
        """Take nothing more, let what runs end within ``grace`` seconds, and stop the engines."""
        self.refuse_more()
        ends = time.monotonic() + grace
        if self._under_way:
            self._idle.clear()
            try:
                async with asyncio.timeout(grace):
                    await self._idle.wait()
            except TimeoutError:
                pass
        left = max(0.0, ends - time.monotonic()) if self._under_way else 0.0
        await asyncio.gather(*(engine.drain(left) for engine in self.engines.values()))
