"""ScienceQA's inference of LLaVA v0: first the reasoning, then the letter (spec 6.4).

first    {prompt}                                          -> LECTURE: ... SOLUTION: ...        until ###
then     {prompt} LECTURE: ... SOLUTION: ... ###\\nANSWER:  -> B.                                64 tokens at most
answer   LECTURE: ... SOLUTION: ...\\n The answer is B.      as the published prediction file writes it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from llavakit.errors import ConfigError
from llavakit.types import Conversation, Sampling, assistant

END = "###"
ASK = " ###\nANSWER:"
SAYS = "\n The answer is "
ROOM = 64


class GoesOn(Protocol):
    """A responder that can go on with a reply which is begun: ``assistant.Assistant``."""

    def reply_batch(self, conversations: Sequence[Conversation], sampling: Sampling = ..., *, begun: bool = False) -> list[str]:
        """The replies to all; with ``begun`` the rest of the reply with which each conversation ends."""
        ...


class TwoPass:
    """A responder that asks another one twice."""

    def __init__(self, responder: GoesOn) -> None:
        self.responder = responder

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        """Both passes; the answer is one piece."""
        yield from self.reply_batch([conversation], sampling)

    def reply_batch(self, conversations: Sequence[Conversation], sampling: Sampling = Sampling()) -> list[str]:  # noqa: B008
        """Both passes for all together. ``sampling`` is that of the reasoning; the letter is chosen likewise, in 64 tokens."""
        sampling = sampling.but(stop=(*sampling.stop, END))
        reasons = self.responder.reply_batch(conversations, sampling)
        begun = [one.then(assistant(reason + ASK)) for one, reason in zip(conversations, reasons, strict=True)]
        letters = self.responder.reply_batch(begun, sampling.but(max_new_tokens=ROOM), begun=True)
        return [reason + SAYS + letter.strip() for reason, letter in zip(reasons, letters, strict=True)]


def two_pass(responder: Any) -> TwoPass:
    """``TwoPass`` over a responder. Raises ConfigError where it cannot go on with a reply that is begun, as a server cannot."""
    if not hasattr(responder, "reply_batch"):
        raise ConfigError(
            "this protocol goes on with a reply that is begun, and a server cannot",
            code="cannot_go_on",
            where="--protocol",
            remedy="ask a checkpoint (--model FOLDER) or choose a protocol of one pass",
        )
    return TwoPass(responder)
