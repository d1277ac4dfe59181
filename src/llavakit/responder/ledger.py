"""What was paid for, on disk before anybody acts on it: one sqlite file a job, one process at a time.

    put --> queue --> writer's thread: all that waits in one transaction, one fsync --> every one of them is told

Replies stand under their query's key, so a question once paid for costs nothing again, and a changed prompt, picture, model or seed finds
nothing. What was spent is added up in the same transaction. ``kill -9`` at any point loses nothing that was acknowledged: sqlite reads
a torn end of its log as if it had not been written.
"""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, cast

from llavakit.errors import DataError, LlavaError
from llavakit.responder.protocol import Completion, Finish, Query, Usage

_MARK = 0x6C6C6176  # "llav": this file is a ledger
_VERSION = 1
_MOST = 4096  # entries in one transaction
_TABLES = """
CREATE TABLE replies (key TEXT NOT NULL UNIQUE, id TEXT NOT NULL, asked TEXT NOT NULL, model TEXT NOT NULL, seed TEXT, finish TEXT NOT NULL,
                      prompt_tokens INTEGER, reply_tokens INTEGER, at REAL NOT NULL, text TEXT NOT NULL);
CREATE TABLE failures (key TEXT PRIMARY KEY, id TEXT NOT NULL, asked TEXT NOT NULL, code TEXT NOT NULL, what TEXT NOT NULL,
                       at REAL NOT NULL);
CREATE TABLE spent (asked TEXT PRIMARY KEY, replies INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL,
                    uncounted INTEGER NOT NULL);
"""
_REPLY = "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO NOTHING"
_FORGIVEN = "DELETE FROM failures WHERE key = ?"
_FAILURE = "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?)"
_SPENT = """INSERT INTO spent VALUES (?, ?, ?, ?, ?) ON CONFLICT (asked) DO UPDATE SET replies = replies + excluded.replies,
            prompt_tokens = prompt_tokens + excluded.prompt_tokens, reply_tokens = reply_tokens + excluded.reply_tokens,
            uncounted = uncounted + excluded.uncounted"""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """All replies of one model in a ledger, and their tokens. ``uncounted`` replies came without a count."""

    replies: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    uncounted: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.reply_tokens


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A question without a reply: which error came last. It is forgotten when a reply comes."""

    key: str
    id: str
    code: str
    what: str


class Ledger:
    """The ledger at ``path``, made if it is not there. A context manager; or call ``close``.

    Raises DataError where another process has it open (``ledger_in_use``), where the file is something else (``not_a_ledger``) and where
    writing fails (``ledger_unwritable``).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held = _Hold(path)
        try:
            self._writes, self._reads = _opened(path), _opened(path)
        except BaseException:
            self._held.release()
            raise
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    def get(self, key: str) -> Completion | None:
        """The reply to a question asked before."""
        query = "SELECT text, finish, model, prompt_tokens, reply_tokens FROM replies WHERE key = ?"
        row = self._reads.execute(query, (key,)).fetchone()
        return _completion(*row) if row else None

    async def put(self, query: Query, asked: str, completion: Completion, *, key: str | None = None) -> None:
        """Keep a reply of the model ``asked``. When this returns, it is on the disk."""
        usage, seed = completion.usage, query.sampling.seed
        counts = (usage.prompt_tokens, usage.reply_tokens) if usage else (None, None)
        row = (
            key or query.key(asked), query.id, asked, completion.model, None if seed is None else str(seed), completion.finish,
            *counts, time.time(), completion.text,
        )  # fmt: skip
        await self._commit(_Entry(_REPLY, row, asyncio.get_running_loop().create_future()))

    async def fail(self, query: Query, asked: str, error: LlavaError, *, key: str | None = None) -> None:
        """Keep why a question has no reply."""
        row = (key or query.key(asked), query.id, asked, error.code, str(error), time.time())
        await self._commit(_Entry(_FAILURE, row, asyncio.get_running_loop().create_future()))

    def spent(self, asked: str) -> Spent:
        """All that was spent on a model, exactly."""
        row = self._reads.execute("SELECT replies, prompt_tokens, reply_tokens, uncounted FROM spent WHERE asked = ?", (asked,)).fetchone()
        return Spent(**dict(zip(("replies", "prompt_tokens", "reply_tokens", "uncounted"), row, strict=True))) if row else Spent()

    def replies(self) -> Iterator[tuple[str, str, Completion]]:
        """Key, id and reply of all, in the order in which they came."""
        rows = self._reads.execute("SELECT key, id, text, finish, model, prompt_tokens, reply_tokens FROM replies ORDER BY rowid")
        for key, name, *rest in rows:
            yield key, name, _completion(*rest)

    def failures(self) -> Iterator[Failure]:
        """Every question that has no reply yet, and why."""
        for key, name, code, what in self._reads.execute("SELECT key, id, code, what FROM failures ORDER BY at"):
            yield Failure(key=key, id=name, code=code, what=what)

    def close(self) -> None:
        """Write what waits, let go of the file."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            self._reads.close()
            self._writes.close()  # the last one to close puts the log into the file
            self._held.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _commit(self, entry: _Entry) -> None:
        self._queue.put(entry)
        await asyncio.shield(entry.done)  # whoever waits may be cancelled; what is paid for is written all the same

    def _write(self) -> None:
        """The writer's thread: whatever waits goes into one transaction."""
        ending = False
        while not ending:
            taken = [self._queue.get()]
            with suppress(queue.Empty):
                while len(taken) < _MOST:
                    taken.append(self._queue.get_nowait())
            ending = None in taken
            entries = [entry for entry in taken if entry]
            _tell(entries, self._store(entries) if entries else None)

    def _store(self, entries: list[_Entry]) -> DataError | None:
        """One transaction, or why not."""
        replies = [entry.row for entry in entries if entry.sql is _REPLY]
        try:
            self._writes.execute("BEGIN IMMEDIATE")
            for entry in entries:  # in order: a failure and the reply after it are about one key
                self._writes.execute(entry.sql, entry.row)
                if entry.sql is _REPLY:
                    self._writes.execute(_FORGIVEN, entry.row[:1])
            self._writes.executemany(_SPENT, _sums(replies))
            self._writes.execute("COMMIT")
        except Exception as error:  # whatever it is, those who wait must be told
            with suppress(sqlite3.Error):
                self._writes.execute("ROLLBACK")
            remedy = "make room on the disk and run again: all replies but the last few are kept"
            return DataError(f"the ledger cannot be written ({error})", code="ledger_unwritable", where=str(self.path), remedy=remedy)
        return None


