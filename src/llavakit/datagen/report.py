"""Generated data as one page: what there is, how it reads, what it covers, what was not used, what it cost.

    summary | kinds (table) | turns, words (bars) | first words | objects (table) | nearest texts | rejects | cost | samples (cards)

The page is one file without scripts or addresses: plots are SVG, pictures are small JPEGs inside it. Every text is escaped and cut at
LONG characters, and there are so many of them at most, so the page stays below a few megabytes whatever the rows hold.
"""

from __future__ import annotations

import base64
import html
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llavakit.datagen.facts import SAMPLES, Facts, Kind, Named, Row, count
from llavakit.errors import ImageError
from llavakit.types import Image

LONG, SIDE, SHOWN = 1500, 224, 30  # characters of a text, pixels of a picture, rows of a table
BARS, WIDE, HIGH, EDGE, LINE = 24, 340, 150, 26, 17  # columns of a plot; its sizes in pixels
COLOUR = "#1f6fb2"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark } body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } .row { display: flex; flex-wrap: wrap; gap: 1.5em }
svg { max-width: 100%; height: auto } svg text { fill: currentColor; font-size: 11px }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .25em .8em .25em 0;
border-bottom: 1px solid #8884 } td.n, th.n { text-align: right } .pale { opacity: .7; font-size: .9em }
article { display: flex; gap: 1em; border: 1px solid #8884; border-radius: 6px; padding: .8em; margin: .8em 0 }
article.not { border-left: 4px solid #c0392b } article img { align-self: flex-start; border-radius: 4px }
article p { margin: .3em 0; white-space: pre-wrap; overflow-wrap: anywhere } .asked { font-weight: 600 }
"""


def write_report(
    out: Path,
    rows: Iterable[Row],
    *,
    rejects: Iterable[Row] = (),
    contexts: Iterable[Row] = (),
    images: Path | None = None,
    cost: Mapping[str, object] | None = None,
    named: Named | None = None,
    title: str = "generated data",
    samples: int | None = None,
) -> Facts:
    """Count the rows and write the page. ``images`` is where the samples' pictures lie, ``cost`` what the run took, by name.

    ``samples`` is how many rows of a kind and replies of a reason are shown; None shows a few, and one of each reason.
    """
    facts = count(rows, rejects, contexts, named=named, samples=SAMPLES if samples is None else samples)
    draft = out.with_name(f".{out.name}.tmp")
    try:
        draft.write_text(page(facts, images=images, cost=cost or {}, title=title, rejects=samples or 1), encoding="utf-8", errors="replace")
        os.replace(draft, out)
    finally:
        draft.unlink(missing_ok=True)
    return facts


def page(facts: Facts, *, images: Path | None, cost: Mapping[str, object], title: str, rejects: int = 1) -> str:
    """The page as text; ``rejects`` of each reason are shown."""
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{_text(title)}</title>'
    parts = [f"<h1>{_text(title)}</h1>", _summary(facts), _kinds(facts), _plots(facts)]
    for name, part in (
        ("Objects", _objects(facts)),
        ("Nearest texts", _nearest(facts)),
        ("Not used", _rejects(facts, rejects)),
        ("Cost", _table([("", False), ("", True)], [(name, _said(value)) for name, value in cost.items()])),
        ("Samples", _samples(facts, images)),
    ):
        parts += [f"<h2>{name}</h2>", part] if part else []
    return f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


# --- what is told ---------------------------------------------------------------------------------------------------------------------


def _summary(facts: Facts) -> str:
    rejects = facts.reasons.total()
    lines = [f"{facts.rows:,} rows about {len(facts.images):,} pictures; {rejects:,} replies not used"]
    if facts.rows + rejects:
        lines[0] += f" ({rejects / (facts.rows + rejects):.1%} of all)"
    if facts.teachers:
        lines.append("teacher: " + ", ".join(f"{name} ({number:,} rows)" for name, number in facts.teachers.most_common(5)))
    if again := sum(number for attempt, number in facts.attempts.items() if attempt):
        lines.append(f"{again:,} rows took more than one reply")
    return "".join(f"<p>{_text(line)}.</p>" for line in lines)


def _kinds(facts: Facts) -> str:
    head = [("kind", False), *((name, True) for name in ("rows", "share", "turns", "words of a question", "words of an answer", "longest"))]
    table = []
    for name, kind in _in_order(facts):
        share = f"{kind.rows / facts.rows:.1%}"
        middle = (f"{_mean(counts):.1f}" for counts in (kind.turns, kind.asked, kind.answered))
        table.append((name, f"{kind.rows:,}", share, *middle, f"{max(kind.answered, default=0):,}"))
    return _table(head, table)


def _plots(facts: Facts) -> str:
    drawn = []
    for name, kind in _in_order(facts)[:6]:
        if len(kind.turns) > 1:
            drawn.append(histogram(f"{name}: turns", kind.turns))
        drawn.append(histogram(f"{name}: words of an answer", kind.answered))
    if facts.openings:
        drawn.append(bars("first words of questions", facts.openings.most_common(16)))
    return f'<div class="row">{"".join(drawn)}</div>'


def _objects(facts: Facts) -> str:
    """How many of the categories that have a box the words name, and what they name that nobody drew."""
    parts = []
    if facts.objects:
        drawn, named = (sum(getattr(one, name) for one in facts.objects.values()) for name in ("rows", "named"))
        parts.append(f"<p>{named / drawn:.1%} of the categories that are boxed in a row's picture are named in its words.</p>")
        most = sorted(facts.objects.items(), key=lambda one: (-one[1].rows, one[0]))[:SHOWN]
        lines = [(name, f"{one.rows:,}", f"{one.named:,}", f"{one.named / one.rows:.0%}") for name, one in most]
        parts.append(_table([("category", False), ("rows with a box", True), ("that name it", True), ("share", True)], lines))
    if facts.without_context:
        parts.append(f"<p>{facts.without_context:,} rows are about pictures whose boxes are not known here.</p>")
    if facts.unknown_rows:
        words = ", ".join(f"{word} ({number:,})" for word, number in facts.unknown.most_common(SHOWN))
        parts.append(f"<p>{facts.unknown_rows:,} rows name objects that neither captions nor boxes know: {_text(words)}.</p>")
    return "".join(parts)


def _nearest(facts: Facts) -> str:
    lines = [(f"about {pair.share:.0%}", *(f"{one.name}: {one.beginning}" for one in (pair.first, pair.second))) for pair in facts.nearest]
    said = "<p>The share of runs of three words that two rows' answers have in common.</p>" if lines else ""
    left = f"<p>{facts.not_compared:,} rows are too short or too many to be compared.</p>" if facts.not_compared else ""
    return said + _table([("in common", False), ("one answer", False), ("another", False)], lines) + left


def _rejects(facts: Facts, each: int) -> str:
    reasons: Counter[str] = Counter()
    for (reason, _), number in facts.reasons.items():
        reasons[reason] += number
    if not reasons:
        return ""
    kinds = sorted({kind for _, kind in facts.reasons})[:SHOWN]
    most = reasons.most_common(SHOWN)
    head = [("reason", False), ("replies", True), *((kind or "(no kind)", True) for kind in kinds)]
    lines = [(reason, f"{number:,}", *(f"{facts.reasons[reason, kind]:,}" for kind in kinds)) for reason, number in most]
    cards = "".join(_reject(reason, one) for reason, _ in most[:12] for one in facts.rejected[reason][:each])
    return f'<div class="row">{_table(head, lines)}{bars("replies not used", most[:16])}</div>{cards}'


def _reject(reason: str, row: Row) -> str:
    note = ", ".join(str(row[name]) for name in ("kind", "detail") if row.get(name))
    return f'<article class="not"><div><b>{_text(reason)}</b> <span class="pale">{_text(row.get("id"))} {_text(note)}</span>' + (
        f"<p>{_text(row.get('text'))}</p></div></article>"
    )


def _samples(facts: Facts, images: Path | None) -> str:
    return "".join(f"<h3>{_text(name)}</h3>" + "".join(_card(row, images) for row in kind.samples) for name, kind in _in_order(facts)[:6])


def _card(row: Row, images: Path | None) -> str:
    turns = "".join(
        f'<p class="{("asked", "answered")[number % 2]}">{_text(turn["value"])}</p>'
        for number, turn in enumerate(row["conversations"][:20])
    )
    picture = _thumbnail(images, str(row["image"])) if images is not None and row.get("image") else ""
    note = f"{row.get('id', '')} {row.get('image', '')}"
    return f'<article>{picture}<div>{turns}<p class="pale">{_text(note)}</p></div></article>'


def _thumbnail(images: Path, name: str) -> str:
    """The picture, small, inside the page; none that is not there, cannot be opened, or lies outside the folder."""
    from llavakit.images import open_image

    path = images / name
    try:
        if not path.resolve().is_relative_to(images.resolve()):
            raise OSError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an animation shows its first frame
            picture = open_image(Image(path), least=(SIDE, SIDE))
    except (ImageError, OSError, ValueError):  # a name may hold what no file's name can
        return '<span class="pale">no picture</span>'
    picture.thumbnail((SIDE, SIDE))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=75)
    data = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="" width="{picture.width}" height="{picture.height}" src="data:image/jpeg;base64,{data}">'


# --- how it is drawn ------------------------------------------------------------------------------------------------------------------


def histogram(title: str, counts: Mapping[int, int]) -> str:
    """Whole numbers as columns, in at most BARS bins of equal width."""
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // BARS)
    bins = [0] * ((high - low) // width + 1)
    for value, number in counts.items():
        bins[(value - low) // width] += number
    across, room, most = (WIDE - 2 * EDGE) / len(bins), HIGH - 2 * EDGE, max(bins)
    columns = "".join(
        f'<rect x="{EDGE + at * across:.1f}" y="{HIGH - EDGE - number / most * room:.1f}" width="{max(across - 1, 1):.1f}"'
        f' height="{number / most * room:.1f}" fill="{COLOUR}"><title>{_range(low + at * width, width)}: {number:,}</title></rect>'
        for at, number in enumerate(bins)
    )
    scale = f'<text x="{EDGE}" y="{HIGH - 10}">{low:,}</text><text x="{WIDE - EDGE}" y="{HIGH - 10}" text-anchor="end">{high:,}</text>'
    top = f'<text x="{WIDE - EDGE}" y="14" text-anchor="end">most: {most:,}</text>'
    return _figure(title, HIGH, scale + top + columns)


def bars(title: str, counts: Sequence[tuple[str, int]]) -> str:
    """Named numbers as rows, in the order given."""
    most, start, lines = max(number for _, number in counts), WIDE * 0.42, []
    for at, (name, number) in enumerate(counts):
        y, length = EDGE + at * LINE, number / most * (WIDE - start - 52)
        lines.append(f'<text x="{start - 6:.0f}" y="{y + 11}" text-anchor="end">{_text(name, 24)}</text>')
        lines.append(f'<rect x="{start:.0f}" y="{y}" width="{max(length, 1):.1f}" height="{LINE - 4}" fill="{COLOUR}"/>')
        lines.append(f'<text x="{start + length + 5:.1f}" y="{y + 11}">{number:,}</text>')
    return _figure(title, EDGE + len(counts) * LINE + 6, "".join(lines))


def _figure(title: str, high: int, inside: str) -> str:
    frame = f'viewBox="0 0 {WIDE} {high}" width="{WIDE}" height="{high}" role="img" aria-label="{_text(title)}"'
    return f'<svg {frame}><text x="4" y="14" font-weight="600">{_text(title, 40)}</text>{inside}</svg>'


def _range(low: int, width: int) -> str:
    return f"{low:,}" if width == 1 else f"{low:,} to {low + width - 1:,}"


def _table(head: Sequence[tuple[str, bool]], lines: Sequence[Sequence[str]]) -> str:
    """A table; the second value of a head says whether its column holds numbers."""
    if not lines:
        return ""
    kinds = [' class="n"' if number else "" for _, number in head]
    top = "".join(f"<th{kind}>{_text(name)}</th>" for (name, _), kind in zip(head, kinds, strict=True))
    body = "".join("<tr>" + "".join(f"<td{k}>{_text(c, 200)}</td>" for k, c in zip(kinds, line, strict=True)) + "</tr>" for line in lines)
    return f"<table>{f'<tr>{top}</tr>' if any(name for name, _ in head) else ''}{body}</table>"


def _text(value: object, most: int = LONG) -> str:
    """Anything as harmless text: cut, without control characters, escaped."""
    said = "" if value is None else str(value)
    said = said if len(said) <= most else f"{said[: most - 1]}…"
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in said))


def _said(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if isinstance(value, float) else str(value)


def _mean(counts: Counter[int]) -> float:
    return sum(value * number for value, number in counts.items()) / max(counts.total(), 1)


def _in_order(facts: Facts) -> list[tuple[str, Kind]]:
    return sorted(facts.kinds.items(), key=lambda one: (-one[1].rows, one[0]))
