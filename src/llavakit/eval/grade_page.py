"""MM-Vet's grades as one page: the numbers, then every question with its picture, the truth, the answer and each run's grade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llavakit.eval import html_page
from llavakit.eval.files import replaced
from llavakit.eval.html_page import document, text, thumbnail
from llavakit.eval.mm_vet import Case, Grade

STYLE = f"""
article {{ display: grid; grid-template-columns: {html_page.SIDE}px 1fr 1fr }}
article > :first-child {{ grid-row: 1 / 4 }} h3 {{ font-size: .95em; margin: .2em 0 }}
h2, .given {{ grid-column: 2 / 4; font-size: 1em; margin: 0 }}
article.all {{ border-left-color: var(--right) }} article.part {{ border-left-color: var(--partly) }}
article.none {{ border-left-color: var(--wrong) }}
p, pre {{ margin: .2em 0; white-space: pre-wrap; overflow-wrap: anywhere; font: inherit }} pre {{ font-family: ui-monospace, monospace }}
@media (max-width: 50em) {{
article {{ grid-template-columns: 1fr }} article > :first-child {{ grid-row: auto }} h2, .given {{ grid-column: 1 }}
}}
"""


def write_page(path: Path, cases: Sequence[Case], grades: Mapping[str, Sequence[Grade]], *, title: str, notes: Sequence[str] = ()) -> Path:
    """``notes`` stand at the head as they are (tables as Markdown)."""
    articles = (_article(case, grades[case.id]) for case in cases)
    body = [f"<h1>{text(title)}</h1>", *(f"<pre>{text(note)}</pre>" for note in notes), *articles]
    return replaced(path, document(title, body, style=STYLE))


def _article(case: Case, runs: Sequence[Grade]) -> str:
    picture = "<span></span>" if case.image is None else thumbnail(case.image, f"picture of question {case.id}")
    return (
        f'<article class="{_kind(runs)}">{picture}'
        f"<h2>{text(case.id)} · {text(', '.join(sorted(case.truth.capabilities)))} · {text(case.question)}</h2>"
        f"<section><h3>truth</h3><p>{text(case.truth.answer)}</p></section>"
        f"<section><h3>answer</h3><p>{text(case.candidate)}</p></section>"
        f'<p class="given">grade: {text(" / ".join(map(_given, runs)))}</p></article>'
    )


def _kind(runs: Sequence[Grade]) -> str:
    """The colour at its edge: all right, partly, not at all; none of them where a run has no grade."""
    values = [run.value for run in runs]
    if None in values:
        return ""
    return "all" if min(values) == 1 else "none" if max(values) == 0 else "part"  # type: ignore[type-var]


def _given(run: Grade) -> str:
    if run.value is None:
        return f"none ({run.content!r} after {run.tries} tries)" if run.asked else "still to be asked"
    return f"{run.value:g}" + (f" (at try {run.tries})" if run.tries > 1 else "")