class _Entry(NamedTuple):
    sql: str
    row: tuple[Any, ...]
    done: asyncio.Future[None]


def _tell(entries: list[_Entry], error: DataError | None) -> None:
    """Wake those who wait, each loop once."""
    loops: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = defaultdict(list)
    for entry in entries:
        loops[entry.done.get_loop()].append(entry.done)
    for loop, futures in loops.items():
        with suppress(RuntimeError):  # a loop that was closed meanwhile
            loop.call_soon_threadsafe(_wake, futures, error)


def _wake(futures: list[asyncio.Future[None]], error: DataError | None) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error) if error else future.set_result(None)


def _sums(replies: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows of replies -> what they add to what was spent, model by model."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in replies:
        asked, prompt, reply = row[2], row[6], row[7]
        sums[asked] = [a + b for a, b in zip(sums[asked], (1, prompt or 0, reply or 0, prompt is None), strict=True)]
    return [(asked, *sum_) for asked, sum_ in sums.items()]


def _completion(text: str, finish: str, model: str, prompt_tokens: int | None, reply_tokens: int | None) -> Completion:
    usage = None if prompt_tokens is None else Usage(prompt_tokens=prompt_tokens, reply_tokens=reply_tokens or 0)
    return Completion(text=text, finish=cast(Finish, finish), model=model, usage=usage)


def _opened(path: Path) -> sqlite3.Connection:
    """A connection with the tables in place; every transaction reaches the disk (synchronous FULL)."""
    try:
        connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
    except sqlite3.Error as error:
        remedy = "give a file in a folder that exists and may be written"
        raise DataError(f"the ledger cannot be opened ({error})", code="ledger_unwritable", where=str(path), remedy=remedy) from None
    try:
        connection.execute("PRAGMA journal_mode = WAL")  # where the file system cannot, sqlite keeps its older journal: slower, as safe
        connection.execute("PRAGMA synchronous = FULL")
        mark, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        empty = not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if empty and not mark:
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA application_id = {_MARK}; PRAGMA user_version = {_VERSION}; COMMIT;")
        elif (mark, version) != (_MARK, _VERSION):
            raise sqlite3.DatabaseError(f"another program's file, or version {version}")
    except sqlite3.Error as error:
        connection.close()
        raise DataError(f"this is not a ledger ({error})", code="not_a_ledger", where=str(path), remedy="give another name") from None
    return connection


class _Hold:
    """The right to write a ledger, for one process: a lock that its end lets go, however it ends.

    Where the file system has no such locks, a file that is there or not takes its place; after a crash a person must delete it.
    """

    def __init__(self, path: Path) -> None:
        self._place = path.with_name(path.name + ".lock")
        self._marker: Path | None = None
        try:
            self._file = os.open(self._place, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            remedy = "give a file in a folder that exists and may be written"
            what = f"the ledger cannot be opened ({error.strerror})"
            raise DataError(what, code="ledger_unwritable", where=str(path), remedy=remedy) from None
        try:
            taken = self._lock()
        except OSError:
            self._marker = path.with_name(path.name + ".in-use")
            taken = self._mark()
        if not taken:
            owner = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            remedy = f"wait for it to end, or give another file{f'; if it is gone, delete {self._marker}' if self._marker else ''}"
            raise DataError(f"{owner} writes this ledger", code="ledger_in_use", where=str(path), remedy=remedy)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        if self._marker:
            self._marker.unlink(missing_ok=True)
        os.close(self._file)

    def _lock(self) -> bool:
        """True if the lock is ours, False if it is another's. Raises OSError where there are no locks."""
        try:
            import fcntl
        except ImportError as error:
            raise OSError("no flock") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _mark(self) -> bool:
        assert self._marker
        try:
            os.close(os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            return False
        return True
