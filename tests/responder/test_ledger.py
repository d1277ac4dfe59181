"""Laws of the ledger: what is acknowledged is on disk, sums are exact, a torn end is dropped whole, one process at a time (G5-G7, G9)."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import completion, question

from llavakit.errors import DataError, RefusedError
from llavakit.responder import Completion, Ledger, Query, Usage, ledger
from llavakit.types import Conversation, Sampling


def put_all(book: Ledger, numbers: range, asked: str = "m") -> None:
    async def work() -> None:
        await asyncio.gather(*(book.put(question(n), asked, completion(f"reply {n}", prompt=n, reply=1)) for n in numbers))

    asyncio.run(work())


def test_what_was_put_is_found_by_its_key_and_by_no_other(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as book:
        put_all(book, range(20))
    with Ledger(tmp_path / "ledger.sqlite") as book:
        for number in range(20):
            found = book.get(question(number).key("m"))
            assert found == completion(f"reply {number}", prompt=number, reply=1)
            assert book.get(question(number).key("another model")) is None
            assert book.get(question(number, seed=1).key("m")) is None
            assert book.get(question(number, tokens=21).key("m")) is None
        assert {name for _, name, _ in book.replies()} == {f"q{number}" for number in range(20)}


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)


@given(
    text=texts,
    finish=st.sampled_from(["stop", "length", "filter", "cut"]),
    counts=st.none() | st.tuples(st.integers(0, 2**40), st.integers(0, 9)),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_reply_comes_back_as_it_was(tmp_path: Path, text: str, finish: Any, counts: tuple[int, int] | None) -> None:
    usage = Usage(prompt_tokens=counts[0], reply_tokens=counts[1]) if counts else None
    kept = Completion(text=text, finish=finish, model=text, usage=usage)
    query = Query(id=text, conversation=Conversation.ask(text or "?"), sampling=Sampling(seed=2**64 - 1))
    with Ledger(tmp_path / "one.sqlite") as book:
        asyncio.run(book.put(query, f"m{text}{finish}{counts}", kept))
        assert book.get(query.key(f"m{text}{finish}{counts}")) == kept


def test_the_spend_is_the_sum(tmp_path: Path) -> None:
    async def uncounted(book: Ledger) -> None:
        await book.put(question(100), "m", Completion(text="x", finish="stop", model="m"))

    with Ledger(tmp_path / "ledger.sqlite") as book:
        put_all(book, range(10))
        put_all(book, range(10, 12))
        put_all(book, range(5), asked="other")
        asyncio.run(uncounted(book))
        spent = book.spent("m")
        assert (spent.replies, spent.prompt_tokens, spent.reply_tokens, spent.uncounted) == (13, sum(range(12)), 12, 1)
        assert spent.tokens == sum(range(12)) + 12
        assert book.spent("other").replies == 5
        assert book.spent("nobody").replies == 0


def test_a_failure_is_forgotten_when_a_reply_comes(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as book:
        asyncio.run(book.fail(question(1), "m", RefusedError("not this", code="refused")))
        asyncio.run(book.fail(question(2), "m", RefusedError("nor this", code="refused")))
        put_all(book, range(1, 2))
        assert [(failure.id, failure.code) for failure in book.failures()] == [("q2", "refused")]


def test_thousands_are_written_with_few_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transactions: list[int] = []
    store = Ledger._store

    def counted(self: Ledger, entries: list[Any]) -> Any:
        transactions.append(len(entries))
        return store(self, entries)

    monkeypatch.setattr(Ledger, "_store", counted)
    with Ledger(tmp_path / "ledger.sqlite") as book:
        put_all(book, range(3000))
    assert sum(transactions) == 3000
    assert len(transactions) < 300


def test_nothing_is_acknowledged_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """A copy of the files made the moment ``put`` returns, as a crash would leave them, holds the reply."""

    async def work(book: Ledger) -> None:
        for number in range(5):
            await book.put(question(number), "m", completion())
            folder = tmp_path / f"copy{number}"
            folder.mkdir()
            for file in tmp_path.glob("ledger.sqlite*"):
                shutil.copy(file, folder)
            with Ledger(folder / "ledger.sqlite") as copy:
                assert all(copy.get(question(n).key("m")) for n in range(number + 1))

    with Ledger(tmp_path / "ledger.sqlite") as book:
        asyncio.run(work(book))


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger's files as a crash leaves them: 30 transactions in the log, nothing in the file yet."""
    folder = tmp_path_factory.mktemp("torn")
    with Ledger(folder / "live.sqlite") as book:
        for number in range(30):
            put_all(book, range(number, number + 1))
        for file in folder.glob("live.sqlite*"):
            shutil.copy(file, folder / file.name.replace("live", "ledger"))
    return folder


