"""The report over generated rows: counted as by hand, nearest texts against exact shares, a page that is safe and bounded."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from llavakit.datagen import facts as counting
from llavakit.datagen import nearest
from llavakit.datagen.facts import count, json_lines, plainly_named
from llavakit.datagen.nearest import Nearest
from llavakit.datagen.report import bars, histogram, write_report
from llavakit.errors import DataError

Row = dict[str, Any]


def row(name: str, kind: str, *said: str, image: str = "a.png", **more: Any) -> Row:
    turns = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(said)]
    return {"id": name, "image": image, "conversations": turns, "kind": kind, "teacher": "t", "attempt": 0} | more


ROWS = [
    row("1", "conversation", "<image>\nWhat is this?", "A dog.", "What is it doing?", "It sleeps.", attempt=1),
    row("2", "conversation", "Where is it?\n<image>", "On a sofa.", image="b.png", unknown=["cat"], objects=2),
    row("3", "detail", "<image>\nDescribe.", "Two people and three benches stand near a bus.", image="b.png"),
    row("4", "reasoning", "Why?\n<image>", "Because.", image="c.png", teacher="u"),
]
REJECTS: list[Row] = [
    {"id": "5", "kind": "detail", "reason": "refusal", "detail": "it declines", "text": "I cannot."},
    {"id": "6", "kind": "detail", "reason": "refusal", "detail": "it declines", "text": "Sorry."},
    {"id": "7", "kind": "reasoning", "reason": "too_long", "detail": "cut", "text": "And so"},
]
CONTEXTS: list[Row] = [
    {"image": "a.png", "captions": ["x"], "instances": [{"category": "dog", "bbox": [0, 0, 1, 1]}, {"category": "sofa", "bbox": []}]},
    {"image": "b.png", "captions": ["x"], "instances": [{"category": c, "bbox": []} for c in ("person", "bench", "bus", "bus", "kite")]},
]


# --- counting -------------------------------------------------------------------------------------------------------------------------


def test_what_is_counted() -> None:
    found = count(ROWS, REJECTS, CONTEXTS)
    assert {name: kind.rows for name, kind in found.kinds.items()} == {"conversation": 2, "detail": 1, "reasoning": 1}
    assert found.kinds["conversation"].turns == {2: 1, 1: 1}
    assert found.kinds["conversation"].asked == {3: 2, 4: 1}
    assert found.kinds["conversation"].answered == {2: 2, 3: 1}
    assert found.openings == {"what is": 2, "where is": 1, "describe": 1, "why": 1}  # the marker of the picture is no word
    assert (found.teachers, found.attempts) == ({"t": 3, "u": 1}, {0: 3, 1: 1})
    assert found.images == {"a.png", "b.png", "c.png"}
    assert found.reasons == {("refusal", "detail"): 2, ("too_long", "reasoning"): 1}
    assert (found.unknown_rows, found.unknown, found.without_context) == (1, {"cat": 1}, 1)
    objects = {name: (one.rows, one.named) for name, one in found.objects.items()}
    assert objects == {"dog": (1, 1), "sofa": (1, 0), "person": (2, 1), "bench": (2, 1), "bus": (2, 1), "kite": (2, 0)}


def test_provenance_may_stand_below() -> None:
    below = row("1", "detail", "q", "a") | {"provenance": {"teacher": "deep", "attempt": 2}}
    found = count([below])
    assert (found.teachers, found.attempts) == ({"deep": 1}, {2: 1})


def test_another_way_to_name_objects_can_be_given() -> None:
    found = count(ROWS, contexts=CONTEXTS, named=lambda text, categories: [c for c in categories if c == "kite"])
    assert (found.objects["kite"].named, found.objects["dog"].named) == (2, 0)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Two buses and a city.", {"bus", "city"}),
        ("busy cities, foxes", {"city", "fox"}),
        ("A HOT   DOG", {"hot dog", "dog"}),
        ("some women", {"person"}),
        ("hotdog", set()),
        ("", set()),
    ],
)
def test_plain_names(text: str, named: set[str]) -> None:
    assert set(plainly_named(text, ["bus", "city", "fox", "hot dog", "dog", "person"])) == named


@pytest.mark.parametrize("bad", [{}, {"conversations": []}, {"conversations": [1, 2]}, {"conversations": "ab"}])
def test_rows_that_are_none(bad: Row) -> None:
    with pytest.raises(DataError, match="row 2"):
        count([ROWS[0], bad])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500), st.integers(1, 4)), max_size=30))
def test_nothing_is_lost_in_counting(made: list[tuple[str, int, int]]) -> None:
    rows = [row(str(n), kind, *["word " * words] * (2 * turns)) for n, (kind, words, turns) in enumerate(made)]
    found = count(rows)
    assert found.rows == len(rows)
    assert Counter({name: kind.rows for name, kind in found.kinds.items()}) == Counter(kind for kind, _, _ in made)
    for kind in found.kinds.values():
        assert kind.answered.total() == kind.asked.total() == sum(turns * times for turns, times in kind.turns.items())
        assert len(kind.samples) == min(kind.rows, counting.SAMPLES)


def test_samples_are_fair() -> None:
    rows = [row(str(n), "detail", "q", "a") for n in range(40)]
    taken = Counter(one["id"] for seed in range(400) for one in count(rows, seed=seed).kinds["detail"].samples)
    assert len(taken) == 40
    assert all(abs(times - 80) < 5 * 8.2 for times in taken.values())  # 400 * 8 / 40, binomial


# --- nearest texts --------------------------------------------------------------------------------------------------------------------


def exact(a: list[str], b: list[str]) -> float:
    runs_a, runs_b = ({tuple(words[at : at + nearest.RUN]) for at in range(len(words) - nearest.RUN + 1)} for words in (a, b))
    return len(runs_a & runs_b) / len(runs_a | runs_b)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.55, 1))
def test_alike_texts_are_found_and_their_share_is_about_right(seed: int, kept: float) -> None:
    draw = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(500)]
    original = draw.choices(vocabulary, k=150)
    copied = original[: int(150 * kept)] + draw.choices(vocabulary, k=150 - int(150 * kept))
    texts = {"original": original, "copy": copied} | {f"other{n}": draw.choices(vocabulary, k=150) for n in range(20)}
    near = Nearest(seed)
    for name, words in texts.items():
        near.add(name, " ".join(words).title())
    share = exact(original, copied)
    found = near.pairs(3)
    if share > 0.7:
        assert (found[0].first.name, found[0].second.name) == ("original", "copy")
    for pair in found:
        assert abs(pair.share - exact(texts[pair.first.name], texts[pair.second.name])) < 0.3  # five standard deviations of 72 draws


def test_same_texts_share_all_and_each_stands_in_one_pair() -> None:
    near = Nearest()
    for number in range(6):
        near.add(str(number), f"the same {'words' if number < 4 else 'things'} again and again")
    near.add("short", "two words")
    pairs = near.pairs()
    assert [pair.share for pair in pairs] == [1.0] * 3
    names = [one.name for pair in pairs for one in (pair.first, pair.second)]
    assert pairs[0].first.beginning.startswith("the same ")
    assert sorted(names) == [str(number) for number in range(6)]
    assert near.left_out == 1
    assert Nearest().pairs() == []


def test_a_crowd_of_equal_texts_is_not_compared_pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    near = Nearest()
    for number in range(3000):
        near.add(str(number), "there is nothing new in this text at all")
    assert len(near.pairs()) == nearest.CROWD // 2
    monkeypatch.setattr(nearest, "MOST", 3000)
    near.add("more", "a text that comes too late")
    assert near.left_out == 1


# --- the page -------------------------------------------------------------------------------------------------------------------------

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\0\u202e\ud800 http://evil.example/x"


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "link", "object", "a", "form")
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    return page


def test_the_page_tells_everything(tmp_path: Path) -> None:
    Image.new("RGB", (400, 300), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    write_report(
        tmp_path / "r.html",
        ROWS,
        rejects=REJECTS,
        contexts=CONTEXTS,
        images=tmp_path,
        cost={"tokens": 12345, "money": 0.5},
        title="my rows",
    )
    page = read(tmp_path / "r.html")
    told = "my rows; 4 rows about 3 pictures; 3 replies not used (42.9% of all); teacher: t (3 rows), u (1 rows); 12,345; It sleeps."
    told += "; refusal; I cannot.; what is; kite; cat (1); 1 rows took more than one reply; no picture"
    for words in told.split("; "):
        assert words in page.text, words
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [(picture["width"], picture["height"]) for picture in pictures] == [("224", "168")]  # a.png alone can be shown
    assert list(tmp_path.glob(".*")) == []


def test_nothing_that_rows_say_reaches_the_page_as_code(tmp_path: Path) -> None:
    rows = [row(EVIL, EVIL, EVIL, EVIL, image=EVIL, teacher=EVIL, unknown=[EVIL]), row("2", EVIL, EVIL, EVIL * 2, image="../up.png")]
    Image.new("RGB", (20, 20)).save(tmp_path / "up.png")
    (tmp_path / "pictures").mkdir()
    rejects = [{"id": EVIL, "kind": EVIL, "reason": EVIL, "detail": EVIL, "text": EVIL}]
    contexts = [{"image": EVIL, "instances": [{"category": EVIL}]}]
    path = tmp_path / "r.html"
    write_report(path, rows, rejects=rejects, contexts=contexts, images=tmp_path / "pictures", cost={EVIL: EVIL}, title=EVIL)
    page = read(path)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "\0" not in page.text
    assert "\u202e" not in page.text


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.text(max_size=5)), max_size=5))
def test_any_text_makes_a_page(tmp_path_factory: pytest.TempPathFactory, said: list[tuple[str, str, str]]) -> None:
    path = tmp_path_factory.mktemp("page") / "r.html"
    write_report(path, [row(kind, kind, question, answer) for question, answer, kind in said])
    read(path)


def test_the_page_is_bounded(tmp_path: Path) -> None:
    draw = random.Random(0)
    Image.effect_noise((300, 300), 90).convert("RGB").save(tmp_path / "a.png")

    def long() -> str:
        return " ".join(f"{draw.randrange(10**6)}" for _ in range(400))

    rows = (row(f"{'x' * 5000}{n}", f"kind{n % 450}", long(), long(), teacher=f"{n}" * 99, unknown=[f"{n}" * 99]) for n in range(500))
    rejects = ({"id": str(n), "kind": str(n), "reason": str(n), "text": long()} for n in range(500))
    contexts = [{"image": "a.png", "instances": [{"category": f"{n}" * 99} for n in range(2000)]}]
    write_report(tmp_path / "r.html", rows, rejects=rejects, contexts=contexts, images=tmp_path, named=lambda text, categories: [])
    read(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 2_000_000


@given(st.dictionaries(st.integers(0, 400), st.integers(1, 10**6), min_size=1))
def test_a_histogram_draws_every_value_once(counts: dict[int, int]) -> None:
    drawing = ET.fromstring(histogram("words", counts))
    titles = [title.text or "" for title in drawing.iter("title")]
    assert len(titles) <= 24
    assert sum(int(title.split(": ")[1].replace(",", "")) for title in titles) == sum(counts.values())
    for rect in drawing.iter("rect"):
        assert 0 <= float(rect.attrib["y"]) <= float(rect.attrib["y"]) + float(rect.attrib["height"]) <= 150


@given(st.lists(st.tuples(st.text(), st.integers(1, 10**6)), min_size=1, max_size=16))
def test_bars_keep_inside(counts: list[tuple[str, int]]) -> None:
    drawing = ET.fromstring(re.sub(r"[\ufffe\uffff]", "?", bars("names", counts)))
    for rect in drawing.iter("rect"):
        assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= 340


# --- files ----------------------------------------------------------------------------------------------------------------------------


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert list(json_lines(path)) == ROWS
    for content, where in (("{}\n{", "rows.jsonl:2"), ("[]", "rows.jsonl:1")):
        path.write_text(content)
        with pytest.raises(DataError, match=re.escape(where)):
            list(json_lines(path))
    with pytest.raises(DataError):
        list(json_lines(tmp_path / "none"))
    path.write_bytes(b"\xff")
    with pytest.raises(DataError):
        list(json_lines(path))
