"""A journal file of version 1, which has no checksums, and the checksums of version 2."""

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

from shared.rail.journal import Journal
from shared.rail.journal_file import contents, sum_of
from shared.rail.order_numbers import InstanceNumbers
from tests.rigs.journals import entry, open_and_close


async def test_journal_without_sums_keeps_its_entries_and_numbers(tmp_path: Path) -> None:
    path, made = tmp_path / "orders-1.sqlite", [entry() for _ in range(5)]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("pragma journal_mode=WAL")
        db.execute(
            "create table entries (seq integer primary key autoincrement, lane text not null, event blob not null)"
        )
        db.execute(
            "create table numbers (restaurant text, day text, last integer not null, primary key (restaurant, day))"
        )
        db.executemany("insert into entries (lane, event) values (?, ?)", made)
        db.execute("insert into numbers values ('r', 'd', 40)")
    assert contents(path).entries == made
    given: list[str] = []

    async def number(journal: Journal) -> None:
        given.append(await InstanceNumbers(journal).next("r", "d"))

    journal = await open_and_close(path, number)
    assert (contents(path).entries, journal.depth, journal.set_aside) == (made, 5, 0)
    assert given == ["J1-0041"]


def test_sums_differ_between_lanes_and_contents() -> None:
    sums = {sum_of(lane, event) for lane in ("critical", "normal") for event in (b"a", b"b")}
    assert len(sums) == 4
    assert sum_of("critical", b"a") == hashlib.blake2b(b"critical\0a", digest_size=16).digest()
