"""Reviews as one page: the numbers, then every question with its picture, both answers, both scores and the judge's reasons.

One file without scripts or addresses: pictures are small JPEGs inside it, every text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from llavakit.errors import ImageError
from llavakit.eval.judge import Verdict
from llavakit.types import Image

SIDE = 224  # pixels of a picture
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
article { border: 1px solid #8884; border-radius: 6px; padding: .8em; margin: .8em 0; display: grid; grid-template-columns: 224px 1fr 1fr;
gap: .3em 1em } article.not { border-left: 4px solid #c0392b } h2, .why { grid-column: 2 / 4; font-size: 1em; margin: 0 }
h3 { font-size: .95em; margin: .2em 0 } img { grid-row: 1 / 4; border-radius: 4px } .why { opacity: .8 }
p, pre { margin: .2em 0; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit } pre { font-family: ui-monospace, monospace }
@media (max-width: 50em) { article { grid-template-columns: 1fr } h2, .why { grid-column: 1 } img { grid-row: auto } }
"""


def page(verdicts: Sequence[Verdict], *, title: str, notes: Sequence[str] = ()) -> str:
    """The page as text; ``notes`` stand at its head as they are (tables as Markdown)."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{_text(title)}</title>'
    parts = [f"<h1>{_text(title)}</h1>", *(f"<pre>{_text(note)}</pre>" for note in notes), *map(_article, verdicts)]
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def write_page(path: Path, verdicts: Sequence[Verdict], *, title: str, notes: Sequence[str] = ()) -> Path:
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(page(verdicts, title=title, notes=notes), encoding="utf-8", errors="replace")
    os.replace(draft, path)
    return path


def _article(one: Verdict) -> str:
    case, scores = one.case, one.scores
    given = ("–", "–") if scores is None else (f"{scores[0]:g}", f"{scores[1]:g}")
    texts = [reading.text for reading in one.readings if reading.scores is not None]
    why = "\n\n".join(texts) if texts else "no review" if one.asked else "still to be asked"
    why += "".join(f"\n\nnot used ({refused.reason}): {refused.text}" for refused in one.refused)
    return (
        f'<article class="{"" if scores else "not"}">{_picture(case.image)}'
        f"<h2>{_text(str(case.given))} · {_text(case.category)} · {_text(case.question)}</h2>"
        f"<section><h3>reference: {given[0]}</h3><p>{_text(case.reference)}</p></section>"
        f"<section><h3>candidate: {given[1]}</h3><p>{_text(case.candidate)}</p></section>"
        f'<p class="why">{_text(why)}</p></article>'
    )


def _picture(image: Image | None) -> str:
    if image is None:
        return "<span></span>"
    from llavakit.images import open_image

    try:
        shown = open_image(image)
    except ImageError:
        return "<span>no picture</span>"
    shown.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    shown.save(held, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}">'


def _text(text: str) -> str:
    return html.escape(text)
