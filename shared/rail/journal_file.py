"""The layout of a journal file: its tables, the sums that prove each row, and reading it while its owner has it open.

    entries   the changes that wait: lane and event, exact bytes, with a sum of both
    names     the identity of each entry: change, order, trace. It is small and lies elsewhere in the file, so that an
              entry can still be named after its bytes are destroyed
    numbers   the highest order number that is reserved for each restaurant and day
    damaged   entries that could not be salvaged; they are reported and not sent
    series    the number of the series that `numbers` belongs to. It increases with every file that is set aside,
              because the highest reserved number may be lost

SQLite checks the structure of a file and not its contents. Without a sum, a flipped bit inside an event would go
unnoticed. Deleted rows are overwritten (`secure_delete`), so that every entry that is salvaged was still waiting.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from shared.entities.contract import Lane, encode, outline

PAGE = 4096
NOT_WHOLE = "the bytes differ from what was written"
LAYOUT_VERSION = 2
"""Raise this number with every change of the tables."""
SCHEMA = """
create table entries (seq integer primary key, sum blob not null, lane text not null, event blob not null);
create table names (seq integer primary key, sum blob not null, name blob not null);
create table numbers (restaurant text, day text, last integer not null, sum blob, primary key (restaurant, day));
create table damaged (seq integer primary key, lane text, event blob, name blob, why text not null, at text not null);
create table series (generation integer not null);
"""
# The first bytes of each of our files (https://www.sqlite.org/fileformat2.html): pages of 4096 bytes, WAL. Damage there
# makes SQLite misread the rest, or refuse to write, without calling the file corrupt.
_HEADER = b"SQLite format 3\x00\x10\x00\x02\x02\x00\x40\x20\x20"
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_WITHOUT_ENTRY = "select name from names where not exists (select 1 from entries e where e.seq = names.seq)"
_WITH_ENTRY = "select name from names where exists (select 1 from entries e where e.seq = names.seq) order by seq"
_WITHOUT_NAME = "select lane, event from entries where not exists (select 1 from names n where n.seq = entries.seq)"


class Name(Struct, frozen=True, array_like=True, kw_only=True):
    """The identity of an entry, readable without its event."""

    entry: str
    """The sum of the entry, in hexadecimal."""
    lane: str
    change_id: str = ""
    """The id of the change. If the event cannot be read, this field and all fields below have their defaults."""
    restaurant_id: str = ""
    subject: str = ""
    version: int = 0
    accepted_at: datetime | None = None
    traceparent: str | None = None


class Damaged(Struct, frozen=True, kw_only=True):
    """An entry that is not intact."""

    why: str
    lane: str | None = None
    event: bytes | None = None
    """The readable part of the event."""
    name: Name | None = None


class Contents(Struct, frozen=True, kw_only=True):
    """The contents of a journal, read while its owner may have it open."""

    entries: list[tuple[Lane, bytes]]
    damaged: list[Damaged]


def sum_of(lane: str, event: bytes) -> bytes:
    return hashlib.blake2b(lane.encode() + b"\0" + event, digest_size=16).digest()


def sum_of_name(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=16, person=b"name").digest()


def sum_of_number(restaurant: str, day: str, last: int) -> bytes:
    return hashlib.blake2b(f"{restaurant}|{day}|{last}".encode(), digest_size=16, person=b"number").digest()


def name_of(lane: str, event: bytes) -> Name:
    entry, known = sum_of(lane, event).hex(), outline(event)
    if known is None:
        return Name(entry=entry, lane=lane)
    return Name(
        entry=entry,
        lane=lane,
        change_id=known.id,
        restaurant_id=known.restaurantid,
        subject=known.subject,
        version=known.entityversion,
        accepted_at=known.time,
        traceparent=known.traceparent,
    )


def read_name(name: bytes | None) -> Name | None:
    try:
        return msgspec.json.decode(name or b"", type=Name)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


# -- creating --------------------------------------------------------------------------------------------------------


def create(path: Path) -> None:
    """Creates a complete file or none, because the file gets its name after everything is in it. A file that is empty
    or cut short was therefore damaged later. Raises sqlite3.Error and OSError."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)
    fill(draft, generation=0)
    draft.rename(path)
    flush_folder(path.parent)


