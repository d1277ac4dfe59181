"""Laws of ``data.reading``: in pieces of any size a file reads as it would whole, and what is broken is told with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llavakit.data import reading
from llavakit.data.reading import Records
from llavakit.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
WRITERS = (
    lambda v: json.dumps(v),
    lambda v: json.dumps(v, ensure_ascii=False, indent=2),
    lambda v: json.dumps(v, separators=(",", ":")) + " \n",
)
QUIET = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reading") / "data.json"


def read(path: Path, content: str | bytes, chunk: int, **options: Any) -> list[tuple[int, Any]]:
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return list(Records(path, chunk=chunk, **options))


@QUIET
@example(values=[-0.0, 1e30], writer=json.dumps, chunk=1, packed=False)
@given(values=st.lists(VALUES, max_size=5), writer=st.sampled_from(WRITERS), chunk=st.integers(1, 40), packed=st.booleans())
def test_a_list_reads_as_it_would_whole(values: list[Any], writer: Any, chunk: int, packed: bool, path: Path) -> None:
    content = writer(values).encode("utf-8", "surrogatepass")
    if b"\xed" not in content:  # a lone surrogate, which is no UTF-8
        assert read(path, gzip.compress(content) if packed else content, chunk) == list(enumerate(values))


@QUIET
@given(values=st.lists(VALUES, max_size=5), blank=st.lists(st.integers(0, 5), max_size=3), chunk=st.integers(1, 40))
def test_lines_are_numbered_as_an_editor_does(values: list[Any], blank: list[int], chunk: int, path: Path) -> None:
    lines = [json.dumps(value) for value in values if not isinstance(value, list)]
    for place in blank:
        lines.insert(place, "  ")
    expected = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    assert read(path, "\n".join(lines), chunk) == expected


@settings(deadline=None, max_examples=200)
@given(data=st.data(), writer=st.sampled_from(WRITERS), chunk=st.integers(1, 40))
def test_what_is_broken_is_told_where_json_tells_it(data: st.DataObject, writer: Any, chunk: int, path: Path) -> None:
    """One character put in, changed or taken away: the same verdict as ``json.loads`` on the whole, at the same line and column."""
    text = writer(data.draw(st.lists(VALUES, min_size=1, max_size=4)))
    place = data.draw(st.integers(1, len(text) - 1))
    text = (
        text[:place]
        + data.draw(st.sampled_from(["", ",", "]", "}", '"', "x", "\n", "\\", "1"]))
        + text[place + data.draw(st.integers(0, 1)) :]
    )
    if not text.isascii():
        return
    try:
        expected = list(enumerate(json.loads(text)))
    except json.JSONDecodeError as error:
        with pytest.raises(DataError) as caught:
            read(path, text, chunk)
        assert caught.value.code == "bad_json"
        told = f"line {error.lineno}, column {error.colno}"
        moved = "trailing comma" in error.msg  # Python 3.13 points at the comma, older ones at the bracket
        assert moved or caught.value.where == f"{path}, {told}"
        return
    assert read(path, text, chunk) == expected


@QUIET
@given(values=st.lists(VALUES, max_size=4), chunk=st.integers(1, 30), lines=st.booleans(), blank=st.sampled_from(["", " ", "\r\n\t"]))
@example(values=[{"a": [1, 2]}, ",]"], chunk=3, lines=False, blank="\n")
def test_commas_before_brackets_are_read_over_when_told(values: list[Any], chunk: int, lines: bool, blank: str, path: Path) -> None:
    blank = blank.strip("\r\n") if lines else blank
    texts = [with_commas(value, blank) for value in values if not (lines and isinstance(value, list))]
    text = "\n".join(texts) if lines else f"[{','.join(texts)}{',' if texts else ''}{blank}]"
    assert [value for _, value in read(path, text, chunk, tolerant=True)] == [v for v in values if not (lines and isinstance(v, list))]


def with_commas(value: Any, blank: str) -> str:
    """JSON with a comma after the last member of everything."""
    if isinstance(value, list) and value:
        return f"[{','.join(with_commas(member, blank) for member in value)},{blank}]"
    if isinstance(value, dict) and value:
        return "{" + ",".join(f"{json.dumps(key)}:{with_commas(member, blank)}" for key, member in value.items()) + f",{blank}}}"
    return json.dumps(value)


@QUIET
@given(text=st.text(max_size=30), chunk=st.integers(1, 20), tail=st.binary(max_size=4))
def test_what_is_no_text_is_told_by_byte_and_line(text: str, chunk: int, tail: bytes, path: Path) -> None:
    content = text.encode("utf-8", "surrogatepass") + b"\xff" + tail
    if content[:2] in (b"\x1f\x8b", b"\xff\xfe"):
        return
    with pytest.raises(DataError) as caught:
        read(path, b'["' + content, chunk)
    if caught.value.what.endswith("is not UTF-8"):
        with pytest.raises(UnicodeDecodeError) as whole:
            (b'["' + content).decode()
        line = 1 + content.count(b"\n", 0, whole.value.start - 2)
        assert caught.value.what == f"byte {whole.value.start} (line {line}) is not UTF-8"


def test_the_memory_is_a_records_and_not_the_files(path: Path) -> None:
    import tracemalloc

    path.write_text("[" + ",\n".join(json.dumps({"id": i, "text": "x" * 200}) for i in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in Records(path, chunk=1 << 14))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000
    assert peak < path.stat().st_size / 10


def test_a_long_reading_says_how_far_it_is_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = 0.0
    monkeypatch.setattr(reading.time, "monotonic", lambda: clock)
    tell = reading.now_and_then("reading a.json", said.append)
    for second in range(100):
        clock = float(second)
        tell(second, 100)
    assert len(said) == 99 // 6  # more than five seconds apart
    assert said[:2] == ["reading a.json: 6%", "reading a.json: 12%"]
    tell = reading.now_and_then("reading b.json", said.append)
    tell(0, 0)
    assert not any("b.json" in line for line in said)