@given(share=st.floats(0, 1))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_torn_end_is_dropped_whole(torn: Path, tmp_path: Path, share: float) -> None:
    """Wherever the log is cut, the ledger opens, holds the first so many replies, and its sums are theirs."""
    for file in torn.glob("ledger.sqlite*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "ledger.sqlite-shm").unlink(missing_ok=True)
    log = tmp_path / "ledger.sqlite-wal"
    with log.open("r+b") as file:
        file.truncate(int(log.stat().st_size * share))
    try:
        with Ledger(tmp_path / "ledger.sqlite") as book:
            names = [name for _, name, _ in book.replies()]
            assert names == [f"q{number}" for number in range(len(names))]
            assert book.spent("m").replies == len(names)
            assert book.spent("m").prompt_tokens == sum(range(len(names)))
            put_all(book, range(40, 41))
            assert len(list(book.replies())) == len(names) + 1
    finally:
        for file in tmp_path.glob("ledger.sqlite*"):  # type: ignore[assignment]
            Path(str(file)).unlink()


SECOND = """
import sys
from pathlib import Path
from llavakit.responder import Ledger
from llavakit.errors import DataError
try:
    Ledger(Path(sys.argv[1]))
except DataError as error:
    sys.exit(f"{error.code} {error}")
"""


def test_a_second_process_is_sent_away(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as book:
        done = subprocess.run([sys.executable, "-c", SECOND, str(book.path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("ledger_in_use")
        assert "process" in done.stderr
        put_all(book, range(1))
    with pytest.raises(DataError), Ledger(tmp_path / "ledger.sqlite"):  # and a second one in this process
        Ledger(tmp_path / "ledger.sqlite")
    Ledger(tmp_path / "ledger.sqlite").close()  # free again, though the file of the lock is there


def test_without_locks_a_marker_keeps_others_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(ledger._Hold, "_lock", no_locks)
    path = tmp_path / "ledger.sqlite"
    with Ledger(path), pytest.raises(DataError, match="delete") as caught:
        Ledger(path)
    assert caught.value.code == "ledger_in_use"
    Ledger(path).close()
    assert not list(tmp_path.glob("*.in-use"))


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    text, other, later = tmp_path / "text", tmp_path / "other.sqlite", tmp_path / "later.sqlite"
    text.write_text("no database at all, but some text that is long enough to be looked at")
    base = sqlite3.connect(other)
    base.execute("CREATE TABLE mine (x)")
    base.close()
    Ledger(later).close()
    base = sqlite3.connect(later)
    base.execute("PRAGMA user_version = 2")
    base.close()
    for path in (text, other, later):
        before = path.read_bytes()
        with pytest.raises(DataError) as caught:
            Ledger(path)
        assert caught.value.code == "not_a_ledger"
        assert path.read_bytes() == before or path == other
    with pytest.raises(DataError) as caught:
        Ledger(tmp_path / "no" / "such" / "folder")
    assert caught.value.code == "ledger_unwritable"


@pytest.mark.parametrize("bad", [completion("half a character: \ud83d"), completion(prompt=2**70)])
def test_what_cannot_be_written_is_said_and_nobody_waits_for_ever(tmp_path: Path, bad: Completion) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as book:
        with pytest.raises(DataError):
            asyncio.run(asyncio.wait_for(book.put(question(1), "m", bad), 20))
        put_all(book, range(2))
        assert book.spent("m").replies == 2


def test_a_disk_that_is_full_is_said(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as book:
        put_all(book, range(3))
        book._writes.execute("PRAGMA max_page_count = 1")
        with pytest.raises(DataError, match="room") as caught:
            asyncio.run(book.put(question(7), "m", completion("x" * 100_000)))
        assert caught.value.code == "ledger_unwritable"
        assert len(list(book.replies())) == 3
