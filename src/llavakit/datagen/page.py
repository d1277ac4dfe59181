"""Rows and rejects as one page of HTML for a look before the big run: pictures, turns, reasons. Nothing is fetched from anywhere.

+-----------+  id  kind
|  picture  |  human: ...          pictures are shown from where they lie
+-----------+  gpt: ...
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llavakit.datagen.views import REJECTS, ROWS

PAGE = "sample.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fafafa }
article { display: flex; gap: 1rem; background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 1rem; margin: 1rem 0 }
article.reject { border-left: 4px solid #c33 }
img { width: 14rem; height: auto; align-self: flex-start; border-radius: 4px; background: #eee }
h3 { margin: 0 0 .5rem; font-size: 1rem } p { margin: .3rem 0; white-space: pre-wrap }
.human { font-weight: 600 } .note { color: #777; font-size: .85rem }
"""


def write_page(folder: Path, *, images: Path | None, title: str) -> Path:
    """Make the page of a folder's rows.jsonl and rejects.jsonl, beside them."""
    body = "".join((*(_row(row, folder, images) for row in _lines(folder / ROWS)), *(_reject(one) for one in _lines(folder / REJECTS))))
    head = '<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src \'self\' file: data:;'
    head += f" style-src 'unsafe-inline'\"><title>{escape(title)}</title><style>{_STYLE}</style>"
    path = folder / PAGE
    draft = path.with_name(PAGE + ".tmp")
    draft.write_text(f"<!doctype html><html><head>{head}</head><body><h1>{escape(title)}</h1>{body}</body></html>\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def _row(row: dict[str, Any], folder: Path, images: Path | None) -> str:
    turns = "".join(f'<p class="{escape(turn["from"])}">{escape(turn["value"])}</p>' for turn in row["conversations"])
    note = ", ".join(f"{name} {row[name]}" for name in ("teacher", "seed", "attempt", "unknown") if row.get(name))
    picture = ""
    if images is not None:
        place = os.path.relpath(images / row["image"], folder)
        picture = f'<img loading="lazy" alt="" src="{escape(quote(place))}">'
    return f'<article>{picture}<div><h3>{escape(row["id"])}</h3>{turns}<p class="note">{escape(note)}</p></div></article>'


def _reject(one: dict[str, Any]) -> str:
    why = f"{one['reason']}: {one['detail']}"
    head = f'<h3>{escape(one["id"])} is not used</h3><p class="note">{escape(why)}</p>'
    return f'<article class="reject"><div>{head}<p>{escape(one["text"])}</p></div></article>'


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
