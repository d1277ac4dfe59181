"""The page of a run: whole in itself, harmless whatever the texts hold, and honest about what it leaves out."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image as Pictures

from llavakit.eval import page as module
from llavakit.eval.benchmark import Answered, Question, Score, Verdict
from llavakit.eval.page import page, write_page
from llavakit.types import Image

EMPTY = {"meta", "input", "img"}


class Parsed(HTMLParser):
    """Checks that every tag is closed, and collects articles and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.articles: list[dict[str, str | None]] = []
        self.names: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag == "article":
            self.articles.append(dict(attrs))
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def row(name: str, text: str | None, points: float | None, *, category: str = "", image: Image | None = None, prompt: str = "What?"):  # type: ignore[no-untyped-def]
    question = Question(id=name, given=1, prompt=prompt, category=category, image=image, truth="red")
    verdict = None if points is None else Verdict(parsed=text or "", points=points, expected="red")
    return Answered(question=question, text=text), verdict


def test_every_question_stands_there_with_its_verdict_and_category() -> None:
    rows = [
        row("a", "red", 1, category="color"),
        row("b", "blue", 0, category="color"),
        row("c", "rot", 0.3, category="word"),
        row("d", None, None),
    ]
    text = page(
        rows, title="scenes", facts=["model: tiny"], scores=[Score(metric="color", value=50, count=2, half_width=31.2, headline=True)]
    )
    parsed = Parsed(text)
    assert [one["data-verdict"] for one in parsed.articles] == ["right", "wrong", "partly", "unanswered"]
    assert [one["data-category"] for one in parsed.articles] == ["0", "0", "1", ""]
    for words in ("all (4)", "right (1)", "wrong (1)", "partly (1)", "unanswered (1)", "50.0 ± 31.2", "model: tiny", "partly right (0.30)"):
        assert words in text
    assert re.findall(r'<option value="(\d+)">(\w+)', text) == [("0", "color"), ("1", "word")]


def test_it_is_whole_in_itself_and_the_only_script_is_ours() -> None:
    text = page([row("a", "red", 1)], title="x")
    assert not re.search(r"https?:|<link|@import|url\(", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text
    assert "color-scheme: light dark" in text
    assert 'lang="en"' in text
    assert 'aria-live="polite"' in text


@pytest.mark.parametrize(
    "bad", ["</article><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\0b\x1b[2J", "\ud800", "x" * 10**6]
)
def test_texts_do_no_harm(tmp_path: Path, bad: str) -> None:
    rows = [row(bad, bad, 0, category=bad, prompt=bad), row("b", None, None)]
    write_page(tmp_path / "p.html", rows, title=bad, facts=[bad], scores=[Score(metric=bad, value=1, count=1)])
    text = (tmp_path / "p.html").read_text("utf-8")
    parsed = Parsed(text)
    assert parsed.names.count("script") == 1
    assert "img" not in parsed.names
    assert "\0" not in text
    assert len(text) < 50_000


def test_pictures_are_small_and_inside(tmp_path: Path) -> None:
    Pictures.new("RGB", (1600, 800), "red").save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    names = ("a.png", "torn.png", "absent.png")
    text = page([row(name, "red", 1, image=Image(tmp_path / name)) for name in names], title="x")
    (shown,) = Parsed(text).images
    assert (shown["width"], shown["height"]) == ("200", "100")
    assert shown["alt"]
    assert str(shown["src"]).startswith("data:image/jpeg;base64,")
    assert text.count("no picture") == 2
    assert str(tmp_path) not in text


def test_of_a_large_run_the_wrong_ones_are_shown_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHOWN", 10)
    rows = [row(f"q{n}", "red" if n % 4 else "blue", 1 if n % 4 else 0) for n in range(24)]
    text = page(rows, title="x")
    shown = re.findall(r"<h3>(q\d+)", text)
    assert len(shown) == 10
    assert set(shown) >= {f"q{n}" for n in range(0, 24, 4)}
    assert shown == sorted(shown, key=lambda name: int(name[1:]))
    assert "10 of 24 questions are shown" in text


def test_no_question_is_a_page_too() -> None:
    assert Parsed(page([], title="x")).articles == []
