"""A session of the ledger reads the log: its end, entries that have expired, and broken positions."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest

from services.sync.ledger.begin import first_entry, provable
from services.sync.ledger.session import EndOfSession, ExpiredRange, LedgerSession, LedgerTotals, Patience
from services.sync.ledger.sides import FeedOnly
from shared.entities.contract import encode, encode_batch
from shared.messaging.log import BrokenPosition, Fallbacks, LogBatch, LogEntry, Start
from shared.messaging.position import LogPosition
from shared.postgres.checkpoints import Checkpoint
from shared.postgres.feed import FeedChange
from shared.settings import Settings
from tests.rigs.builders import change, order


def at(offset: int) -> LogPosition:
    return LogPosition(offset, offset)


def batch(*offsets: int, caught_up: bool = False, broken: BrokenPosition | None = None) -> LogBatch:
    """A batch with one change at each offset."""
    entries = [LogEntry(at(offset), "critical", encode_batch((encode(change(order())),))) for offset in offsets]
    at_end = time.monotonic() if len(offsets) < 64 else None
    return LogBatch(entries, [], caught_up, [at(offset) for offset in offsets], at_end, broken)


class FakeReader:
    """A log that has these batches."""

    def __init__(self, *batches: LogBatch) -> None:
        self.batches = batches
        self.starts: list[Start] = []
        self.fallbacks: Sequence[Start] = ()

    async def read(self, start: Start, *, fallbacks: Fallbacks | None = None) -> AsyncGenerator[LogBatch, None]:
        self.starts.append(start)
        if fallbacks is not None:
            self.fallbacks = await fallbacks()
        for one in self.batches:
            yield one


def checkpoint(id_: str, low: int, until: int) -> Checkpoint:
    return Checkpoint(id_, at(low), at(until), 7, 1)


def a_comparison(begun: Checkpoint | None = None, *, totals: LedgerTotals | None = None) -> LedgerSession:
    nothing: Any = None
    return LedgerSession(Settings(), nothing, Patience(), begun=begun, totals=totals)


async def read(comparison: LedgerSession, *batches: LogBatch) -> FakeReader:
    reader: Any = FakeReader(*batches)
    await comparison.read_log(reader)
    return reader


async def test_comparison_begins_where_the_checkpoint_says_that_something_is_open() -> None:
    begun = a_comparison(checkpoint("a", 3, 9))
    reader = await read(begun, batch(4, 9))
    assert reader.starts == [at(3)]
    assert (begun.sides.log_low, begun.sides.feed_position) == (at(3), (7, 1))
    assert (await read(a_comparison(), batch(0))).starts == ["first"]


async def test_change_is_missing_in_the_log_only_after_the_log_was_read_to_its_end() -> None:
    found = a_comparison()
    found.sides.from_feed(FeedOnly(FeedChange(1, 1, "", "order", "", 1, "a"), time.monotonic() - 60))
    await read(found, batch(*range(200)))
    assert not list(found.overdue()), "a full batch shows that more may follow"
    found.sides.from_feed(FeedOnly(FeedChange(1, 2, "", "order", "", 1, "young"), time.monotonic()))
    await read(found, batch(200))
    assert [id_ for id_, _ in found.overdue()] == ["a"]


async def test_comparison_is_steady_from_the_end_of_the_log_on_and_not_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    found = a_comparison()
    await read(found, batch(0))
    clock += 5
    assert found.steady_seconds == 0, "the reader has not caught up"
    await read(found, batch(1, caught_up=True))
    clock += 5
    await read(found, batch(2))
    assert found.steady_seconds == 10
    clock += 3_600
    assert found.steady_seconds == 0, "the log has brought nothing for an hour, not even a heartbeat"
    await read(found, batch(3))
    clock += 1
    assert found.steady_seconds == 1


async def test_entries_that_have_expired_are_reported_and_the_comparison_continues() -> None:
    found = a_comparison(checkpoint("a", 3, 9))
    await read(found, batch(20, 21, broken=BrokenPosition("expired", at(3), "first")))
    assert found.totals.expired == [ExpiredRange(3, 20)]
    assert found.sides.log_position == at(21)
    assert not found.sides.rereads
    again = a_comparison(checkpoint("a", 3, 9), totals=found.totals)
    await read(again, batch(25, broken=BrokenPosition("expired", at(3), "first")))
    assert found.totals.expired == [ExpiredRange(3, 25)], "the same range has grown"


async def test_log_that_lacks_an_entry_that_was_read_ends_the_comparison() -> None:
    with pytest.raises(EndOfSession, match="truncated"):
        await read(a_comparison(checkpoint("a", 3, 9)), batch(0, broken=BrokenPosition("truncated", at(3), "first")))
    with pytest.raises(EndOfSession, match="was cut"):
        await read(a_comparison(checkpoint("a", 3, 9)), batch(4, 10))
    with pytest.raises(EndOfSession, match="ends before"):
        await read(a_comparison(checkpoint("a", 3, 9)), batch(4, caught_up=True))


async def test_beginning_is_the_newest_checkpoint_that_the_log_proves() -> None:
    new, old = checkpoint("new", 5, 9), checkpoint("old", 2, 4)
    reader: Any = FakeReader(batch(10))
    assert await provable(reader, [new, old]) == new
    assert (reader.starts, reader.fallbacks) == ([at(9)], [at(4)])
    reader = FakeReader(batch(5, broken=BrokenPosition("truncated", at(9), at(4))))
    assert await provable(reader, [new, old]) == old
    reader = FakeReader(batch(0, broken=BrokenPosition("truncated", at(9), "first")))
    assert await provable(reader, [new, old]) is None
    reader = FakeReader(batch(30, broken=BrokenPosition("expired", at(9), "first")))
    assert await provable(reader, [new, old]) == new, "what expired was proved before"
    assert await provable(reader, []) is None


async def test_whole_log_begins_with_the_feed_if_nothing_has_expired() -> None:
    reader: Any = FakeReader(batch(0))
    nothing: Any = None
    assert await asyncio.wait_for(first_entry(reader, nothing), 5) is None
