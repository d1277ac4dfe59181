"""What the pages of eval share: a page is one file that holds all that it shows and asks for nothing from outside.

document(title, body)     the skeleton, with a policy that lets in only what stands inside; a script by its hash
text(anything)            escaped, cut at ``LONG``, without control characters
thumbnail(image, alt)     a small JPEG inside the page, or that there is none
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import warnings
from collections.abc import Iterable

from llavakit.errors import ImageError
from llavakit.types import Image

LONG, SIDE = 2000, 200  # characters of a text, pixels of a picture
STYLE = """
:root { color-scheme: light dark; --right: #1a7f37; --wrong: #c4232f; --partly: #9a6700; --line: #8886 }
@media (prefers-color-scheme: dark) { :root { --right: #4cc26a; --wrong: #ff7b72; --partly: #d9a53a } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em }
article { border: 1px solid var(--line); border-left: 5px solid var(--line); border-radius: 6px; padding: .8em; margin: .8em 0; gap: 1em }
article img { align-self: flex-start; border-radius: 4px }
"""


def document(title: str, body: Iterable[str], *, style: str = "", script: str = "") -> str:
    """The page as text. ``body`` is HTML, ``style`` follows the one of all pages, ``script`` is the only one that may run."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{text(title)}</title><style>{STYLE}{style}</style>'
    )
    last = f"<script>{script}</script>" if script else ""
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + f"\n{last}</body></html>\n"


def text(value: object, most: int = LONG) -> str:
    """Anything as harmless text: cut, without control characters, escaped."""
    words = str(value)
    words = words if len(words) <= most else f"{words[: most - 1]}…"
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in words))


def thumbnail(image: Image, alt: str) -> str:
    """The picture, small, inside the page."""
    from llavakit.images import open_image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an animation shows its first frame
            picture = open_image(image, least=(SIDE, SIDE))
    except (ImageError, OSError, ValueError):
        return "<p>no picture</p>"
    picture.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=75)
    data = base64.b64encode(written.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{text(alt, 200)}" {size} src="data:image/jpeg;base64,{data}">'
