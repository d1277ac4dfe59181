"""``llava chat``: a conversation in the terminal. What was read once stays in the model's cache, so later turns start at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit

from llavakit.cli import border, options
from llavakit.cli.ask import check_pictures, image, stream
from llavakit.errors import LlavaError
from llavakit.types import Image, Sampling

if TYPE_CHECKING:
    from llavakit.assistant import Assistant, Session

EXAMPLES = """Examples:

  llava chat photo.jpg
  llava chat --model runs/finetune
  printf 'What is this?\\nWhat colour is it?\\n' | llava chat photo.jpg
In the chat: /image FILE adds a picture, /reset begins anew, /help, /quit (or Ctrl-D). Ctrl-C stops a reply.
"""
HELP = "/image FILE  add a picture to the next question\n/reset       begin anew\n/help        this list\n/quit        leave (or Ctrl-D)"


@dataclass
class Room:
    """A chat going on: the session, and pictures that wait for the next question."""

    assistant: Assistant
    sampling: Sampling
    session: Session
    waiting: list[Image] = field(default_factory=list)
    failed: bool = False

    def turn(self, line: str) -> bool:
        """Do what one line says; False means leave. An error is said and the chat goes on."""
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/quit":
                return False
            if command == "/help":
                _say(HELP)
            elif command == "/reset":
                self.session, self.waiting = self.assistant.session(), []
                _say("a new conversation")
            elif command == "/image":
                self._add(rest.strip())
            elif command.startswith("/") and command[1:].isalpha():
                _say(f"no command {border.one_line(command)}; /help lists them")
            elif line.strip():
                self._ask(line.strip())
        except (LlavaError, OSError) as error:
            self.failed = True
            _say(border.line(error))
        return True

    def _add(self, name: str) -> None:
        picture = image(name)
        check_pictures((picture,), draft=self.assistant.processor.draft)
        self.waiting.append(picture)
        _say(f"{border.one_line(name)}: will go with the next question")

    def _ask(self, question: str) -> None:
        pieces = self.session.ask(question, *self.waiting, sampling=self.sampling)
        try:
            stream(pieces)
        except KeyboardInterrupt:
            _say("\nstopped")
        self.waiting = []


@options.spread
def chat(
    images: Annotated[list[str] | None, Argument(metavar="IMAGE", show_default=False, help="Pictures for the first question.")] = None,
    *,
    drawing: options.Drawing,
    loading: options.Loading,
) -> None:
    """Talk about pictures, turn by turn."""
    sampling = drawing.sampling()
    waiting = [image(name) for name in images or ()]
    check_pictures(tuple(waiting), draft=loading.draft)
    assistant = loading.assistant()
    room = Room(assistant=assistant, sampling=sampling, session=assistant.session(), waiting=waiting)
    if _interactive():
        _say(f"{'Ask about the picture.' if waiting else '/image FILE adds a picture.'} /help lists the commands.")
    for line in _lines():
        if not room.turn(line):
            break
    if room.failed and not _interactive():
        raise Exit(border.FAILED)


def _interactive() -> bool:
    return sys.stdin.isatty()


def _lines() -> Iterator[str]:
    """The user's lines until Ctrl-D or the end of stdin; a terminal gets a prompt on stderr and can edit its line."""
    if not _interactive():
        yield from sys.stdin
        return
    with suppress(ImportError):  # a Python built without it
        import readline  # noqa: F401  # its import gives input() a line editor and a history
    while True:
        shown = sys.stdout.isatty()  # a prompt that input() itself knows survives editing; into a pipe it must not go
        if not shown:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            yield input("> " if shown else "")
        except EOFError:
            print(file=sys.stderr)
            return


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
