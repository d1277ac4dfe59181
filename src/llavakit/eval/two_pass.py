"""ScienceQA's inference of LLaVA v0: first the reasoning, then the letter (spec 6.4).

first    {prompt}                                          -> LECTURE: ... SOLUTION: ...        until ###
then     {prompt} LECTURE: ... SOLUTION: ... ###\\nANSWER:  -> B.                                64 tokens at most
answer   LECTURE: ... SOLUTION: ...\\n The answer is B.      as the published prediction file writes it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llavakit.types import Conversation, Sampling, assistant

END = "###"
ASK = " ###\nANSWER:"
SAYS = "\n The answer is "
ROOM = 64


class GoesOn(Protocol):
    """A model that can go on with a reply which is begun: ``assistant.Assistant``. A server cannot."""

    def encode(self, conversation: Conversation, sampling: Sampling, *, begun: bool = False) -> Any:
        """A conversation made ready; ``begun``: its last reply goes on."""
        ...

    def reply_encoded(self, encoded: Sequence[Any], sampling: Sampling) -> list[str]:
        """The replies to some of these, or what follows where they are begun."""
        ...


@dataclass(frozen=True)
class Ready:
    """A question made ready for the first pass."""

    conversation: Conversation
    encoded: Any


class TwoPass:
    """A model that asks another one twice; to the harness it looks like the other. ``sampling`` is that of the reasons, 64 tokens of the
    same are for the letter."""

    def __init__(self, model: GoesOn) -> None:
        self.model = model

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        """Both passes; the answer is one piece."""
        yield from self.reply_encoded([self.encode(conversation, sampling)], sampling)

    def encode(self, conversation: Conversation, sampling: Sampling) -> Ready:
        """A question made ready."""
        return Ready(conversation, self.model.encode(conversation, _reasons(sampling)))

    def reply_encoded(self, encoded: Sequence[Ready], sampling: Sampling) -> list[str]:
        """Both passes for all together. Raises ContextError where the reasons leave no room for the letter."""
        reasons = self.model.reply_encoded([one.encoded for one in encoded], _reasons(sampling))
        begun = [one.conversation.then(assistant(reason + ASK)) for one, reason in zip(encoded, reasons, strict=True)]
        letter = _reasons(sampling).but(max_new_tokens=ROOM)
        letters = self.model.reply_encoded([self.model.encode(one, letter, begun=True) for one in begun], letter)
        return [reason + SAYS + said.strip() for reason, said in zip(reasons, letters, strict=True)]


def _reasons(sampling: Sampling) -> Sampling:
    return sampling.but(stop=(*sampling.stop, END))