def fill(
    path: Path, *, generation: int, entries: Iterable[tuple[str, bytes]] = (), damaged: Iterable[Damaged] = ()
) -> None:
    """Creates the file, which is durable when this returns. Only its owner may read it, because it has names and phone
    numbers of guests; SQLite gives its other files the same mode. Reads `damaged` after `entries` is exhausted."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        # SQLite's own journal stays in memory, because a crash would leave its file behind. No reader opens this file
        # before it is complete.
        for pragma in (
            f"page_size={PAGE}",
            "synchronous=FULL",
            "journal_mode=MEMORY",
            f"user_version={LAYOUT_VERSION}",
        ):
            db.execute(f"pragma {pragma}")
        db.execute("begin immediate")
        _make_tables(db)
        db.execute("insert into series values (?)", (generation,))
        for seq, (lane, event) in enumerate(entries, 1):
            put(db, seq, lane, event)
        for one in damaged:
            put_damaged(db, one)
        db.execute("commit")
        db.execute("pragma journal_mode=WAL")


def _make_tables(db: sqlite3.Connection) -> None:
    for statement in SCHEMA.strip().split("\n"):
        db.execute(statement)


def put(db: sqlite3.Connection, seq: int, lane: str, event: bytes) -> None:
    name = encode(name_of(lane, event))
    db.execute("insert into entries values (?, ?, ?, ?)", (seq, sum_of(lane, event), lane, event))
    db.execute("insert into names values (?, ?, ?)", (seq, sum_of_name(name), name))


def put_damaged(db: sqlite3.Connection, one: Damaged) -> None:
    name = encode(one.name) if one.name else None
    db.execute(
        "insert into damaged (lane, event, name, why, at) values (?, ?, ?, ?, datetime('now'))",
        (one.lane, one.event, name, one.why),
    )


def flush_folder(folder: Path) -> None:
    """Makes the names of the files in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- checking and reading --------------------------------------------------------------------------------------------


