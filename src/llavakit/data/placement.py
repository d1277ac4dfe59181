"""Where the picture stands beside the words of its turn, as a value (spec 3.4).

    as_data    as the file has it
    random     the papers' rule for the first turn: [X_q, X_v] or [X_v, X_q], a coin thrown once for each sample
    first      the original's trainer from v1.0.0 on: every turn with a picture becomes picture, newline, words

    words, then picture    Q\\n[picture]         picture, then words    [picture]\\nQ

The coin is a pure function of (seed, sample id): the same in every epoch, on every rank and after a resume, as in a released file, where
it fell once. Words lose the blanks at both ends, as the original strips them; a turn without words is the picture alone.

Only a turn with exactly one picture is moved. With several, the original's rule keeps one marker and drops the others while all the
pictures stay queued, so that every later picture lands on a wrong place (spec 8, trap 28). Here such a turn stays as it is, under
``random`` and under ``first``: no picture is lost and interleaved words keep their meaning, which is what the original's successor does.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from llavakit.types import Conversation, Message, Part, Text

Placement = Literal["as_data", "random", "first"]


def place(conversation: Conversation, placement: Placement, *, seed: int = 0, sample_id: str = "") -> Conversation:
    """The conversation with its pictures where ``placement`` says; ``seed`` and ``sample_id`` matter to "random" alone."""
    if placement == "as_data":
        return conversation
    if placement == "first":
        return Conversation(tuple(_moved(message, picture_first=True) for message in conversation.messages))
    assert placement == "random", placement
    opening = next((at for at, message in enumerate(conversation.messages) if message.role == "user"), None)
    if opening is None:
        return conversation
    messages = list(conversation.messages)
    messages[opening] = _moved(messages[opening], picture_first=heads(seed, sample_id))
    return Conversation(tuple(messages))


def heads(seed: int, sample_id: str) -> bool:
    """A fair coin that always falls the same way for the same sample."""
    return bool(hashlib.sha256(f"{seed}:{sample_id}".encode("utf-8", "surrogatepass")).digest()[0] & 1)


def _moved(message: Message, *, picture_first: bool) -> Message:
    if len(message.images) != 1:
        return message
    picture, words = message.images[0], message.text.strip()
    parts: tuple[Part, ...] = (picture,)
    if words:
        parts = (picture, Text("\n" + words)) if picture_first else (Text(words + "\n"), picture)
    return Message(message.role, parts)
