"""Laws of the index: it holds what the file holds, is true or made anew, is put in place whole, is shared by processes."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavakit.data import index, present
from llavakit.data.sources import Source, read_llava
from llavakit.errors import DataError


def record(number: int, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat?" if "image" in fields else "What?"}, {"from": "gpt", "value": f"Number {number}."}]
    return {"id": f"s{number}", "conversations": turns} | fields


def write(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records))
    return path


def index_of(path: Path) -> Path:
    return path.with_name(path.name + ".llavakit-index")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache is a folder of the test's."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file counts as a large one, which is indexed on disk."""
    monkeypatch.setattr(index, "SMALL", -1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "data.json", [record(i) for i in range(6)])


def test_a_small_file_leaves_nothing_behind(path: Path, elsewhere: Path) -> None:
    read_llava(path)
    assert os.listdir(path.parent) == ["data.json"]
    assert not os.listdir(elsewhere)


def test_in_memory_and_on_disk_are_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, [record(0), "no record", record(2, image="data:image/png;base64,AAAA"), record(0), record(4, model="x")])
    small = read_llava(path, on_bad="skip")
    monkeypatch.setattr(index, "SMALL", -1)
    made, opened = read_llava(path, on_bad="skip"), read_llava(path, on_bad="skip")
    for source in (made, opened):
        assert list(source) == list(small)
        assert list(source.lengths()) == list(small.lengths())
        assert source.report == small.report
        assert source.fingerprint == small.fingerprint
    assert small[1].conversation.images[0].source == b"\0\0\0"


