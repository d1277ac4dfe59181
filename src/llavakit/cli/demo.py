"""``llava demo``: the built-in model answers questions about the shipped pictures, and the truth stands beside."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Annotated

from typer import Option, confirm

from llavakit.cli import border, options, terminal

EXAMPLES = """Examples:

  llava demo
  llava demo --model runs/finetune
  llava demo --gradio                 (a page to ask on; needs the extra gradio)
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A question about a shipped picture, with its true answer."""

    image: str
    question: str
    answer: str


@options.spread
def demo(
    count: Annotated[int | None, Option("--count", "-n", min=1, help="Only so many questions.")] = None,
    gradio: Annotated[bool, Option("--gradio", help="Ask on a page instead, made with Gradio.")] = False,
    *,
    loading: options.Loading,
) -> None:
    """Ask the built-in model about shipped pictures."""
    from llavakit.eval.scenes import normal
    from llavakit.types import Conversation, Sampling

    if gradio:
        on_a_page(loading)
        return
    assistant = loading.assistant()
    rows, right, seconds, shown = shipped_questions()[:count], 0, 0.0, ""
    for row in rows:
        if row.image != shown:
            show_picture(row.image)
            shown = row.image
        started = time.perf_counter()
        question = Conversation.ask(row.question, picture_bytes(row.image))
        reply = "".join(assistant.reply(question, Sampling(max_new_tokens=64)))
        seconds += time.perf_counter() - started
        good = normal(reply) == normal(row.answer)
        right += good
        show_row(row, reply, good=good)
    terminal.out().print(f"{right} of {len(rows)} right, {seconds / len(rows):.2f} s each.")
    offer_page(loading.model)


def offer_page(model: str | None) -> None:
    """The chat page as the next thing to do: opened at once where somebody can say yes."""
    words = ["serve", *([model] if model else [])]
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        terminal.out().print(f"Ask it yourself on a page: llava {' '.join(words)}", markup=False)
        return
    if confirm("Ask it yourself on a chat page?", default=True):
        os.execv(sys.executable, [sys.executable, "-m", "llavakit", *words])


def on_a_page(loading: options.Loading) -> None:
    """The Gradio app, until it is interrupted; its package is looked for before the model is loaded."""
    from llavakit.serve import gradio_app

    gradio_app.package()
    assistant = loading.assistant()
    examples = {row.image: row.question for row in reversed(shipped_questions())}
    with as_file(files("llavakit") / "pictures") as folder:
        asked = [(question, folder / image) for image, question in reversed(examples.items())]
        gradio_app.launch(assistant, name=loading.model or "tiny", examples=asked)


def shipped_questions() -> list[Row]:
    """The questions of the package, in the order of their pictures."""
    text = (files("llavakit") / "pictures" / "questions.json").read_text(encoding="utf-8")
    return [Row(image=row["image"], question=row["question"], answer=row["answer"]) for row in json.loads(text)]


def picture_bytes(name: str) -> bytes:
    """A shipped picture as it lies in the package."""
    return (files("llavakit") / "pictures" / name).read_bytes()


def show_picture(name: str) -> None:
    """The picture in half blocks where colours are seen; always its name and size."""
    from llavakit.images import open_image
    from llavakit.types import Image

    console, image = terminal.out(), open_image(Image(picture_bytes(name)))
    if terminal.has_color(console):
        console.print(terminal.picture(image), end="")
    console.print(f"{name}, {image.width} x {image.height}\n")


def show_row(row: Row, reply: str, *, good: bool) -> None:
    """Question, answer and truth; a wrong answer is marked in words, not by colour alone."""
    from rich.text import Text

    console = terminal.out()
    console.print(Text.assemble(("question  ", "dim"), row.question))
    console.print(Text.assemble(("answer    ", "dim"), (border.harmless(reply.strip()), "green" if good else "red")))
    console.print(Text.assemble(("truth     ", "dim"), row.answer, "" if good else "   (wrong)", "\n"))
