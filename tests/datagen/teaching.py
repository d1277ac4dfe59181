"""A scripted teacher for tests: whatever it is told in the form of the three kinds, it answers in that form and with nothing of its own."""

from __future__ import annotations

from typing import Any

from llavakit.datagen.kinds import Prompts
from llavakit.datagen.parse import write

_KINDS = {Prompts.load().of(kind).system: kind for kind in ("conversation", "detail", "reasoning", "answer", "filter")}


def answer(body: dict[str, Any]) -> str:
    """The reply to a request as the server gets it."""
    messages = body["messages"]
    asked = messages[-1]["content"]
    text = asked if isinstance(asked, str) else "".join(part.get("text", "") for part in asked)
    return say(_KINDS[messages[0]["content"]], text, seed=body.get("seed"))


def say(kind: str, text: str, *, seed: int | None = None) -> str:
    """From the captions: the lines before the first empty one."""
    captions = text.strip().split("\n\n")[0].split("\n")
    if kind == "filter":
        return "KEEP"
    if kind == "answer":
        return f"About {text.strip()!r}: that can be seen."
    if kind == "detail":
        return " ".join(caption.rstrip(".") + "." for caption in captions)
    told = f"It can be seen like this: {captions[-1].rstrip('.')}. Number {seed}."
    if kind == "reasoning":
        return write((("What might happen next?", told),))
    return write((("What is going on here?", captions[0]), ("How could one put it in other words?", told)))
