"""The journal of one instance: it keeps changes on local disk while the broker cannot take them.

The file is an SQLite database in WAL mode with `synchronous=FULL`: after `append` returns, its entries survive kill -9
and power loss. Appends that wait at the same moment share one commit. All access happens in one thread of the journal,
so that no flush blocks the event loop. One process owns the file through the lease of its number (instance.py). Other
processes may read the file (journal_file.py).

A refused change is not kept. A full journal refuses a change before it writes anything. It is full if it has reached
its bound, or if its disk would have too little space left for draining it. A failed append is removed from the
write-ahead log before the next append. If that also fails, `append` raises JournalInDoubt.

A damaged file is set aside, and every intact entry moves to a new file (set_aside.py). This happens when the journal
opens, or later when SQLite reports the damage. If a file cannot be opened, the next use tries again, at most once per
`_REOPEN_INTERVAL_SECONDS`.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
from msgspec import Struct

from shared.entities.contract import Lane
from shared.errors import described
from shared.rail.instance import Lease, NumberTaken
from shared.rail.journal_file import (
    broken,
    connect,
    create,
    is_damage,
    problem_of,
    put,
    put_damaged,
    sum_of,
    sum_of_number,
    upgrade,
    whole,
)
from shared.rail.journal_salvage import Salvage, wal_of, wal_problem
from shared.rail.set_aside import files_aside, finish_set_aside, set_aside

log = structlog.get_logger(__name__)

# Order numbers are reserved in blocks, so that many numbers need one flush. After a crash the unused numbers of a block
# are never given.
NUMBER_BLOCK_SIZE = 20
_REOPEN_INTERVAL_SECONDS = 1.0

T = TypeVar("T")


class JournalBroken(Exception):
    """The disk or the file cannot take the change, and nothing of it is kept."""


class JournalFull(JournalBroken):
    """The journal has reached its bound, or the disk has no room left."""


class JournalInDoubt(JournalBroken):
    """The disk failed, and the change may or may not be kept."""


class JournalEntry(Struct, frozen=True):
    seq: int
    lane: Lane
    event: bytes


class Journal:
    def __init__(
        self,
        path: Path,
        *,
        instance: int,
        max_bytes: int,
        reserve_bytes: int = 0,
        lease: Lease | None = None,
        executor: Executor | None = None,
        connect: Callable[[Path], sqlite3.Connection] = connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_bytes`: the maximum size of all events together. `reserve_bytes`: the space that an append must leave
        free on the disk. `lease`: the lease of this file, if the caller holds it. Otherwise the journal takes the lease
        while it is open. `executor`: runs all access, one call at a time; by default a thread of this journal.
        `connect`: opens the file. `clock`: returns seconds and never goes back."""
        self._path = path
        self._instance = instance
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lease = lease
        self._connection_to = connect
        self._clock = clock
        self._own_lease: Lease | None = None
        self._executor = executor or ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._db: sqlite3.Connection | None = None
        self._requested = False
        """True from `open` to `close`, even while the file cannot be opened."""
        self._tried_at = float("-inf")
        self._untidy = False
        """True while the write-ahead log may hold a failed append."""
        self._waiting: list[tuple[Sequence[tuple[Lane, bytes]], asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._generation = 0
        self._next = 1
        self.depth = 0
        self.bytes = 0
        self.damaged = 0
        """The number of damaged entries, which are reported and never sent."""
        self.set_aside = 0
        """The number of set-aside files of this journal."""

    @property
    def opened(self) -> bool:
        return self._db is not None

    async def open(self) -> None:
        """Opens the file. Raises JournalBroken if it is damaged or if another process holds the journal. After an
        error, the next use tries again."""
        self._requested = True
        await self._run(self._open)

    async def close(self) -> None:
        """Closes the file. May be called twice, also on a journal that was never opened."""
        self._requested = False
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        if self._db is not None or self._own_lease is not None:
            await self._run(self._close)

    async def append(self, entries: Sequence[tuple[Lane, bytes]]) -> None:
        """Stores the entries, which are durable when this returns. Raises JournalBroken or JournalFull if none of them
        is kept, and JournalInDoubt if they may be kept."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush(), name="journal-flush")
        await done

    async def oldest(self, count: int, lane: Lane | None = None, max_bytes: int | None = None) -> list[JournalEntry]:
        """Returns up to `count` entries, oldest first, of one lane or of all lanes. `max_bytes`: their maximum size
        together; a larger entry is returned alone. Moves damaged entries to the table `damaged` instead of returning
        them. Raises JournalBroken."""
        return await self._run(partial(self._do, lambda: self._oldest(count, lane, max_bytes)))

    async def remove(self, entries: Sequence[JournalEntry]) -> None:
        """Removes entries that the broker has confirmed. Raises JournalBroken."""
        await self._run(partial(self._do, lambda: self._remove(entries)))

    async def reserve_numbers(self, restaurant: str, day: str) -> tuple[str, int]:
        """Reserves the next `NUMBER_BLOCK_SIZE` numbers of this instance's series for a business day. Returns (series,
        highest number of the block). Raises JournalBroken."""
        return await self._run(partial(self._do, lambda: self._reserve(restaurant, day)))

    # -- in the event loop -------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            try:
                entries = [entry for entries, _ in waiting for entry in entries]
                await self._run(partial(self._do, partial(self._append, entries)))
            except Exception as error:  # noqa: BLE001  (every waiting caller gets the error, whatever it is)
                broken = error if isinstance(error, JournalBroken) else JournalInDoubt(described(error))
                for _, done in waiting:
                    if not done.done():
                        done.set_exception(broken)
                continue
            for _, done in waiting:
                if not done.done():
                    done.set_result(None)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except (sqlite3.Error, OSError) as error:
            raise JournalBroken(f"journal {self._path}: {error}") from error

    # -- in the journal's thread -------------------------------------------------------------------------------

    def _do(self, work: Callable[[], T]) -> T:
        """Does the work with the journal open. If SQLite reports damage, sets the file aside and does the work once
        more."""
        if self._db is None:
            if not self._requested:
                raise JournalBroken(f"journal {self._path} is not open")
            if self._clock() - self._tried_at < _REOPEN_INTERVAL_SECONDS:
                raise JournalBroken(f"journal {self._path} could not be opened a moment ago")
            self._open()
        try:
            return work()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self._disconnect()
            set_aside(self._path, str(error))
            self._open()
            return work()

    def _open(self) -> None:
        self._tried_at = self._clock()
        if self._lease is None and self._own_lease is None:
            try:
                self._own_lease = Lease.of_file(self._path)
            except NumberTaken as error:
                raise JournalBroken(str(error)) from error
            if self._own_lease is None:
                raise JournalBroken(f"journal {self._path} is held by {Lease.holder(self._path) or 'another process'}")
        finish_set_aside(self._path)
        left = False
        if self._path.exists() or wal_of(self._path).exists():
            left = self._check()
        else:
            create(self._path)
        self._connect(list(Salvage(self._path).entries(unfinished=True)) if left else [])

    def _check(self) -> bool:
        """Sets a damaged file aside. Returns whether its write-ahead log holds data after the last commit."""
        problem, left = wal_problem(self._path)
        if problem is None:
            problem = (
                problem_of(self._path)
                if self._path.exists()
                else "the file is missing and its write-ahead log is there"
            )
        if problem is not None:
            set_aside(self._path, problem)
            return False
        return left

    def _connect(self, found: Sequence[tuple[str, bytes]]) -> None:
        """Opens the database. `found`: (lane, event) of the entries that an interrupted append left in the write-ahead
        log. They are kept, because no client was told that they were refused, and a change that is sent twice is
        harmless."""
        db = self._connection_to(self._path)
        try:
            self._prepare(db, found)
        except BaseException:
            db.close()
            raise
        self._db, self._untidy = db, False

    def _prepare(self, db: sqlite3.Connection, found: Sequence[tuple[str, bytes]]) -> None:
        # With these settings the file holds exactly the waiting entries: SQLite writes nothing before a commit,
        # overwrites deleted entries with zeros, and truncates a restarted write-ahead log, so that nothing of the
        # previous one follows its end.
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "cache_spill=OFF"):
            db.execute(f"pragma {pragma}")
        db.execute("pragma journal_size_limit=0")
        upgrade(db)
        self._count(db)
        known = {entry for (entry,) in db.execute("select sum from entries")} if found else set()
        if unknown := [(lane, event) for lane, event in found if sum_of(lane, event) not in known]:
            with _transaction(db):
                for seq, (lane, event) in enumerate(unknown, self._next):
                    put(db, seq, lane, event)
            log.warning("journal_kept_unfinished", journal=str(self._path), entries=len(unknown))
            self._count(db)
        if found:
            _tidy(db)

    def _count(self, db: sqlite3.Connection) -> None:
        self.depth, self.bytes, self._next = db.execute(
            "select count(*), coalesce(sum(length(event)), 0), coalesce(max(seq), 0) + 1 from entries"
        ).fetchone()
        self.damaged = db.execute("select count(*) from damaged").fetchone()[0]
        self._generation = db.execute("select max(generation) from series").fetchone()[0]
        self.set_aside = len(files_aside(self._path))

    def _close(self) -> None:
        self._disconnect()
        lease, self._own_lease = self._own_lease, None
        if lease is not None:
            lease.release()

    def _disconnect(self) -> None:
        db, self._db = self._db, None
        if db is not None:
            db.close()

    def _writable(self) -> sqlite3.Connection:
        assert self._db is not None
        if self._untidy:
            _tidy(self._db)
            self._untidy = False
        return self._db

    def _append(self, entries: Sequence[tuple[Lane, bytes]]) -> None:
        size = sum(len(event) for _, event in entries)
        if self.bytes + size > self._max_bytes:
            raise JournalFull(f"journal {self._path} holds {self.bytes} bytes, its bound is {self._max_bytes}")
        self._leave_room(size)
        db = self._writable()
        committing = False
        try:
            with _transaction(db):
                for seq, (lane, event) in enumerate(entries, self._next):
                    put(db, seq, lane.value, event)
                committing = True
        except sqlite3.Error as error:
            self._wipe(db)
            if committing and self._untidy:
                raise JournalInDoubt(f"journal {self._path}: {error}") from error
            raise
        self._next += len(entries)
        self.depth += len(entries)
        self.bytes += size

    def _leave_room(self, size: int) -> None:
        """Refuses an append that would leave too little space on the disk. Draining the journal needs space of its own,
        and a disk that fills up during a commit leaves the append in doubt. Raises JournalFull."""
        if self._reserve_bytes:
            disk = os.statvfs(self._path.parent)
            left = disk.f_bavail * disk.f_frsize
            if left < self._reserve_bytes + 2 * size:
                raise JournalFull(f"the disk of journal {self._path} has {left} bytes left")

    def _wipe(self, db: sqlite3.Connection) -> None:
        """Removes a failed append from the write-ahead log, because a crash must not bring back a refused change."""
        self._untidy = True
        try:
            _tidy(db)
        except sqlite3.Error as error:
            log.warning("journal_not_tidied", journal=str(self._path), error=str(error))
        else:
            self._untidy = False

    def _oldest(self, count: int, lane: Lane | None, max_bytes: int | None) -> list[JournalEntry]:
        assert self._db is not None
        rows: list[tuple[Any, ...]] = []
        size = 0
        # Rows are read one by one, because `count` entries may have gigabytes.
        with closing(
            self._db.execute(
                "select seq, sum, lane, event from entries where lane = coalesce(?, lane) order by seq limit ?",
                (lane, count),
            )
        ) as found:
            for row in found:
                size += len(row[3]) if isinstance(row[3], bytes) else 0  # a damaged entry may have another type
                if rows and max_bytes is not None and size > max_bytes:
                    break
                rows.append(row)
        if lost := [row for row in rows if not whole(*row[1:])]:
            self._keep_damaged(lost)
        return [JournalEntry(seq, Lane(of), event) for seq, entry, of, event in rows if whole(entry, of, event)]

    def _keep_damaged(self, rows: Sequence[tuple[int, bytes, str, bytes]]) -> None:
        """Moves damaged entries to the table `damaged` and reports each one."""
        with _transaction(self._writable()) as db:
            for seq, _, lane, event in rows:
                found = broken(db, seq, lane, event)
                put_damaged(db, found)
                db.execute("delete from entries where seq = ?", (seq,))
                db.execute("delete from names where seq = ?", (seq,))
                log.error("journal_entry_damaged", journal=str(self._path), seq=seq, name=found.name)
        self._count(db)

    def _remove(self, entries: Sequence[JournalEntry]) -> None:
        gone = []
        with _transaction(self._writable()) as db:
            for entry in entries:
                # The sum must match too: if the file was set aside meanwhile, the new file has other numbers for its
                # entries.
                proof = sum_of(entry.lane, entry.event)
                if db.execute("delete from entries where seq = ? and sum = ?", (entry.seq, proof)).rowcount:
                    db.execute("delete from names where seq = ?", (entry.seq,))
                    gone.append(len(entry.event))
        self.depth -= len(gone)
        self.bytes -= sum(gone)

    def _reserve(self, restaurant: str, day: str) -> tuple[str, int]:
        """Reserves a block of numbers. Returns (series, highest number of the block)."""
        key = (restaurant, day)
        with _transaction(self._writable()) as db:
            row = db.execute("select last, sum from numbers where restaurant = ? and day = ?", key).fetchone()
            last, proof = row or (0, sum_of_number(restaurant, day, 0))
            if sum_of_number(restaurant, day, last) != proof:
                self._generation += 1
                db.execute("update series set generation = ?", (self._generation,))
                db.execute("delete from numbers")
                log.error("journal_numbers_damaged", journal=str(self._path), series=self._generation)
                last = 0
            last += NUMBER_BLOCK_SIZE
            values = (restaurant, day, last, sum_of_number(restaurant, day, last))
            db.execute("insert or replace into numbers values (?, ?, ?, ?)", values)
        return f"J{self._instance}.{self._generation}" if self._generation else f"J{self._instance}", last


def _tidy(db: sqlite3.Connection) -> None:
    """Moves everything from the write-ahead log into the file and truncates the log. Raises sqlite3.Error."""
    if db.execute("pragma wal_checkpoint(TRUNCATE)").fetchone()[0]:
        raise sqlite3.OperationalError("a reader holds the write-ahead log")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Begins a transaction and rolls it back on an SQLite error. If it stayed open, the next transaction could not
    begin."""
    db.execute("begin immediate")
    try:
        yield db
        db.execute("commit")
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("rollback")
        raise
