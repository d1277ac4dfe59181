"""Laws of ``data.convert``, ``data.parquet`` and ``data.check``: nothing is lost on the way, and everything wrong is found."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from llavakit.data.check import check, stats
from llavakit.data.convert import convert
from llavakit.data.messages import normal
from llavakit.data.rules import examine
from llavakit.data.sources import read_llava
from llavakit.errors import ConfigError, DataError, MissingExtraError
from test_messages import llava_records, message_records


@pytest.fixture(scope="module")
def arrow() -> Any:
    return pytest.importorskip("pyarrow", reason="the optional pyarrow package is not installed (pip install 'llavakit[data]')")


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def record(number: int, **fields: Any) -> dict[str, Any]:
    question = "<image>\nWhat?" if "image" in fields else "What is it?"
    return {"id": f"s{number}", "conversations": turns(question, f"It is number {number}.")} | fields


def write(path: Path, records: Any) -> Path:
    path.write_text(json.dumps(records))
    return path


def usable(entry: Any) -> bool:
    return examine(entry, where="x", allow_outside=True).fault is None


# ---- there and back


@settings(deadline=None, max_examples=40)
@given(
    records=st.lists(llava_records().filter(usable), min_size=1, max_size=4),
    through=st.lists(st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.json.gz"]), min_size=1, max_size=2),
)
def test_a_file_comes_back_as_it_was(records: list[Any], through: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("convert")
    path = write(folder / "start.json", records)
    for number, name in enumerate([*through, "end.json"]):
        path, before = folder / f"{number}-{name}", path
        assert convert(before, path).records == len(records)
    assert json.loads(path.read_text()) == records


@settings(deadline=None, max_examples=40)
@given(records=st.lists((llava_records() | message_records()).filter(usable), min_size=1, max_size=4))
def test_parquet_comes_back_as_it_was(arrow: Any, records: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pictures come back as files of their own; all else is the same."""
    folder = tmp_path_factory.mktemp("parquet")
    (folder / "b").mkdir()
    for name in ("a.png", "b/c.jpg", "d"):
        (folder / name).write_bytes(f"picture {name}".encode())
    path = write(folder / "start.json", records)
    convert(path, folder / "rows.parquet")
    convert(folder / "rows.parquet", folder / "back.jsonl")
    convert(path, folder / "plain.jsonl")
    back, plain = ([json.loads(line) for line in (folder / name).read_text().split("\n") if line] for name in ("back.jsonl", "plain.jsonl"))
    for one, other in zip(back, map(normal, plain), strict=True):
        assert [(folder / name).read_bytes() for name in names(one)] == [(folder / name).read_bytes() for name in names(other)]
        assert {k: v for k, v in one.items() if k not in ("image", "images")} == {
            k: v for k, v in other.items() if k not in ("image", "images")
        }
        assert [key for key in ("image", "images") if key in one] == [key for key in ("image", "images") if key in other]


def names(record: dict[str, Any]) -> list[str]:
    found = record.get("image", record.get("images")) or []
    return [found] if isinstance(found, str) else found


def test_training_reads_parquet_with_its_pictures(arrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pillow.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    path = write(tmp_path / "data.json", [record(0, image="a.png"), record(1)])
    convert(path, tmp_path / "data.parquet")
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    for small in (1 << 20, -1):
        monkeypatch.setattr("llavakit.data.index.SMALL", small)
        source = read_llava(tmp_path / "data.parquet")
        assert [sample.id for sample in source] == ["s0", "s1"]
        assert source[0].conversation.images[0].source == (tmp_path / "b.png").read_bytes()
        assert source.lengths()[0][0] is True


def test_rows_of_others_are_records(arrow: Any, tmp_path: Path) -> None:
    """LLaVA's columns as the released sets have them: one picture's cell, every key in every row."""
    import pyarrow.parquet

    rows = [
        {"id": "1", "conversations": turns("<image>\nWhat?", "b"), "image": {"bytes": b"x", "path": None}, "data_source": "y"},
        {"id": "2", "conversations": turns("a", "b"), "image": None, "data_source": None},
    ]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    source = read_llava(tmp_path / "data.parquet")
    assert [sample.id for sample in source] == ["1", "2"]
    assert [[image.source for image in sample.conversation.images] for sample in source] == [[b"x"], []]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1....")
    path = write(tmp_path / "data.json", [record(0)])
    for act in (lambda: read_llava(tmp_path / "data.parquet"), lambda: convert(path, tmp_path / "out.parquet")):
        with pytest.raises(MissingExtraError, match=r"pip install 'llavakit\[data\]'"):
            act()
    assert not (tmp_path / "out.parquet").exists()


def test_broken_parquet_is_a_bad_file(arrow: Any, tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError) as caught:
        read_llava(tmp_path / "data.parquet")
    assert caught.value.code == "bad_file"


# ---- what convert refuses, and what it repairs


def test_a_comma_too_many_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(0)]).replace("}]}]", "},],},]"))
    with pytest.raises(DataError, match="remove the comma"):
        read_llava(path)
    convert(path, tmp_path / "good.json")
    assert json.loads((tmp_path / "good.json").read_text()) == [record(0)]


