"""report.html is a whole page: balanced, without addresses, with words for every picture, small however long or ill the run was."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.train.progress import EVALUATIONS, METRICS, PANEL
from llavakit.train.report import POINTS, write_report

VOID = {"meta", "img", "br"}
PICTURE = "data:image/jpeg;base64,AAAA"
ODD = '<b> & "quotes" </td>'


class Page(HTMLParser):
    """Every tag is closed by its own; what is shown without words, and every place something is fetched from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            assert given["alt"]
        if tag == "svg":
            assert given["role"] == "img"
            assert given["aria-label"]
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "data", "action", "poster", "xlink:href"):
                self.sources.append(value or "")
            if name == "points":
                assert all(math.isfinite(float(number)) for number in (value or "").replace(",", " ").split())

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def step(number: int, **changes: Any) -> dict[str, Any]:
    fields = {"step": number, "epoch": 0.1, "loss": 2.0 / number, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "learned": 10, "samples": 4}
    return fields | {"step_time": 0.5, "tokens_per_s": 200.0} | changes


def evaluation(number: int, *, loss: float = 1.5, replies: Sequence[str] | None = ("It is red.", "It is red.")) -> dict[str, Any]:
    groups = {name: {"loss": loss, "learned": 30, "samples": 3} for name in (f"{ODD}, picture", "chat, text")}
    return {"step": number, "losses": groups, "replies": replies}


def run(out: Path, metrics: Sequence[Any], evaluations: Sequence[Any] = (), panel: int = 0) -> Page:
    out.mkdir(exist_ok=True)
    (out / METRICS).write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (out / EVALUATIONS).write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    row = {"id": ODD, "question": ODD, "truth": "It is red.", "picture": PICTURE}
    (out / PANEL).write_text(json.dumps([row] * panel))
    (out / "config.yaml").write_text(f"data: {ODD}\n")
    page = write_report(out).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page)
    found = Page(page)
    assert all(source.startswith("data:image/") for source in found.sources)
    assert found.seen[:5] == ["html", "head", "meta", "title", "style"]
    assert "script" not in found.seen
    return found


@pytest.mark.parametrize("evaluations", [0, 1, 2, 7])
def test_it_is_a_whole_page_that_fetches_nothing(evaluations: int, tmp_path: Path) -> None:
    page = run(tmp_path / ODD.replace("/", ""), [step(n) for n in (1, 2, 3)], [evaluation(n + 1) for n in range(evaluations)], panel=2)
    assert page.seen.count("svg") == 4 + bool(evaluations)
    assert ("Held-out loss" in page.text) == bool(evaluations)
    assert page.seen.count("img") == 2 * bool(evaluations)
    assert page.text.count("It is red.") == 2 * bool(evaluations) * (1 + min(5, evaluations))
    assert page.seen.count("b") == 2 * bool(evaluations), "only our own: what the data say is text"
    assert page.seen.count("th") == (0 if not evaluations else 3 + (evaluations > 1) + 3)


def test_a_cut_model_answers_no_panel_and_a_panel_may_grow(tmp_path: Path) -> None:
    page = run(tmp_path / "cut", [step(1)], [evaluation(1, replies=None)], panel=1)
    assert page.seen.count("li") == 0
    page = run(
        tmp_path / "grown", [step(1), step(2)], [evaluation(1, replies=["It is red."]), evaluation(2, replies=["It is red."] * 3)], panel=3
    )
    assert page.seen.count("li") == 4


@settings(deadline=None, max_examples=30)
@given(values=st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=20), held=st.floats())
def test_numbers_that_are_none_are_left_out(values: list[float | None], held: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    lines = [step(n, loss=value, grad_norm=value, epoch=float(n)) for n, value in enumerate(values, 1)]
    run(tmp_path_factory.mktemp("odd") / "run", lines, [evaluation(1, loss=held), evaluation(2, loss=1.0)], panel=1)


def test_a_run_that_never_learned_still_has_a_page(tmp_path: Path) -> None:
    page = run(tmp_path / "run", [step(n, loss=None, grad_norm=None) for n in (1, 2)], [evaluation(2, loss=math.nan)])
    assert "none" in page.text
    assert page.seen.count("svg") == 2


def test_a_long_run_has_a_small_page(tmp_path: Path) -> None:
    """A hundred thousand steps, a thousand measurements: no curve of more than POINTS points."""
    page = run(tmp_path / "run", [step(n) for n in range(1, 100_001)], [evaluation(n) for n in range(1, 1001)], panel=6)
    text = (tmp_path / "run" / "report.html").read_text()
    curves = re.findall(r'points="([^"]*)"', text)
    assert len(curves) == 6
    assert all(len(curve.split()) <= POINTS for curve in curves)
    assert len(text) < 120_000
    assert "100,000 steps" in page.text
