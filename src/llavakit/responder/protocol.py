"""Whoever replies: our model, a server, a script. One way to ask the model under evaluation, the teacher and the judge.

    Responder   reply(conversation)            one caller waits and reads along       chat, ask, evaluation of our own model
    Completer   await complete(query)          many questions are under way at once   data generation, judging, captioning

A ``Query`` is all that decides a reply. Its ``key`` names that reply in a ledger: another model, another prompt, another picture or
another seed is another key, so nothing old is ever taken for it (hardening G7).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

from llavakit.errors import ImageError
from llavakit.types import Conversation, Image, Message, Pixels, Sampling, Text

Finish = Literal["stop", "length", "filter", "cut"]
"""Why a reply ended: by itself, at its allowance, withheld by the server's filter, or the stream broke off."""


class Responder(Protocol):
    """Anything that answers an open conversation."""

    def reply(self, conversation: Conversation, sampling: Sampling = ...) -> Iterator[str]:
        """The reply as pieces of text, in order; joined they are the reply."""
        ...


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a reply cost, in tokens as the server counts them."""

    prompt_tokens: int
    reply_tokens: int


@dataclass(frozen=True, kw_only=True)
class Query:
    """One open conversation to be asked. ``id`` is the asker's own name for it and decides nothing."""

    id: str
    conversation: Conversation
    sampling: Sampling

    def key(self, model: str) -> str:
        """64 hexadecimal digits that stand for this question to this model: model, sampling, every word, every picture's bytes."""
        return hashlib.sha256(f"{self._asked}{model}".encode()).hexdigest()

    @cached_property
    def _asked(self) -> str:
        """The digest of all but the model, made once: pictures are read for it."""
        asked = {"sampling": vars(self.sampling), "messages": [_said(message) for message in self.conversation.messages]}
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def attempt(self, number: int) -> Query:
        """The same question for the ``number``-th time after a reply was rejected: with another seed, and so another key.

        The seed is drawn from the first one, not counted up, so that it never meets a neighbour's who asks the same with seed + 1.
        """
        if not number:
            return self
        drawn = hashlib.sha256(f"{self.sampling.seed}:{number}".encode()).digest()
        return replace(self, sampling=self.sampling.but(seed=int.from_bytes(drawn[:4], "big") >> 1))  # 31 bits: every server takes them


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole reply. ``model`` is what the replier calls itself; ``usage`` is None where it does not count."""

    text: str
    finish: Finish
    model: str
    usage: Usage | None = None


class Completer(Protocol):
    """Anything that can be asked many things at once. ``name`` goes into keys and provenance and holds no secret."""

    name: str
    at_once: int
    """How many questions it takes at a time."""

    async def complete(self, query: Query) -> Completion:
        """The whole reply. Raises ResponderError; which of its kinds says whether to wait, to skip this one or to stop."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads; the next question opens new ones."""
        ...


def _said(message: Message) -> list[object]:
    return [message.role, *(part.text if isinstance(part, Text) else [_digest(part)] for part in message.parts)]


def _digest(image: Image) -> str:
    """The hash of a picture's bytes: the file's for files, so that a renamed picture is the same question."""
    source = image.source
    if isinstance(source, Pixels):
        return hashlib.sha256(f"{source.width}x{source.height}:".encode() + source.rgb).hexdigest()
    try:
        return hashlib.sha256(source if isinstance(source, bytes) else source.read_bytes()).hexdigest()
    except OSError as error:
        remedy = "is the folder of pictures the right one?"
        raise ImageError(error.strerror or "cannot be read", code="image_not_found", where=str(source), remedy=remedy) from None