def test_what_cannot_be_used_stops_it_or_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [record(0), record(1) | {"conversations": turns("a")}, record(2)])
    with pytest.raises(DataError) as caught:
        convert(path, tmp_path / "out.jsonl")
    assert (caught.value.code, caught.value.where) == ("open_conversation", "data.json:[1] (id s1)")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.json"]
    report = convert(path, tmp_path / "out.jsonl", skip=True)
    assert (report.records, dict(report.faults)) == (3, {"open_conversation": 1})
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_the_endings(tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", [record(0)])
    for name in ("out.txt", "out", "out.parquet.gz"):
        with pytest.raises(ConfigError):
            convert(path, tmp_path / name)
    convert(path, tmp_path / "out.jsonl", written="llava")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == record(0)
    convert(path, tmp_path / "out.json.gz", written="messages")
    assert json.loads(gzip.decompress((tmp_path / "out.json.gz").read_bytes()))[0]["messages"][0]["role"] == "user"


# ---- check


def test_check_finds_everything(tmp_path: Path) -> None:
    Pillow.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    lines = [
        json.dumps(record(0, image="good.png")),
        json.dumps({"id": "two", "image": "../x.png", "conversations": turns("<image>a", " ", "b", "")}),
        '{"id": 1,}',
        json.dumps(record(0, image="bad.png")),
        json.dumps(record(4, image="none.png")),
        "7",
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    found = check(path, open_images=True)
    assert found.records == 5
    assert [(finding.code, finding.where.split(" ")[0].split("/")[-1]) for finding in found.findings] == [
        ("image_outside", "data.jsonl:2"),
        ("empty_reply", "data.jsonl:2"),
        ("empty_reply", "data.jsonl:2"),
        ("bad_json", "data.jsonl,"),
        ("id_repeated", "data.jsonl:4"),
        ("bad_record", "data.jsonl:6"),
        ("image_missing", "data.jsonl:2"),
        ("image_missing", "data.jsonl:5"),
        ("image_unreadable", "data.jsonl:4"),
    ]
    assert "image_unreadable" not in [finding.code for finding in check(path).findings]


@settings(deadline=None, max_examples=40)
@given(records=st.lists(llava_records() | message_records() | st.integers() | st.just({}), max_size=6))
def test_check_has_a_fault_exactly_where_training_would_stop(records: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("check")
    path = write(folder / "data.json", records)
    found = check(path)
    if not found.faults:
        assert len(read_llava(path)) == found.records
        return
    with pytest.raises(DataError) as caught:
        read_llava(path)
    assert caught.value.code in [finding.code for finding in found.findings if finding.fault]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for content, code in ((b"[", "bad_json"), (b"[]", "no_samples"), (None, "bad_file")):
        path = tmp_path / "data.json"
        path.write_bytes(content) if content is not None else path.unlink()
        assert [finding.code for finding in check(path).findings] == [code]


# ---- stats


def test_stats_are_those_of_the_plain_lists(tmp_path: Path) -> None:
    entries = [record(i) | {"conversations": turns(*["a b c"[: 1 + 2 * (i % 3)], "x " * (i + 1)] * (1 + i % 4))} for i in range(20)]
    samples = list(read_llava(write(tmp_path / "data.json", entries)))
    found = stats((sample.conversation for sample in samples), count=lambda talk: (len(talk.turns) * 10, len(talk.turns)), max_length=40)
    rounds = [1 + i % 4 for i in range(20)]
    assert found.samples == 20
    assert found.images == {0: 20}
    assert (found.spreads["turns"].total, found.spreads["turns"].most) == (sum(rounds), 4)
    assert found.spreads["reply_words"].total == sum((i + 1) * rounds[i] for i in range(20))
    assert found.spreads["question_words"].least == 1
    assert found.spreads["tokens"].most == 80
    assert found.cut == sum(20 * r > 40 for r in rounds)
    assert stats([]).spreads == {}