def is_damage(error: BaseException) -> bool:
    """Returns whether the error means that the file is damaged. Other errors (no space, no permission, no answer of the
    disk) may pass by themselves."""
    return isinstance(error, sqlite3.Error) and _code(error) in _CORRUPT


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def connect(path: Path, factory: type[sqlite3.Connection] = sqlite3.Connection) -> sqlite3.Connection:
    """Opens the file for its owner. Statements begin no transaction by themselves."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=1.0, factory=factory)
    db.text_factory = read_text
    return db


def read_only(path: Path) -> sqlite3.Connection:
    """Opens the file for reading, even while its owner has it open. Changes nothing, not even when the connection is
    closed. Raises sqlite3.Error."""
    if path.exists() and path.stat().st_size <= 1:
        # SQLite treats a file of one byte as empty, and removes the write-ahead log of an empty file even on a read.
        # The log may hold all entries that are left.
        raise sqlite3.DatabaseError("the file is empty")
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=2.0)
    db.text_factory = read_text
    return db


def read_text(text: bytes) -> str:
    """Decodes any bytes without an error. The sum of the row detects damaged text."""
    return text.decode(errors="replace")


def problem_of(path: Path) -> str | None:
    """Returns a description of the damage of a file, or None if the whole file is intact. The file must not be open.
    Raises sqlite3.Error and OSError if the file cannot be checked."""
    with path.open("rb") as file:
        if file.read(len(_HEADER)) != _HEADER:
            return "the file does not begin like a journal"
    try:
        with closing(read_only(path)) as db:
            found = db.execute("pragma integrity_check(1)").fetchone()[0]
            if found != "ok":
                return str(found).replace("\n", " ")
            version = _version(db)
            if version == 0 and not db.execute("select 1 from sqlite_master where name = 'names'").fetchone():
                return None  # such a file has the layout without sums
            if version != LAYOUT_VERSION:
                return f"the file has layout version {version}"
            for seq, entry, lane, event in db.execute("select seq, sum, lane, event from entries"):
                if not whole(entry, lane, event):
                    return f"entry {seq} differs from what was written"
            for seq, entry, name in db.execute("select seq, sum, name from names"):
                if not isinstance(name, bytes) or sum_of_name(name) != entry:
                    return f"name {seq} differs from what was written"
            if db.execute(_WITHOUT_ENTRY).fetchone():
                return "the entry of a name is missing"
            for restaurant, day, last, entry in db.execute("select restaurant, day, last, sum from numbers"):
                if sum_of_number(restaurant, day, last) != entry:
                    return f"the numbers of {day} differ from what was written"
            db.execute("select max(generation) + 0 from series").fetchone()
            db.execute("select count(*) from damaged").fetchone()
    except sqlite3.Error as error:
        # Our statements are correct. If SQLite does not understand one of them, a table is not as we made it.
        if is_damage(error) or _code(error) == sqlite3.SQLITE_ERROR:
            return str(error)
        raise
    return None


def whole(entry: Any, lane: Any, event: Any) -> bool:
    return isinstance(lane, str) and isinstance(event, bytes) and lane in set(Lane) and sum_of(lane, event) == entry


def broken(db: sqlite3.Connection, seq: int, lane: Any, event: Any) -> Damaged:
    """Returns a damaged entry, with its row in `names` or, without one, a name from its readable part."""
    lane, event = str(lane), event if isinstance(event, bytes) else str(event).encode()
    row = db.execute("select name from names where seq = ?", (seq,)).fetchone()
    return Damaged(lane=lane, event=event, name=(row and read_name(row[0])) or name_of(lane, event), why=NOT_WHOLE)


def damaged_in(db: sqlite3.Connection) -> Iterator[Damaged]:
    for lane, event, name, why in db.execute("select lane, event, name, why from damaged order by seq"):
        yield Damaged(lane=lane, event=event, name=read_name(name), why=why)


def contents(path: Path) -> Contents:
    """Returns everything in the file, as of one moment. Raises sqlite3.Error."""
    with closing(read_only(path)) as db:
        db.execute("begin")
        if _version(db) == 0:
            rows = db.execute("select lane, event from entries order by seq")
            return Contents(entries=[(Lane(lane), event) for lane, event in rows], damaged=[])
        entries, damaged = [], list(damaged_in(db))
        for seq, entry, lane, event in db.execute("select seq, sum, lane, event from entries order by seq"):
            if whole(entry, lane, event):
                entries.append((Lane(lane), event))
            else:
                damaged.append(broken(db, seq, lane, event))
        for (name,) in db.execute(_WITHOUT_ENTRY):
            damaged.append(Damaged(name=read_name(name), why="the entry is missing"))
        return Contents(entries=entries, damaged=damaged)


def list_entries(path: Path) -> tuple[list[Name], list[Damaged]]:
    """Returns the names of the waiting entries, and the damaged entries, without reading events.
    Raises sqlite3.Error."""
    with closing(read_only(path)) as db:
        db.execute("begin")
        if _version(db) == 0:
            return [name_of(lane, event) for lane, event in db.execute("select lane, event from entries")], []
        waiting = [read_name(name) for (name,) in db.execute(_WITH_ENTRY)]
        nameless = [name_of(lane, event) for lane, event in db.execute(_WITHOUT_NAME)]
        damaged = list(damaged_in(db))
        damaged += [Damaged(name=read_name(name), why="the entry is missing") for (name,) in db.execute(_WITHOUT_ENTRY)]
        return [one for one in waiting if one is not None] + nameless, damaged


def upgrade(db: sqlite3.Connection) -> None:
    """Converts a file from the layout without sums to the current layout, in one transaction."""
    if _version(db) != 0:
        return
    db.execute("begin immediate")
    db.execute("alter table entries rename to old_entries")
    db.execute("alter table numbers rename to old_numbers")
    _make_tables(db)
    db.execute("insert into series values (0)")
    for seq, lane, event in db.execute("select seq, lane, event from old_entries").fetchall():
        put(db, seq, lane, event)
    for restaurant, day, last in db.execute("select restaurant, day, last from old_numbers").fetchall():
        proof = sum_of_number(restaurant, day, last)
        db.execute("insert into numbers values (?, ?, ?, ?)", (restaurant, day, last, proof))
    db.execute("drop table old_entries")
    db.execute("drop table old_numbers")
    db.execute(f"pragma user_version={LAYOUT_VERSION}")
    db.execute("commit")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("pragma user_version").fetchone()[0])
