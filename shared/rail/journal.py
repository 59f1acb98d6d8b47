"""The journal of one instance: where changes wait on local disk while the broker cannot take them.

SQLite in WAL mode with `synchronous=FULL`: what `append` has returned for survives kill -9 and power loss. Appends that
wait at the same moment share one commit. One process owns the file; a second one is refused. All access is by a single
thread of its own, so that no flush blocks the event loop.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from shared.entities.contract import Lane

_SCHEMA = """
create table if not exists entries (seq integer primary key autoincrement, lane text not null, event blob not null);
create table if not exists numbers (restaurant text, day text, last integer not null, primary key (restaurant, day));
"""
# Numbers are reserved in blocks: one flush for many. Those of a block that a crash leaves unused are never given.
_BLOCK = 20

T = TypeVar("T")


class JournalBroken(Exception):
    """The disk or the file will not take the change; nothing of it was kept."""


class JournalFull(JournalBroken):
    """The journal has reached its bound."""


class JournalEntry(Struct, frozen=True):
    seq: int
    lane: Lane
    event: bytes


class Journal:
    def __init__(self, path: Path, *, instance: int, max_bytes: int) -> None:
        self._path = path
        self._instance = instance
        self._max_bytes = max_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._db: sqlite3.Connection | None = None
        self._waiting: list[tuple[Sequence[tuple[Lane, bytes]], asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._numbers: dict[tuple[str, str], tuple[int, int]] = {}
        self._numbering = asyncio.Lock()
        self.depth = 0
        self.bytes = 0

    @property
    def opened(self) -> bool:
        return self._db is not None

    async def open(self) -> None:
        """Raises JournalBroken, also when another process has it."""
        await self._run(self._open)

    async def close(self) -> None:
        """May be called twice, and without an open."""
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        if self._db is not None:
            await self._run(self._close)

    async def append(self, entries: Sequence[tuple[Lane, bytes]]) -> None:
        """Durable when it returns. Raises JournalBroken or JournalFull: then none of the entries was kept."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush(), name="journal-flush")
        await done

    async def oldest(self, count: int, lane: Lane | None = None) -> list[JournalEntry]:
        """Of one lane, or of all."""
        return await self._run(lambda: self._oldest(count, lane))

    async def remove(self, entries: Sequence[JournalEntry]) -> None:
        """Of entries that are recorded elsewhere now."""
        await self._run(lambda: self._remove(entries))

    async def next_number(self, restaurant: str, day: str) -> str:
        """`J1-0007`: the series of this instance, so that no number is given twice whoever counts."""
        async with self._numbering:
            last, reserved = self._numbers.get((restaurant, day), (0, 0))
            if last == reserved:
                reserved = await self._run(lambda: self._reserve(restaurant, day))
                last = reserved - _BLOCK
                if len(self._numbers) > 10_000:  # business days gone by
                    self._numbers.clear()
            self._numbers[restaurant, day] = (last + 1, reserved)
        return f"J{self._instance}-{last + 1:04d}"

    # -- in the event loop -------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            try:
                await self._run(partial(self._append, [entry for entries, _ in waiting for entry in entries]))
            except JournalBroken as error:
                for _, done in waiting:
                    if not done.done():
                        done.set_exception(error)
                continue
            for _, done in waiting:
                if not done.done():
                    done.set_result(None)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise JournalBroken(f"journal {self._path}: {error}") from error

    # -- in the journal's thread -------------------------------------------------------------------------------

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=1.0)
        # Exclusive before WAL: the lock is taken at the first write and held until the process ends.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL"):
            db.execute(f"pragma {pragma}")
        db.execute("begin immediate")
        for statement in _SCHEMA.strip().split(";"):
            db.execute(statement)
        db.execute("commit")
        self._db = db
        self.depth, self.bytes = db.execute("select count(*), coalesce(sum(length(event)), 0) from entries").fetchone()

    def _close(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _opened(self) -> sqlite3.Connection:
        if self._db is None:
            raise JournalBroken(f"journal {self._path} is not open")
        return self._db

    def _append(self, entries: Sequence[tuple[Lane, bytes]]) -> None:
        db = self._opened()
        size = sum(len(event) for _, event in entries)
        if self.bytes + size > self._max_bytes:
            raise JournalFull(f"journal {self._path} holds {self.bytes} bytes, its bound is {self._max_bytes}")
        with _transaction(db):
            db.executemany("insert into entries (lane, event) values (?, ?)", entries)
        self.depth += len(entries)
        self.bytes += size

    def _oldest(self, count: int, lane: Lane | None) -> list[JournalEntry]:
        rows = self._opened().execute(
            "select seq, lane, event from entries where lane = coalesce(?, lane) order by seq limit ?", (lane, count)
        )
        return [JournalEntry(seq, Lane(of), event) for seq, of, event in rows]

    def _remove(self, entries: Sequence[JournalEntry]) -> None:
        with _transaction(self._opened()) as db:
            db.executemany("delete from entries where seq = ?", [(entry.seq,) for entry in entries])
        self.depth -= len(entries)
        self.bytes -= sum(len(entry.event) for entry in entries)

    def _reserve(self, restaurant: str, day: str) -> int:
        row = (
            self._opened()
            .execute(
                "insert into numbers values (?, ?, ?) on conflict do update set last = last + ? returning last",
                (restaurant, day, _BLOCK, _BLOCK),
            )
            .fetchone()
        )
        return int(row[0])


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing, and on an error none is left open: the next one could not begin."""
    db.execute("begin immediate")
    try:
        yield db
        db.execute("commit")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("rollback")
        raise
