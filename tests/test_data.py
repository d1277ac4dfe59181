"""Laws of ``data``: what a file may hold and what is said about it; the order of samples is a pure function."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from llavakit.data.check import check
from llavakit.data.loader import Loader, Window, epoch_windows, learned_tokens
from llavakit.data.sources import Source, read_llava
from llavakit.errors import DataError
from llavakit.images import Preprocess
from llavakit.processor import Processor
from llavakit.prompts import TEMPLATES
from llavakit.tiling import Tiling

Record = dict[str, Any]


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def record(number: int = 0, *values: str, **fields: Any) -> Record:
    return {"id": f"s{number}", "conversations": turns(*(values or ("What?", f"Number {number}.")))} | fields


def write(folder: Path, records: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def code_of(folder: Path, entry: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_llava(write(folder, [entry]), **options)
    assert caught.value.where
    return caught.value.code


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Pillow.new("RGB", (20, 12), (200, 30, 30)).save(tmp_path / "a.png")
    return "a.png"


# ---- files


def test_every_spelling_of_a_file_gives_the_same_samples(tmp_path: Path) -> None:
    records = [record(i, "Who?", "line\u2028separator", "And?", "x") for i in range(3)]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    spellings = {
        "list.json": json.dumps(records).encode(),
        "pretty.json": json.dumps(records, indent=2).encode(),
        "lines.jsonl": lines.encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n").encode() + b"\r\n\r\n",
        "wide.json": json.dumps(records).encode("utf-16"),
        "packed.json.gz": gzip.compress(json.dumps(records).encode()),
    }
    for name, content in spellings.items():
        (tmp_path / name).write_bytes(content)
    found = [[(s.id, s.conversation) for s in read_llava(tmp_path / name)] for name in spellings]
    assert len(found[0]) == 3
    assert all(samples == found[0] for samples in found)


@pytest.mark.parametrize(
    ("content", "code", "hint"),
    [
        (b'[{"id": "1", "conversations": [1,]}]', "bad_json", "line 1, column 34"),
        (b'[\n{"id": "1"},\n]', "bad_json", "remove the comma"),
        (
            b'{"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n{"id": }',
            "bad_json",
            "line 2, column 8",
        ),
        (b'{\n"conversations": []\n}', "bad_file", "not a list"),
        (b'["caf\xe9"]', "bad_json", "not UTF-8"),
        (b"", "no_samples", ""),
        (b"[]", "no_samples", ""),
        (b"\x1f\x8bbroken", "bad_file", ""),
    ],
)
def test_a_broken_file_is_named_with_its_place(content: bytes, code: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_llava(path)
    assert caught.value.code == code
    assert str(path) in str(caught.value)
    assert hint in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_llava(tmp_path / "none.json")
    assert caught.value.code == "bad_file"


# ---- samples


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ("text", "bad_record"),
        ({"id": "x"}, "no_turns"),
        (record(0) | {"conversations": []}, "no_turns"),
        (record(0) | {"conversations": [{"from": "human"}]}, "bad_record"),
        (record(0) | {"conversations": [{"from": "human", "value": 7}]}, "bad_record"),
        (record(0) | {"conversations": [{"from": "robot", "value": "a"}]}, "unknown_role"),
        (record(0) | {"conversations": [*turns("a"), *turns("b")]}, "bad_turn_order"),
        (record(0, "a"), "open_conversation"),
        (record(0, "a", "b", "c"), "open_conversation"),
        (record(0, "a", " \n"), "empty_reply"),
        (record(0, "<image>\na", "b"), "image_count"),
        (record(0, "<image><image>", "b", image="a.png"), "image_count"),
        (record(0, "a", "b", image="a.png"), "image_count"),
        (record(0, "<image>", "b", image=7), "bad_record"),
        (record(0, "<image>", "b", image="../a.png"), "image_outside"),
        (record(0, "<image>", "b", image="/etc/hostname"), "image_outside"),
        (record(0, "<image>", "b", image="x/../../a.png"), "image_outside"),
        (record(0, "<image>", "b", image="missing.png"), "image_missing"),
        (record(0, "a\0", "b"), "bad_characters"),
    ],
)
def test_a_sample_that_cannot_be_used(entry: Any, code: str, tmp_path: Path) -> None:
    """D6-D9: an error with file, place and id; or, when told to skip, one count under that code and the rest is read."""
    assert code_of(tmp_path, entry) == code
    source = read_llava(write(tmp_path, [record(1), entry, record(2)]), on_bad="skip")
    assert [sample.id for sample in source] == ["s1", "s2"]
    assert source.report.faults == Counter({code: 1})
    assert any(code in line and "[1]" in line for line in source.report.lines())


def test_all_missing_images_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_llava(write(tmp_path, [record(i, "<image>", "b", image=f"{i}.png") for i in range(3)]))
    assert all(f"{i}.png" in str(caught.value) for i in range(3))
    assert "3 samples" in str(caught.value)


@pytest.mark.parametrize(("name", "given", "there"), [("a.png", ".", "photos"), ("photos/a.png", "photos", ".")])
def test_where_the_pictures_were_meant_to_be_is_found(name: str, given: str, there: str, tmp_path: Path) -> None:
    """A folder too few in the names or in the option, and one too many."""
    (tmp_path / "photos").mkdir()
    Pillow.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    path = write(tmp_path, [record(0, "<image>", "b", image=name)])
    with pytest.raises(DataError) as caught:
        read_llava(path, image_root=tmp_path / given)
    assert f"set images={tmp_path / there}," in caught.value.remedy
    read_llava(path, image_root=tmp_path / there)
    [finding] = check(path, image_root=tmp_path / given).findings
    assert finding.remedy.endswith(f"it is under {tmp_path / there}")


def test_what_is_used_with_a_remark(tmp_path: Path, picture: str) -> None:
    entries = [
        {"conversations": turns("a", "b")},
        record(1) | {"id": 7},
        record(2) | {"id": "7"},
        record(3) | {"conversations": [{"from": "gpt", "value": "Hello."}, *turns("a", "b")]},
        record(4, "a", "the word <image> is text here"),
        record(5, "<image>\nWhat?", "A picture.", image=picture),
        record(6, "<image> or <image>?", "The same.", image=[picture, picture]),
    ]
    source = read_llava(write(tmp_path, entries))
    assert source.report.remarks == Counter({"id_missing": 1, "id_repeated": 1, "leading_reply": 1, "marker_in_reply": 1})
    assert [len(sample.conversation.images) for sample in source] == [0, 0, 0, 0, 0, 1, 2]
    assert source[0].id == "data.json:[0]"
    assert source[3].conversation.turns[0].text == "a"
    assert source[4].conversation.turns[1].text == "the word <image> is text here"


def test_the_folder_may_be_left_when_allowed(tmp_path: Path, picture: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    path = write(inner, [record(0, "<image>", "b", image=f"../{picture}"), record(1, "<image>", "b", image=str(tmp_path / picture))])
    assert len(read_llava(path, allow_outside=True)) == 2


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = read_llava(write(tmp_path, [record(1)])).fingerprint
    assert read_llava(write(tmp_path, [record(1)], "other.json")).fingerprint == first
    assert read_llava(write(tmp_path, [record(2)])).fingerprint != first


# ---- order


@settings(deadline=None)
@given(count=st.integers(1, 200), size=st.integers(1, 16), seed=st.integers(0, 2**32), epoch=st.integers(0, 5), group=st.integers(0, 4))
def test_an_epoch_holds_every_sample_once(count: int, size: int, seed: int, epoch: int, group: int) -> None:
    lengths = [(i % 3 == 0, (i * 37) % 11) for i in range(count)]
    windows = epoch_windows(count, size=size, seed=seed, epoch=epoch, lengths=lengths, group=group)
    assert sorted(index for window in windows for index in window) == list(range(count))
    assert sorted(map(len, windows))[1:] == [size] * (len(windows) - 1)
    assert windows == epoch_windows(count, size=size, seed=seed, epoch=epoch, lengths=lengths, group=group)


def test_the_order_is_the_same_in_every_year() -> None:
    """Stored once: a change of numpy or of this code that moves samples would break resuming across versions."""
    assert epoch_windows(8, size=3, seed=7, epoch=0) == ORDER_OF_SEED_7
    assert epoch_windows(8, size=3, seed=7, epoch=1) != ORDER_OF_SEED_7


ORDER_OF_SEED_7 = [[7, 4, 6], [1, 5, 0], [2, 3]]


def test_grouping_pads_less() -> None:
    lengths = [(i % 2 == 0, (i * 7919) % 101) for i in range(512)]

    def waste(group: int) -> int:
        windows = epoch_windows(512, size=8, seed=0, epoch=0, lengths=lengths, group=group)
        return sum(max(lengths[i][1] for i in w) * len(w) - sum(lengths[i][1] for i in w) for w in windows)

    assert waste(8) < waste(0) / 2


# ---- windows


@pytest.fixture
def processor(tokenizer: Any) -> Processor:
    preprocess = Preprocess(size=28, aspect="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Processor(
        tokenizer=tokenizer, template=TEMPLATES["vicuna_v1"], preprocess=preprocess, tiling=Tiling(side=preprocess.size), max_length=512
    )


@pytest.fixture
def source(tmp_path: Path) -> Source:
    for i in range(4):
        Pillow.new("RGB", (20 + i, 12), (50 * i, 30, 30)).save(tmp_path / f"{i}.png")
    entries = [record(i, "<image>\nWhat?", f"Picture {i}.", image=f"{i}.png") if i < 4 else record(i) for i in range(11)]
    return read_llava(write(tmp_path, entries))


def take(loader: Loader, count: int) -> list[Window]:
    found = []
    for window in loader:
        found.append(window)
        if len(found) == count:
            break
    return found


def same(first: Window, second: Window) -> bool:
    tensors = ("input_ids", "labels", "mask", "positions", "views")
    return (first.step, first.epoch, first.ids) == (second.step, second.epoch, second.ids) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(first.batches, second.batches, strict=True) for name in tensors
    )


def test_windows_count_what_they_hold(source: Source, processor: Processor) -> None:
    windows = take(Loader(source, processor, batch_size=2, accumulation=2, seed=0), 3)
    assert [window.samples for window in windows] == [4, 4, 3]
    assert [len(window.batches) for window in windows] == [2, 2, 2]
    assert [round(window.epoch * 11) for window in windows] == [4, 8, 11]
    assert sorted(i for window in windows for ids in window.ids for i in ids) == sorted(sample.id for sample in source)
    for window in windows:
        assert window.tokens == sum(int(batch.mask.sum()) for batch in window.batches)
        assert window.learned == sum(map(learned_tokens, window.batches)) > 0
        assert window.silent == 0


@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 9])
def test_going_on_is_the_same_as_never_having_stopped(start: int, group: int, source: Source, processor: Processor) -> None:
    """Four windows an epoch: stopped before, inside, at the end of and after an epoch."""

    def loader() -> Loader:
        return Loader(source, processor, batch_size=3, seed=1, group=group, lengths=source.lengths())

    first = loader()
    if start:
        take(first, start)
    assert first.state() == {"window": start}
    second = loader()
    second.restore(first.state())
    whole = take(loader(), 12)
    assert all(same(a, b) for a, b in zip(take(second, 12 - start), whole[start:], strict=True))


def test_workers_and_cache_change_nothing(source: Source, processor: Processor) -> None:
    plain = take(Loader(source, processor, batch_size=2, seed=3), 8)
    cached = take(Loader(source, processor, batch_size=2, seed=3, cache_bytes=40_000), 8)
    before = torch.get_rng_state()
    worked = take(Loader(source, processor, batch_size=2, seed=3, workers=2), 8)
    assert torch.equal(before, torch.get_rng_state())
    for other in (cached, worked):
        assert all(same(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_during_the_run(workers: int, source: Source, processor: Processor, tmp_path: Path) -> None:
    """D2: the same replacement every time, said with the sample's id; or one typed error, also out of a worker."""
    (tmp_path / "2.png").write_bytes(b"no picture any more")
    runs = [take(Loader(source, processor, batch_size=11, seed=0, on_bad="skip", workers=workers), 1)[0] for _ in range(2)]
    assert same(*runs)
    assert Counter(runs[0].ids[0])["s3"] == 2
    assert len(runs[0].replaced) == 1
    assert "id s2" in runs[0].replaced[0]
    with pytest.raises(DataError) as caught:
        take(Loader(source, processor, batch_size=11, seed=0, workers=workers), 1)
    assert "id s2" in caught.value.where
    assert caught.value.code == "image_unreadable"


def test_a_long_sample_loses_its_end_and_a_picture_never(source: Source, processor: Processor, tmp_path: Path) -> None:
    """D7: counted, the first max_length tokens kept; where that would cut a picture the sample cannot be used."""
    whole = take(Loader(source, processor, batch_size=11, seed=0), 1)[0]
    lengths = whole.batches[0].mask.sum(1)
    processor.max_length = int(lengths.max()) - 1
    cut = take(Loader(source, processor, batch_size=11, seed=0), 1)[0]
    assert whole.cut == 0
    assert cut.cut == int((lengths == lengths.max()).sum())
    assert torch.equal(cut.batches[0].input_ids, whole.batches[0].input_ids[:, :-1])
    processor.max_length = 20
    with pytest.raises(DataError) as caught:
        take(Loader(source, processor, batch_size=11, seed=0), 1)
    assert caught.value.code == "context_length_exceeded"
