"""What an engine is to those who speak HTTP: asked once, read piece by piece, given up at any time.

    Engine.submit(Ask) -> Reply -- iterated --> Piece, Piece, ..., End
                            '-- cancel() -------------------------'

``submit`` counts exactly before it promises: what cannot be replied to is refused with an error, what does not fit into the queue with a
``BusyError`` that says when to come back. Nothing here imports torch, so that the border is tested with a scripted engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal, Protocol

from llavakit.errors import LlavaError
from llavakit.types import Conversation, Sampling

Detail = Literal["auto", "low", "high"]
Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """An open conversation and how to reply. ``detail`` low: base views only, as in OpenAI's ``image_url.detail``."""

    conversation: Conversation
    sampling: Sampling
    detail: Detail = "auto"
    fitted: bool = False
    "Nobody asked for ``max_new_tokens``: where the context leaves less, the reply may be that long, and at least one token."


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New text, and how many tokens were read for it (0 while the writer holds back half a character or half a stop string)."""

    text: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class End:
    """Always the last thing a reply gives. ``cached_tokens`` of the prompt were in memory already."""

    finish: Finish
    prompt_tokens: int
    reply_tokens: int
    cached_tokens: int = 0
    error: LlavaError | None = None


class Reply(Protocol):
    """One reply under way. Read by one reader; ``cancel`` may be called from any thread, twice, or after the end."""

    id: str
    prompt_tokens: int
    image_tokens: int

    def __aiter__(self) -> AsyncIterator[Piece | End]: ...

    def cancel(self) -> None:
        """Stop computing within one step; ``End(finish="cancelled")`` follows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an engine is doing and has done, for ``/metrics``. Counters only grow."""

    running: int
    waiting: int
    kv_bytes: int
    kv_limit: int
    feature_bytes: int
    feature_limit: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reply_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    "Turned away because the queue was full."
    feature_hits: int = 0
    feature_misses: int = 0
    steps: int = 0


class Engine(Protocol):
    """A model that replies to many at once. Made in one thread, asked from any."""

    model_id: str
    context: int
    "Tokens of prompt and reply together."

    def check_room(self, coming: int = 0) -> None:
        """Raises BusyError where ``coming`` others fill what is left: a glance, for requests of which nothing has been read."""
        ...

    async def submit(self, ask: Ask) -> Reply:
        """Count, admit, begin.

        Raises PromptError, ImageError, ContextError, SamplingError; BusyError when the queue is full or draining.
        """
        ...

    def stats(self) -> Stats: ...

    async def drain(self, grace: float) -> None:
        """Take nothing more, let what runs end within ``grace`` seconds, cancel the rest, stop the thread."""
        ...

    @property
    def alive(self) -> bool:
        """False when the engine's thread has died: the process should end and be started anew."""
        ...
