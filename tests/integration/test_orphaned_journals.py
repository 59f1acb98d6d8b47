"""Orphaned journals: another instance records their entries, once."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from services.sync.cli.main import main
from services.sync.ledger.journals import journals
from shared.entities.contract import Lane, encode, split_batch
from shared.messaging.publisher import NotSent
from shared.rail.instance import Lease
from shared.rail.journal import Journal, JournalBroken
from shared.rail.orphaned_journals import OrphanedJournals
from shared.rail.set_aside import files_aside
from tests.rigs import builders
from tests.rigs.turns import whole_turn


class Broker:
    """Takes messages, or is unavailable."""

    def __init__(self) -> None:
        self.unavailable = False
        self.events: list[bytes] = []

    async def wait_connected(self) -> None:
        return

    async def publish(self, _: str, body: bytes) -> None:
        if self.unavailable:
            raise NotSent("unavailable")
        self.events += split_batch(body)


def orphaned_journals_of(folder: Path, broker: Any, *, own: int = 1) -> OrphanedJournals:
    return OrphanedJournals(folder, broker, None, own=own, max_bytes=1 << 20, interval_seconds=0.05)


@pytest.fixture
def leave(tmp_path: Path) -> Callable[..., Awaitable[list[bytes]]]:
    async def leave(number: int, count: int) -> list[bytes]:
        """Leaves the journal of an instance that wrote `count` changes and then ended."""
        events = [encode(builders.change(builders.order(items=0))) for _ in range(count)]
        journal = Journal(tmp_path / f"orders-{number}.sqlite", instance=number, max_bytes=1 << 20)
        await journal.open()
        if events:
            await journal.append([(Lane.CRITICAL, event) for event in events])
        await journal.close()
        return events

    return leave


async def depth(folder: Path, number: int) -> int:
    journal = Journal(folder / f"orders-{number}.sqlite", instance=number, max_bytes=1 << 20)
    await journal.open()
    await journal.close()
    return journal.depth


async def test_orphaned_journal_is_recorded_and_its_instance_number_is_free_again(tmp_path: Path, leave: Any) -> None:
    left = await leave(2, 3) + await leave(5, 400)
    broker = Broker()
    orphaned = orphaned_journals_of(tmp_path, broker)
    assert await orphaned.drain() == 403
    assert sorted(broker.events) == sorted(left)
    assert await orphaned.drain() == 0
    assert await depth(tmp_path, 2) == await depth(tmp_path, 5) == 0
    with Lease.take(tmp_path, "orders", 5, within=0.0):
        pass


async def test_journals_of_running_instances_are_left_alone(tmp_path: Path, leave: Any) -> None:
    await leave(1, 2)
    await leave(2, 2)
    broker = Broker()
    with Lease.take(tmp_path, "orders", 2):
        assert await orphaned_journals_of(tmp_path, broker).drain() == 0
    assert not broker.events
    # Instance 1 drains its own journal with its own drainer.
    assert await orphaned_journals_of(tmp_path, broker).drain() == 2
    assert await depth(tmp_path, 1) == 2


async def test_empty_orphaned_journal_is_checked_again_after_a_write(tmp_path: Path, leave: Any) -> None:
    await leave(2, 0)
    broker = Broker()
    orphaned = orphaned_journals_of(tmp_path, broker)
    assert await orphaned.drain() == 0
    left = await leave(2, 4)
    assert await orphaned.drain() == 4
    assert broker.events == left


async def test_unavailable_broker_loses_nothing_and_holds_no_instance_number(tmp_path: Path, leave: Any) -> None:
    left = await leave(2, 3)
    broker = Broker()
    broker.unavailable = True
    orphaned = orphaned_journals_of(tmp_path, broker)
    with pytest.raises(NotSent):
        await orphaned.drain()
    with Lease.take(tmp_path, "orders", 2, within=0.0):
        pass
    orphaned.start()
    try:
        broker.unavailable = False
        await whole_turn(orphaned.loop)
    finally:
        await orphaned.stop()
    assert broker.events == left


async def test_unreadable_journal_does_not_hold_back_the_others(tmp_path: Path, leave: Any) -> None:
    (tmp_path / "orders-2.sqlite").mkdir()
    left = await leave(3, 2)
    broker = Broker()
    with pytest.raises(JournalBroken):
        await orphaned_journals_of(tmp_path, broker).drain()
    assert broker.events == left


async def test_intact_entries_of_a_damaged_journal_are_recorded_and_the_file_is_set_aside(
    tmp_path: Path, leave: Any
) -> None:
    first, second, third = await leave(2, 3)
    path = tmp_path / "orders-2.sqlite"
    data = bytearray(path.read_bytes())
    data[data.index(second) + 200] ^= 1
    path.write_bytes(bytes(data))
    broker = Broker()
    orphaned = orphaned_journals_of(tmp_path, broker)
    assert await orphaned.drain() == 2
    assert sorted(broker.events) == sorted([first, third])
    assert [one.read_bytes() for one in files_aside(path)] == [bytes(data)]
    assert await orphaned.drain() == 0


@pytest.mark.parametrize("ending", ["-wal", ".rebuilt"])
async def test_journal_without_its_file_is_found_by_its_log_or_by_its_replacement(tmp_path: Path, ending: str) -> None:
    events = [encode(builders.change(builders.order(items=0))) for _ in range(3)]
    (living := tmp_path / "living").mkdir()
    journal = Journal(living / "orders-2.sqlite", instance=2, max_bytes=1 << 20)
    await journal.open()
    await journal.append([(Lane.CRITICAL, event) for event in events])
    if ending == "-wal":
        # The close removes the write-ahead log, so the test reads it first.
        log = (living / "orders-2.sqlite-wal").read_bytes()
        await journal.close()
        (tmp_path / "orders-2.sqlite-wal").write_bytes(log)
    else:
        await journal.close()
        (living / "orders-2.sqlite").rename(tmp_path / "orders-2.sqlite.rebuilt")
    assert journals(tmp_path).depths == {"orders-2.sqlite": 3}
    shown = await asyncio.to_thread(
        CliRunner().invoke, main, ["journal", "show", str(tmp_path / "orders-2.sqlite"), "--json"]
    )
    assert json.loads(shown.stdout)["count"] == 3, shown.stderr
    broker = Broker()
    orphaned = orphaned_journals_of(tmp_path, broker)
    assert await orphaned.drain() == 3
    assert sorted(broker.events) == sorted(events)
    assert await orphaned.drain() == 0
    assert journals(tmp_path).depths == {"orders-2.sqlite": 0}
