"""A run, question by question, as one HTML file: picture, question, answer, truth, verdict; filtered by verdict and category.

Every text is escaped and cut (``html_page``). Of a large run SHOWN questions are on the page, those that were not right first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from llavakit.eval.benchmark import Answered, Score, Verdict
from llavakit.eval.files import replaced
from llavakit.eval.html_page import document, thumbnail
from llavakit.eval.html_page import text as _text

SHOWN = 1000  # questions on a page
VERDICTS = ("right", "partly", "wrong", "unanswered", "answered")
Row = tuple[Answered, Verdict | None]
SCRIPT = """
const form = document.forms[0], cards = [...document.querySelectorAll("article")], count = document.querySelector("output");
function show() {
  const verdict = form.verdict.value, category = form.category ? form.category.value : "";
  let shown = 0;
  for (const card of cards) {
    const wanted = (!verdict || card.dataset.verdict === verdict) && (!category || card.dataset.category === category);
    card.hidden = !wanted;
    shown += wanted;
  }
  count.value = shown + " of " + cards.length + " shown";
}
form.addEventListener("change", show);
show();
"""
STYLE = """
h2 { font-size: 1.15em } table { border-collapse: collapse }
td, th { text-align: left; padding: .2em 1em .2em 0; border-bottom: 1px solid var(--line) } td.n, th.n { text-align: right }
form { display: flex; flex-wrap: wrap; gap: 1em; align-items: center; position: sticky; top: 0; padding: .6em 0;
background: Canvas; border-bottom: 1px solid var(--line) } fieldset { border: 0; margin: 0; padding: 0 }
legend { float: left; margin-right: .6em }
label { margin-right: .8em } :focus-visible { outline: 2px solid Highlight; outline-offset: 2px }
article { display: flex } article[hidden] { display: none } article img { max-width: 40% }
[data-verdict=right] { border-left-color: var(--right) } [data-verdict=wrong], [data-verdict=unanswered] { border-left-color: var(--wrong) }
[data-verdict=partly] { border-left-color: var(--partly) } h3 { font-size: .9em; margin: 0; opacity: .75; font-weight: 500 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15em .8em; margin: .3em 0 0 } dt { opacity: .75 }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }
"""


def write_page(out: Path, rows: Iterable[Row], *, title: str, facts: Sequence[str] = (), scores: Sequence[Score] = ()) -> None:
    """Write the page of a run. ``facts``: lines that stand on top; a row's verdict is None where nothing is known to compare with."""
    replaced(out, page(list(rows), title=title, facts=facts, scores=scores))


def page(rows: Sequence[Row], *, title: str, facts: Sequence[str] = (), scores: Sequence[Score] = ()) -> str:
    """The page as text."""
    shown = _chosen(rows)
    kinds = sorted({answered.question.category for answered, _ in shown} - {""})
    told = [*facts] + (
        [f"{len(shown):,} of {len(rows):,} questions are shown, those that were not right first"] if len(shown) < len(rows) else []
    )
    body = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(line)}</p>" for line in told), _scores(scores), _form(shown, kinds), "<main>"]
    body += [_card(answered, verdict, kinds) for answered, verdict in shown]
    return document(title, [*body, "</main>"], style=STYLE, script=SCRIPT)


def said(answered: Answered, verdict: Verdict | None) -> str:
    """One of VERDICTS."""
    if answered.text is None:
        return "unanswered"
    if verdict is None:
        return "answered"
    return "right" if verdict.points >= 1 else "wrong" if verdict.points <= 0 else "partly"


def _chosen(rows: Sequence[Row]) -> Sequence[Row]:
    """At most SHOWN rows in their order, as few right ones as can be."""
    if len(rows) <= SHOWN:
        return rows
    ranked = sorted(range(len(rows)), key=lambda place: said(*rows[place]) == "right")
    return [rows[place] for place in sorted(ranked[:SHOWN])]


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    lines = []
    for score in scores:
        value = f"{score.value:.1f}" + (f" ± {score.half_width:.1f}" if score.half_width is not None else "")
        name = f"<b>{_text(score.metric)}</b>" if score.headline else _text(score.metric)
        lines.append(f'<tr><td>{name}</td><td class="n">{value}</td><td class="n">{score.count:,}</td></tr>')
    return f'<table><tr><th>metric</th><th class="n">score (95 %)</th><th class="n">questions</th></tr>{"".join(lines)}</table>'


def _form(shown: Sequence[Row], kinds: Sequence[str]) -> str:
    counts = Counter(said(*row) for row in shown)
    choices = [("", "all", len(shown)), *((name, name, counts[name]) for name in VERDICTS if counts[name])]
    radios = "".join(
        f'<label><input type="radio" name="verdict" value="{value}"{" checked" if not value else ""}> {name} ({count:,})</label>'
        for value, name, count in choices
    )
    options = "".join(f'<option value="{number}">{_text(kind, 80)}</option>' for number, kind in enumerate(kinds))
    menu = f'<label>Category <select name="category"><option value="">all</option>{options}</select></label>' if kinds else ""
    return f'<form><fieldset><legend>Verdict</legend>{radios}</fieldset>{menu}<output aria-live="polite"></output></form>'


def _card(answered: Answered, verdict: Verdict | None, kinds: Sequence[str]) -> str:
    question, name = answered.question, said(answered, verdict)
    number = kinds.index(question.category) if question.category else ""
    expected = verdict.expected if verdict is not None and verdict.expected else "" if question.truth is None else str(question.truth)
    judged = name if name != "partly" or verdict is None else f"partly right ({verdict.points:.2f})"
    lines = [
        ("question", question.prompt),
        ("answer", "(none)" if answered.text is None else answered.text),
        *([("read as", verdict.parsed)] if verdict is not None and answered.text is not None and verdict.parsed != answered.text else []),
        *([("expected", expected)] if expected else []),
        ("verdict", judged),
    ]
    listed = "".join(f"<dt>{key}</dt><dd>{_text(value)}</dd>" for key, value in lines)
    head = _text(question.id, 200) + (f" · {_text(question.category, 80)}" if question.category else "")
    picture = "" if question.image is None else thumbnail(question.image, f"picture of question {question.id}")
    return f'<article data-verdict="{name}" data-category="{number}">{picture}<div><h3>{head}</h3><dl>{listed}</dl></div></article>'
