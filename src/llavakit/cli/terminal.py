"""Consoles of rich for the two streams, and pictures made of characters.

One character cell is about twice as high as wide, so the upper half block shows two pixels:

    foreground  = upper pixel
    background  = lower pixel        24 cells wide, 12 cells high = 24 x 24 pixels
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console
    from rich.text import Text

    from llavakit.data.reading import Progress


def out() -> Console:
    """The console of results. rich honours NO_COLOR, FORCE_COLOR and TERM, and writes plain text into a pipe."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, emoji=False, markup=False)


def err() -> Console:
    """The console of everything that is no result: progress, remarks, prompts."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, emoji=False, markup=False)


def has_color(console: Console) -> bool:
    """True when colours will be seen (a terminal that knows them, and no NO_COLOR)."""
    return console.color_system is not None and not console.no_color


@contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A bar on stderr, of a length that is known when the work has begun; a line now and then where stderr is no terminal."""
    from llavakit.data.reading import now_and_then

    if not sys.stderr.isatty():
        yield now_and_then(what, lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.progress import Progress as Bar

    with Bar(console=err(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def many(count: int, what: str) -> str:
    """``1 sample``, ``1,234 samples``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def picture(image: Image, *, columns: int = 40) -> Text:
    """The picture in half blocks, ``columns`` cells wide and proportionally high (at most half as many rows)."""
    from PIL.Image import Resampling
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    scale = columns / max(image.width, image.height)
    width, height = max(1, round(image.width * scale)), max(2, 2 * round(image.height * scale / 2))
    pixels = image.convert("RGB").resize((width, height), Resampling.BOX)
    text = Text(no_wrap=True)
    for y in range(0, height, 2):
        for x in range(width):
            upper, lower = (Color.from_rgb(*_rgb(pixels, x, y + half)) for half in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def _rgb(image: Image, x: int, y: int) -> tuple[int, int, int]:
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]
