"""A responder that says what it was told to say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llavakit.errors import PromptError
from llavakit.types import Conversation, Sampling


class ScriptedResponder:
    """Says the given replies one after another, a word at a time, and remembers what it was asked. For tests and dry runs."""

    def __init__(self, replies: Iterable[str]) -> None:
        self._replies = iter(replies)
        self.asked: list[Conversation] = []

    def reply(self, conversation: Conversation, sampling: Sampling = Sampling()) -> Iterator[str]:  # noqa: B008  # frozen
        """The next reply. Raises PromptError when the conversation awaits none or the script is at its end."""
        if not conversation.open:
            raise PromptError("no reply is due", code="no_question", where="messages", remedy="end with a user message")
        text = next(self._replies, None)
        if text is None:
            raise PromptError("the script has no reply left", code="script_ended", remedy="give one reply a question")
        self.asked.append(conversation)
        return _words(text)


def _words(text: str) -> Iterator[str]:
    head, space, rest = text.partition(" ")
    while space:
        yield head + space
        head, space, rest = rest.partition(" ")
    if head:
        yield head
