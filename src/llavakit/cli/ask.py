"""``llava ask``: one question about any number of pictures, the reply as it comes."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from llavakit.cli import border, options
from llavakit.errors import ConfigError
from llavakit.types import Conversation, Image

EXAMPLES = """Examples:

  llava ask photo.jpg "What is this?"
  llava ask before.png after.png "What has changed?"
  curl -s "$URL" | llava ask - "Is there a cat?"
  echo "Name the colours." | llava ask photo.jpg -
  llava ask --json --max-tokens 30 photo.jpg "Describe the picture."
"""
STDIN = "-"

Words = Annotated[list[str], Argument(metavar="WORDS", show_default=False, help="Pictures, then the question. '-' is stdin, for either.")]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The words of the command line, understood: names for people, pictures and question for the model."""

    names: tuple[str, ...]
    images: tuple[Image, ...]
    question: str

    @property
    def conversation(self) -> Conversation:
        return Conversation.ask(self.question, *self.images)


@options.spread
def ask(
    words: Words,
    question: Annotated[
        str | None, Option("--question", "-q", metavar="TEXT", help="The question; then every word is a picture.", show_default=False)
    ] = None,
    beams: options.Beams = 1,
    as_json: options.Json = False,
    *,
    drawing: options.Drawing,
    loading: options.Loading,
) -> None:
    """Ask a question about pictures."""
    sampling = drawing.sampling(beams)
    asked = understand(words, question)
    check_pictures(asked.images, draft=loading.draft)
    assistant = loading.assistant()
    started = time.perf_counter()
    pieces = assistant.reply(asked.conversation, sampling)
    if not as_json:
        stream(pieces)
        return
    reply = "".join(pieces)
    record = {"question": asked.question, "images": list(asked.names), "reply": reply, "model": str(loading.model or "built-in")}
    if assistant.commit:
        record["commit"] = assistant.commit
    print(json.dumps(record | {"seconds": round(time.perf_counter() - started, 3)}, ensure_ascii=False))


def understand(words: list[str], question: str | None = None) -> Asked:
    """Files first, the question last; ``-`` stands for what comes through stdin, once."""
    files = words if question is not None else words[:-1]
    text = question if question is not None else words[-1]
    if question is None and text != STDIN and _is_file(text):
        raise ConfigError("the last word is a file", code="no_question", where=text, remedy="put the question last, in quotes")
    if [*files, text].count(STDIN) > 1:
        raise ConfigError("'-' stands twice", code="stdin_twice", remedy="stdin can be read once: name a file, or the question")
    if text == STDIN:
        text = options.read_stdin().decode("utf-8", errors="surrogateescape").strip()
    return Asked(names=tuple(files), images=tuple(image(name) for name in files), question=text)


def image(name: str) -> Image:
    """A picture named on the command line; a web address is refused here, with what to do instead."""
    if name == STDIN:
        return Image(options.read_stdin())
    if "://" in name:
        raise ConfigError("an address, not a file", code="not_a_file", where=name, remedy="fetch it: curl -s ADDRESS | llava ask - ...")
    if "\0" in name:
        raise ConfigError("no file has such a name", code="not_a_file", where=name, remedy="leave out the NUL")
    return Image(Path(name))


def check_pictures(images: tuple[Image, ...], *, draft: bool) -> None:
    """Every picture is opened before the seconds that loading a model takes: a bad one is refused at once."""
    from llavakit.images import open_image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the processor opens them again and says what there is to say, once
        for picture in images:
            open_image(picture, least=(1, 1) if draft else None)  # as coarse as it may be: the file is read to its end all the same


def stream(pieces: Iterator[str]) -> str:
    """Write pieces as they come, and a line end; returns what was written."""
    written = []
    terminal = sys.stdout.isatty()
    for piece in pieces:
        written.append(piece)
        sys.stdout.write(border.harmless(piece) if terminal else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return "".join(written)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # too long for a name, or holding NUL: a question
        return False