@pytest.mark.usefixtures("large")
def test_it_is_made_once(path: Path) -> None:
    read_llava(path)
    before = index_of(path).stat()
    read_llava(path)
    read_llava(path, on_bad="skip", image_root=path.parent / "other")
    after = index_of(path).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert sorted(os.listdir(path.parent)) == ["data.json", "data.json.llavakit-index"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("change", ["size", "time", "outside", "version", "cut", "noise"])
def test_it_is_made_anew_when_it_would_not_be_true(change: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_llava(path)
    before, place = index_of(path).stat().st_ino, index_of(path)
    if change == "size":
        write(path, [record(i) for i in range(3)])
    elif change == "time":
        time = path.stat().st_mtime_ns
        path.write_text(path.read_text().replace("Number 2", "Number 7"))
        os.utime(path, ns=(time, time + 1))
    elif change == "version":
        monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    elif change in ("cut", "noise"):
        content = place.read_bytes()[:-5] if change == "cut" else b"\0" * 64
        place.rename(place.with_name("old"))
        place.write_bytes(content)
    again = read_llava(path, allow_outside=change == "outside")
    assert index_of(path).stat().st_ino != before
    assert [sample.id for sample in first] == [f"s{i}" for i in range(6)], "who has the old one open keeps it"
    assert len(again) == (3 if change == "size" else 6)
    assert again[2].conversation.turns[1].text == ("Number 7." if change == "time" else "Number 2.")


@pytest.mark.usefixtures("large")
def test_faults_are_remembered(path: Path) -> None:
    """An index made by one who skips stops one who does not, and the other way round."""
    write(path, [record(0), {"id": "x"}, record(2), 7])
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            read_llava(path)
        assert (caught.value.code, caught.value.where) == ("no_turns", "data.json:[1] (id x)")
        assert "1 more" in caught.value.remedy
        source = read_llava(path, on_bad="skip")
        assert source.report.faults == Counter({"no_turns": 1, "bad_record": 1})
        assert [sample.where for sample in source] == ["data.json:[0]", "data.json:[2]"]


@pytest.mark.usefixtures("large")
def test_it_goes_to_the_cache_where_the_folder_cannot_be_written(path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_of(path).mkdir()  # nothing can be put there, whoever asks
    source = read_llava(path)
    (made,) = (elsewhere / "llavakit").iterdir()
    assert made.name.endswith("-data.json.llavakit-index")
    before = made.stat().st_ino
    assert list(read_llava(path)) == list(source)
    assert made.stat().st_ino == before
    (elsewhere / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "file"))
    with pytest.raises(DataError) as caught:
        read_llava(path)
    assert caught.value.code == "cannot_write"
    assert sorted(os.listdir(path.parent)) == ["data.json", "data.json.llavakit-index"]


@pytest.mark.usefixtures("large")
def test_what_fails_leaves_no_draft_and_what_was_killed_is_removed(path: Path) -> None:
    """But not what another process, perhaps on another machine, may still be writing."""
    path.write_text('[{"id": 1,}]')
    with pytest.raises(DataError):
        read_llava(path)
    assert os.listdir(path.parent) == ["data.json"]
    dead, alive = (path.parent / f".data.json.llavakit-index.{name}.tmp" for name in ("dead", "alive"))
    for draft in (dead, alive, path.parent / ".data.json.llavakit-index.lock"):
        draft.write_bytes(b"half of another one" * 1000)
    os.utime(dead, (1, 1))
    write(path, [record(0)])
    assert len(read_llava(path)) == 1
    assert sorted(os.listdir(path.parent)) == [alive.name, "data.json", "data.json.llavakit-index"]


@pytest.mark.usefixtures("large")
def test_a_file_that_changes_while_it_is_read(path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_llava(path, progress=lambda *_: write(path, [record(0)]) and None)
    assert caught.value.code == "file_changed"


def _open(path: Path, made: Any, locks: str, together: Any) -> None:
    index.SMALL = -1
    if locks == "none":
        fcntl.flock = _no_locks
    elif locks == "false":  # granted to all: as between machines where locks hold on one only
        fcntl.flock = lambda file, kind: None
    together.wait()
    made.put([sample.id for sample in read_llava(path)])


def _no_locks(file: Any, kind: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.parametrize("locks", ["true", "false", "none"])
def test_many_processes_may_open_it_at_once(path: Path, locks: str) -> None:
    """With locks the work is done once; where they fail, or hold on one machine only, each process has a draft of its own."""
    write(path, [record(i) for i in range(3000)])
    context = multiprocessing.get_context("fork")
    made, together = context.Queue(), context.Barrier(6)
    processes = [context.Process(target=_open, args=(path, made, locks, together)) for _ in range(6)]
    for process in processes:
        process.start()
    assert all(made.get(timeout=60) == [f"s{i}" for i in range(3000)] for _ in processes)
    for process in processes:
        process.join()
    assert sorted(os.listdir(path.parent)) == ["data.json", "data.json.llavakit-index"]


def test_a_source_travels_as_a_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, [record(i) for i in range(2000)])
    in_memory = read_llava(path)
    monkeypatch.setattr(index, "SMALL", -1)
    source = read_llava(path)
    for part in (source, source[10:1000:7], source[::-1], source.take([5, 3, 5]), in_memory[5:9]):
        again: Source = pickle.loads(pickle.dumps(part))
        assert list(again) == list(part)
        assert list(again.lengths()) == list(part.lengths())
        assert again.fingerprint == part.fingerprint
    assert len(pickle.dumps(source)) < 2000


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_a_view_is_what_a_list_would_be(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    count = data.draw(st.integers(1, 9))
    whole = read_llava(write(tmp_path_factory.mktemp("view") / "data.json", [record(i) for i in range(count)]))
    part, plain = whole, list(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            chosen = data.draw(st.slices(len(plain)))
            part, plain = part[chosen], plain[chosen]
        elif plain:
            picks = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=5))
            part, plain = part.take(picks), [plain[i] for i in picks]
    assert list(part) == plain
    assert list(part.lengths()) == [whole.lengths()[whole_number(sample.id)] for sample in plain]
    assert all(part[-i] == plain[-i] for i in range(1, len(plain) + 1))


def whole_number(sample_id: str) -> int:
    return int(sample_id[1:])


@pytest.mark.usefixtures("large")
def test_pictures_are_looked_for_at_every_opening(tmp_path: Path) -> None:
    """Whether a picture is there is a fact about the disk, not the file: the index is not made anew for it."""
    for i in range(4):
        (tmp_path / f"{i}.png").touch()
    path = write(tmp_path / "data.json", [record(i, image=[f"{i}.png"]) for i in range(4)])
    assert len(read_llava(path)) == 4
    (tmp_path / "2.png").unlink()
    source = read_llava(path, on_bad="skip")
    assert [sample.id for sample in source] == ["s0", "s1", "s3"]
    assert source.report.faults == Counter({"image_missing": 1})
    assert any("data.json:[2] (id s2): no image file 2.png" in line for line in source.report.lines())
    with pytest.raises(DataError, match=r"1 samples name images .*data\.json:\[2\] 2\.png"):
        read_llava(path)
    (tmp_path / "2.png").touch()
    assert read_llava(path).report.faults == Counter()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), few=st.integers(0, 3))
def test_a_listing_says_what_asking_for_each_would(data: st.DataObject, few: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("present")
    names = [
        f"{folder}{name}" for folder in ("", "a/", "a/b/", "c/", "./", "a/../", "link/") for name in ("1", "2", "3", "dir", "bro\nken")
    ]
    for folder in ("a/b", "c", "dir", "a/dir"):
        (root / folder).mkdir(parents=True)
    for name in data.draw(st.sets(st.sampled_from(names))):
        if not name.startswith("link/") and not (root / name).is_dir():
            (root / name).touch()
    (root / "link").symlink_to(data.draw(st.sampled_from(["a", "nowhere"])))
    asked = data.draw(st.lists(st.sampled_from([*names, "none/1", "a\0", "x" * 300, "\udcff", str(root / "1")])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(present, "FEW", few)
        assert present.missing(asked, root) == {name for name in asked if not os.path.isfile(os.path.join(root, name))}
