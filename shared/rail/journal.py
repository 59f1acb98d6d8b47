"""The journal of one instance: where changes wait on local disk while the broker cannot take them.

SQLite in WAL mode with `synchronous=FULL`: what `append` has returned for survives kill -9 and power loss. Appends that
wait at the same moment share one commit. All access is by a single thread of its own, so that no flush blocks the event
loop. One process owns the file, by the lease of its number (instance.py); others may read it (journal_file.py).

What is refused was not kept: a full journal (by its bound, or because the disk must have room for draining it) says so
before it writes anything, and an append that failed is wiped from the log before the next one. Where not even that
could be done the answer is JournalInDoubt.

A damaged file is set aside with every entry that is whole carried over (set_aside.py), at the opening or whenever
SQLite meets it. One that cannot be opened now is tried again with every use, a second apart.
"""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog
from msgspec import Struct

from shared.entities.contract import Lane
from shared.rail.instance import Lease, NumberTaken
from shared.rail.journal_file import (
    broken,
    create,
    is_damage,
    problem_of,
    put,
    put_damaged,
    read_text,
    sum_of,
    sum_of_number,
    upgrade,
    whole,
)
from shared.rail.salvage import Salvage, wal_of, wal_problem
from shared.rail.set_aside import files_aside, finish, set_aside

log = structlog.get_logger(__name__)

# Numbers are reserved in blocks: one flush for many. Those of a block that a crash leaves unused are never given.
_BLOCK = 20
_OPEN_AGAIN = 1.0  # seconds

T = TypeVar("T")


class JournalBroken(Exception):
    """The disk or the file will not take the change; nothing of it was kept."""


class JournalFull(JournalBroken):
    """The journal has reached its bound, or the disk has no room left."""


class JournalInDoubt(JournalBroken):
    """The disk failed in a way that leaves open whether the change was kept."""


class JournalEntry(Struct, frozen=True):
    seq: int
    lane: Lane
    event: bytes


