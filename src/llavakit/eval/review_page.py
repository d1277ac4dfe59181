"""Reviews as one page: the numbers, then every question with its picture, both answers, both scores and the judge's reasons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llavakit.eval import html_page
from llavakit.eval.files import replaced
from llavakit.eval.html_page import document, thumbnail
from llavakit.eval.judge import Judged

LONG = 10_000  # characters of an answer or a review
STYLE = f"""
article {{ display: grid; grid-template-columns: {html_page.SIDE}px 1fr 1fr; gap: .3em 1em }}
article.not {{ border-left-color: var(--wrong) }} article > :first-child {{ grid-row: 1 / 4 }}
h2, .why {{ grid-column: 2 / 4; font-size: 1em; margin: 0 }} h3 {{ font-size: .95em; margin: .2em 0 }} .why {{ opacity: .8 }}
p, pre {{ margin: .2em 0; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit }} pre {{ font-family: ui-monospace, monospace }}
@media (max-width: 50em) {{
article {{ grid-template-columns: 1fr }} article > :first-child {{ grid-row: auto }} h2, .why {{ grid-column: 1 }}
}}
"""


def page(judged: Sequence[Judged], *, title: str, notes: Sequence[str] = ()) -> str:
    """The page as text; ``notes`` stand at its head as they are (tables as Markdown)."""
    body = [f"<h1>{_text(title)}</h1>", *(f"<pre>{_text(note)}</pre>" for note in notes), *map(_article, judged)]
    return document(title, body, style=STYLE)


def write_page(path: Path, judged: Sequence[Judged], *, title: str, notes: Sequence[str] = ()) -> Path:
    return replaced(path, page(judged, title=title, notes=notes))


def _article(one: Judged) -> str:
    case, scores = one.case, one.scores
    given = ("–", "–") if scores is None else (f"{scores[0]:g}", f"{scores[1]:g}")
    texts = [reading.text for reading in one.readings if reading.scores is not None]
    why = "\n\n".join(texts) if texts else "no review" if one.asked else "still to be asked"
    why += "".join(f"\n\nnot used ({refused.reason}): {refused.text}" for refused in one.refused)
    picture = "<span></span>" if case.image is None else thumbnail(case.image, f"picture of question {case.given}")
    return (
        f'<article class="{"" if scores else "not"}">{picture}'
        f"<h2>{_text(case.given)} · {_text(case.category)} · {_text(case.question)}</h2>"
        f"<section><h3>reference: {given[0]}</h3><p>{_text(case.reference)}</p></section>"
        f"<section><h3>candidate: {given[1]}</h3><p>{_text(case.candidate)}</p></section>"
        f'<p class="why">{_text(why)}</p></article>'
    )


def _text(value: object) -> str:
    return html_page.text(value, LONG)
