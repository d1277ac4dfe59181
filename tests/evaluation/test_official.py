"""Official files: whatever is wrong with one is told with its place and a code of its own; what is written is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavakit.errors import DataError
from llavakit.eval import files
from llavakit.eval.benchmark import Protocol
from llavakit.eval.official import Row, find, number, parquets, picture, read_object, read_rows, read_table, read_text

PNG = b"\x89PNG\r\n\x1a\n-"


@pytest.mark.parametrize(
    ("name", "content", "code", "where"),
    [
        ("a.json", b'[{"a": 1},\n]', "bad_json", ":2"),
        ("a.json", b"[" * 100_000, "bad_json", ""),
        ("a.json", b"[" + b"9" * 5000 + b"]", "bad_json", ""),
        ("a.json", b"{}", "bad_file", ""),
        ("a.json", b"[{}, 7]", "bad_record", " [1]"),
        ("a.json", b"\xff", "bad_file", ""),
        ("a.jsonl", b'{"a": 1}\n\n{"a"', "bad_json", ":3"),
        ("a.jsonl", b'{"a": 1}\n[]', "bad_record", ":2"),
    ],
)
def test_what_is_wrong_has_a_place_and_a_code(tmp_path: Path, name: str, content: bytes, code: str, where: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert (caught.value.code, caught.value.where) == (code, f"{path}{where}")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    for missing, words in (
        (lambda: find(tmp_path, "a", "b", "c"), "no a, b or c"),
        (lambda: parquets(tmp_path, "test", instead="test.json"), "no test.json and no test-"),
    ):
        with pytest.raises(DataError, match=words) as caught:
            missing()
        assert (caught.value.code, caught.value.where) == ("missing_file", str(tmp_path))
    for read in (read_text, read_object, read_table):
        with pytest.raises(DataError) as caught:
            read(tmp_path / "a.json")
        assert (caught.value.code, caught.value.where) == ("bad_file", str(tmp_path / "a.json"))


def test_strange_ends_of_lines_are_part_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": "x\u2028y"}, ensure_ascii=False) + "\r\n" + '{"a": "\u0085"}', encoding="utf-8-sig")
    assert [row.text("a") for row in read_rows(path, lines=True)] == ["x\u2028y", "\u0085"]


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda row: row.text("x", "y"), "no x or y"),
        (lambda row: row.text("number"), "number is not text"),
        (lambda row: row.id("true"), "true is not a text or a number"),
        (lambda row: row.whole("text"), "text is 'a', no whole number"),
        (lambda row: row.list("text"), "text is not a list"),
        (lambda row: row.texts("list"), "no list of texts"),
        (lambda row: row.one_of("text", "b", "c"), "text is 'a'"),
    ],
)
def test_cells_are_checked(check: object, words: str) -> None:
    row = Row({"number": 1, "true": True, "text": "a", "list": ["a", 1]}, "there:7")
    with pytest.raises(DataError, match=words) as caught:
        check(row)  # type: ignore[operator]
    assert (caught.value.code, caught.value.where) == ("bad_record", "there:7")
    assert (row.id("number"), row.text("none", "text")) == (1, "a")


@pytest.mark.parametrize(
    ("given", "read"), [("7", 7), (7, 7), (" 7 ", 7), ("v1_7", "v1_7"), ("7.0", "7.0"), (True, "True"), (None, "None")]
)
def test_ids_are_numbers_where_they_can_be(given: object, read: int | str) -> None:
    assert number(given) == read


def test_a_picture_is_unpacked_once_or_stays_in_memory(tmp_path: Path) -> None:
    row = Row({"image": {"bytes": PNG, "path": None}}, "x")
    first, second = (picture(row, "image", tmp_path / "a.parquet").source for _ in range(2))
    assert first == second
    assert isinstance(first, Path)
    assert (first.suffix, first.read_bytes()) == (".png", PNG)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "unpacked").touch()  # no folder can be made there
    assert picture(row, "image", tmp_path / "b" / "a.parquet").source == PNG


def test_a_suffix_stands_behind_a_question_once() -> None:
    protocol = Protocol(name="x", suffix="Say one word.\nOr none.")
    asked = protocol.asked("What?")
    assert asked == "What?\nSay one word.\nOr none."
    assert protocol.asked(asked) == asked
    assert Protocol(name="x").asked("What?") == "What?"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.replaced(tmp_path / "new" / "a.txt", "é\n")
    assert path.read_bytes() == "é\n".encode()

    def full(*given: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.replaced(path, "b")
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_half_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    assert files.replaced(tmp_path / "a", "a\ud800").read_text() == "a?"
    assert json.loads(files.json_file(tmp_path / "b", {"a": "\ud800"}).read_text()) == {"a": "\ud800"}
    assert json.loads(files.json_lines(tmp_path / "c", [{"a": "é"}]).read_text()) == {"a": "é"}