class Journal:
    def __init__(
        self, path: Path, *, instance: int, max_bytes: int, reserve_bytes: int = 0, lease: Lease | None = None
    ) -> None:
        """`reserve_bytes`: what an append leaves free on the disk. `lease`: of this file, where the caller holds it;
        otherwise it is taken while the journal is open."""
        self._path = path
        self._instance = instance
        self._max_bytes = max_bytes
        self._reserve_bytes = reserve_bytes
        self._lease = lease
        self._own_lease: Lease | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._db: sqlite3.Connection | None = None
        self._wanted = False
        self._tried_at = 0.0
        self._untidy = False
        self._waiting: list[tuple[Sequence[tuple[Lane, bytes]], asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._numbers: dict[tuple[str, str], tuple[str, int, int]] = {}
        self._numbering = asyncio.Lock()
        self._generation = 0
        self._next = 1
        self.depth = 0
        self.bytes = 0
        self.damaged = 0
        """Entries that are not whole: told, and not sent."""
        self.set_aside = 0
        """Files of this journal that were damaged and lie beside it."""

    @property
    def opened(self) -> bool:
        return self._db is not None

    async def open(self) -> None:
        """Raises JournalBroken, also when another process has it. Whatever is used next tries again."""
        self._wanted = True
        await self._run(self._open)

    async def close(self) -> None:
        """May be called twice, and without an open."""
        self._wanted = False
        if self._flushing is not None:
            await asyncio.gather(self._flushing, return_exceptions=True)
        if self._db is not None or self._own_lease is not None:
            await self._run(self._close)

    async def append(self, entries: Sequence[tuple[Lane, bytes]]) -> None:
        """Durable when it returns. Raises JournalBroken or JournalFull: then none of the entries was kept; or
        JournalInDoubt."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((entries, done))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush(), name="journal-flush")
        await done

    async def oldest(self, count: int, lane: Lane | None = None) -> list[JournalEntry]:
        """Of one lane, or of all. What is not as it was written is not among them."""
        return await self._run(partial(self._do, lambda: self._oldest(count, lane)))

    async def remove(self, entries: Sequence[JournalEntry]) -> None:
        """Of entries that are recorded elsewhere now."""
        await self._run(partial(self._do, lambda: self._remove(entries)))

    async def next_number(self, restaurant: str, day: str) -> str:
        """`J1-0007`: the series of this instance, so that no number is given twice whoever counts."""
        async with self._numbering:
            series, last, reserved = self._numbers.get((restaurant, day), ("", 0, 0))
            if last == reserved:
                series, reserved = await self._run(partial(self._do, lambda: self._reserve(restaurant, day)))
                last = reserved - _BLOCK
                if len(self._numbers) > 10_000:  # business days gone by
                    self._numbers.clear()
            self._numbers[restaurant, day] = (series, last + 1, reserved)
        return f"{series}-{last + 1:04d}"

    # -- in the event loop -------------------------------------------------------------------------------------

    async def _flush(self) -> None:
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            try:
                entries = [entry for entries, _ in waiting for entry in entries]
                await self._run(partial(self._do, partial(self._append, entries)))
            except Exception as error:  # noqa: BLE001  (told to all that wait for it, whatever it is)
                broken = (
                    error if isinstance(error, JournalBroken) else JournalInDoubt(f"{type(error).__name__}: {error}")
                )
                for _, done in waiting:
                    if not done.done():
                        done.set_exception(broken)
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

    def _do(self, work: Callable[[], T]) -> T:
        """With the journal open; once more when its file turned out to be damaged and was set aside."""
        if self._db is None:
            if not self._wanted:
                raise JournalBroken(f"journal {self._path} is not open")
            if time.monotonic() - self._tried_at < _OPEN_AGAIN:
                raise JournalBroken(f"journal {self._path} could not be opened a moment ago")
            self._open()
        try:
            return work()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self._let_go()
            set_aside(self._path, str(error))
            self._open()
            return work()

    def _open(self) -> None:
        self._tried_at = time.monotonic()
        if self._lease is None and self._own_lease is None:
            try:
                self._own_lease = Lease.beside(self._path)
            except NumberTaken as error:
                raise JournalBroken(str(error)) from error
            if self._own_lease is None:
                raise JournalBroken(f"journal {self._path} is held by {Lease.holder(self._path) or 'another process'}")
        finish(self._path)
        left = False
        if self._path.exists() or wal_of(self._path).exists():
            left = self._check()
        else:
            create(self._path)
        self._connect(list(Salvage(self._path).entries(unfinished=True)) if left else [])

    def _check(self) -> bool:
        """Sets a damaged file aside; whether something lies behind the last commit of its log."""
        problem, left = wal_problem(self._path)
        if problem is None:
            problem = problem_of(self._path) if self._path.exists() else "the file is gone, its log is there"
        if problem is not None:
            set_aside(self._path, problem)
            return False
        return left

    def _connect(self, found: Sequence[tuple[str, bytes]]) -> None:
        """`found`: what an append that a crash has cut short has left in the log; no harm in keeping it."""
        db = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=1.0)
        db.text_factory = read_text
        try:
            self._prepare(db, found)
        except BaseException:
            db.close()
            raise
        self._db, self._untidy = db, False

    def _prepare(self, db: sqlite3.Connection, found: Sequence[tuple[str, bytes]]) -> None:
        # Nothing is written before a commit, and what is deleted is gone: what lies in the file is what waits. A log
        # that begins anew is cut: nothing of the one before it stands behind its end.
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
        self._let_go()
        lease, self._own_lease = self._own_lease, None
        if lease is not None:
            lease.release()

    def _let_go(self) -> None:
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
        """What lies here must be drained, which takes room of its own; and a disk that is full in the middle of a
        commit leaves doubt."""
        if self._reserve_bytes:
            disk = os.statvfs(self._path.parent)
            left = disk.f_bavail * disk.f_frsize
            if left < self._reserve_bytes + 2 * size:
                raise JournalFull(f"the disk of journal {self._path} has {left} bytes left")

    def _wipe(self, db: sqlite3.Connection) -> None:
        """What a failed append has left in the log: a crash must not bring back what was refused."""
        self._untidy = True
        try:
            _tidy(db)
        except sqlite3.Error as error:
            log.warning("journal_not_tidied", journal=str(self._path), error=str(error))
        else:
            self._untidy = False

    def _oldest(self, count: int, lane: Lane | None) -> list[JournalEntry]:
        assert self._db is not None
        rows = self._db.execute(
            "select seq, sum, lane, event from entries where lane = coalesce(?, lane) order by seq limit ?",
            (lane, count),
        ).fetchall()
        if lost := [row for row in rows if not whole(*row[1:])]:
            self._give_up_on(lost)
        return [JournalEntry(seq, Lane(of), event) for seq, entry, of, event in rows if whole(entry, of, event)]

    def _give_up_on(self, rows: Sequence[tuple[int, bytes, str, bytes]]) -> None:
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
                # By its sum too: a file that was set aside meanwhile has numbered its entries anew.
                proof = sum_of(entry.lane, entry.event)
                if db.execute("delete from entries where seq = ? and sum = ?", (entry.seq, proof)).rowcount:
                    db.execute("delete from names where seq = ?", (entry.seq,))
                    gone.append(len(entry.event))
        self.depth -= len(gone)
        self.bytes -= sum(gone)

    def _reserve(self, restaurant: str, day: str) -> tuple[str, int]:
        """(series, the highest number that is ours now)"""
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
            last += _BLOCK
            values = (restaurant, day, last, sum_of_number(restaurant, day, last))
            db.execute("insert or replace into numbers values (?, ?, ?, ?)", values)
        return f"J{self._instance}.{self._generation}" if self._generation else f"J{self._instance}", last


def _tidy(db: sqlite3.Connection) -> None:
    """Everything into the file, and the log cut to nothing. Raises sqlite3.Error."""
    if db.execute("pragma wal_checkpoint(TRUNCATE)").fetchone()[0]:
        raise sqlite3.OperationalError("a reader holds the log")


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
