"""The journal: acknowledged entries survive, it has one owner and a bound, and it gives each number once."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from shared.entities.contract import Lane, encode, split_batch
from shared.errors import Unavailable
from shared.messaging.publisher import InDoubt, NotSent
from shared.rail.drain import Drainer
from shared.rail.journal import Journal, JournalBroken, JournalFull
from shared.rail.order_numbers import InstanceNumbers
from tests.rigs import builders
from tests.rigs.journal_connection import JournalConnections
from tests.rigs.system import ROOT
from tests.rigs.turns import next_turn

APPENDER = """
import asyncio, sys
from pathlib import Path
from shared.entities.contract import Lane
from shared.rail.journal import Journal
from shared.rail.order_numbers import InstanceNumbers

async def one(journal, n):
    await journal.append([(Lane.CRITICAL, b"entry %d" % n)])
    print(n, flush=True)

async def main():
    journal = Journal(Path(sys.argv[1]), instance=1, max_bytes=1 << 24)
    await journal.open()
    numbers = InstanceNumbers(journal)
    for start in range(0, 10**9, 10):
        await asyncio.gather(*(one(journal, n) for n in range(start, start + 10)))
        print("number", await numbers.next("r", "d"), flush=True)

asyncio.run(main())
"""


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    made: list[Journal] = []

    async def make(*, opened: bool = True, max_bytes: int = 1 << 20, **options: Any) -> Journal:
        journal = Journal(tmp_path / "journal.sqlite", instance=1, max_bytes=max_bytes, **options)
        made.append(journal)
        if opened:
            await journal.open()
        return journal

    yield make
    for journal in made:
        await journal.close()


async def append(journal: Journal, *events: bytes, lane: Lane = Lane.CRITICAL) -> None:
    await journal.append([(lane, event) for event in events])


async def contents(journal: Journal) -> list[bytes]:
    return [entry.event for entry in await journal.oldest(1_000_000)]


async def test_acknowledged_entries_survive_a_kill_9(make: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", APPENDER, str(path), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    lines: list[str] = []
    while len(lines) < 200:
        lines.append((await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip())
    process.send_signal(signal.SIGKILL)
    lines += (await process.stdout.read()).decode().split("\n")[:-1]
    await process.wait()

    journal = await make()
    acknowledged = {f"entry {line}".encode() for line in lines if line.isdecimal()}
    assert len(acknowledged) > 150
    assert acknowledged <= set(await contents(journal))
    assert journal.depth == len(await contents(journal))
    numbers = {line.removeprefix("number ") for line in lines if line.startswith("number")}
    assert len(numbers) > 15
    assert await InstanceNumbers(journal).next("r", "d") not in numbers


async def test_second_process_is_refused_while_the_first_one_runs(make: Callable[..., Any], tmp_path: Path) -> None:
    first = await make()
    await append(first, b"one")
    opener = (
        "import asyncio, sys; from pathlib import Path; from shared.rail.journal import Journal, JournalBroken\n"
        "try: asyncio.run(Journal(Path(sys.argv[1]), instance=1, max_bytes=1).open()); print('opened')\n"
        "except JournalBroken as error: print('refused', error)"
    )

    async def open_elsewhere() -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", opener, str(tmp_path / "journal.sqlite"), stdout=asyncio.subprocess.PIPE, cwd=ROOT
        )
        out, _ = await asyncio.wait_for(process.communicate(), 20)
        return out.decode()

    assert (await open_elsewhere()).startswith("refused")
    await append(first, b"two")  # the first process continues
    await first.close()
    assert await open_elsewhere() == "opened\n"


async def test_full_journal_keeps_nothing_of_a_refused_append_and_accepts_again_when_drained(
    make: Callable[..., Any],
) -> None:
    journal = await make(max_bytes=100)
    await append(journal, b"x" * 90)
    with pytest.raises(JournalFull):
        await append(journal, b"small", b"y" * 20)
    assert await contents(journal) == [b"x" * 90]
    await append(journal, b"z" * 10)
    await journal.remove(await journal.oldest(1))
    assert (journal.depth, journal.bytes) == (1, 10)
    await append(journal, b"y" * 90)
    assert await contents(journal) == [b"z" * 10, b"y" * 90]


async def test_reopened_journal_knows_its_depth_and_bytes(make: Callable[..., Any]) -> None:
    journal = await make()
    await append(journal, b"one", b"three")
    await journal.close()
    again = await make()
    assert (again.depth, again.bytes) == (2, 8)
    assert await contents(again) == [b"one", b"three"]


async def test_numbers_never_repeat_after_a_reopen_and_count_per_day_and_restaurant(
    make: Callable[..., Any],
) -> None:
    given: list[str] = []
    for _ in range(3):
        journal = await make()
        numbers = InstanceNumbers(journal)
        given += await asyncio.gather(*(numbers.next("r", "monday") for _ in range(45)))
        await journal.close()
    assert len(set(given)) == len(given) == 135
    assert given[:2] == ["J1-0001", "J1-0002"]
    numbers = InstanceNumbers(await make())
    assert await numbers.next("r", "tuesday") == await numbers.next("s", "monday") == "J1-0001"


async def test_appends_that_wait_at_the_same_moment_share_a_transaction(make: Callable[..., Any]) -> None:
    connections = JournalConnections()
    journal = await make(connect=connections)
    before = connections.newest.commits
    await asyncio.gather(*(append(journal, b"%d" % n) for n in range(100)))
    assert journal.depth == 100
    assert 1 <= connections.newest.commits - before <= 3


async def test_closed_or_unopened_journal_is_broken_and_may_be_closed_twice(
    make: Callable[..., Any],
) -> None:
    journal = await make(opened=False)
    with pytest.raises(JournalBroken):
        await append(journal, b"x")
    await journal.close()
    await journal.open()
    await journal.close()
    await journal.close()
    with pytest.raises(Unavailable):
        await InstanceNumbers(journal).next("r", "d")


@pytest.mark.parametrize("failing", ["insert", "delete", "commit"])
async def test_journal_takes_changes_again_after_a_disk_error(make: Callable[..., Any], failing: str) -> None:
    connections = JournalConnections()
    journal = await make(connect=connections)
    await append(journal, b"first")
    connections.newest.fails_next = [failing]
    with pytest.raises(JournalBroken):
        if failing == "delete":
            await journal.remove(await journal.oldest(1))
        else:
            await append(journal, b"refused")
    if failing == "commit":
        connections.newest.fails_next = [failing]
        with pytest.raises(JournalBroken):
            await journal.remove(await journal.oldest(1))
    assert not connections.newest.fails_next
    await append(journal, b"second")
    assert await contents(journal) == [b"first", b"second"]
    assert journal.depth == 2
    assert len(connections.opened) == 1, "the journal opened its file again, although the file is not damaged"


# -- the drainer, with a fake publisher ------------------------------------------------------------------------


class Broker:
    """Takes messages, and refuses those of the given lanes."""

    def __init__(self, *refuses: Lane) -> None:
        self.refuses = refuses
        self.taken: list[tuple[str, list[bytes]]] = []
        self.largest = 0

    async def wait_connected(self) -> None:
        return

    async def publish(self, lane: str, body: bytes) -> None:
        if Lane(lane) in self.refuses:
            raise InDoubt("a nack")
        self.largest = max(self.largest, len(body))
        self.taken.append((lane, split_batch(body)))

    def events(self) -> list[bytes]:
        return [event for _, events in self.taken for event in events]


def drainer_of(journal: Journal, broker: Any) -> Drainer:
    return Drainer(journal, broker)


async def test_entry_leaves_the_journal_only_after_its_confirm(make: Callable[..., Any]) -> None:
    journal = await make()
    event = encode(builders.change(builders.order(items=0)))
    await append(journal, event)
    with pytest.raises(InDoubt):
        await drainer_of(journal, Broker(Lane.CRITICAL)).drain_some()
    assert await contents(journal) == [event]

    class UnavailableBroker:
        async def publish(self, *_: Any) -> None:
            raise NotSent("unavailable")

    with pytest.raises(NotSent):
        await drainer_of(journal, UnavailableBroker()).drain_some()
    assert await contents(journal) == [event]
    broker = Broker()
    await drainer_of(journal, broker).drain_some()
    assert broker.events() == [event]
    assert (await contents(journal), journal.depth, journal.bytes) == ([], 0, 0)


async def test_large_changes_are_drained_in_messages_that_the_broker_takes(make: Callable[..., Any]) -> None:
    """RabbitMQ 4 closes the channel when a message is over 16 MiB, so one large message would block the journal."""
    journal = await make(max_bytes=1 << 26)
    events = [b'"' + b"x" * 700_000 + b'"' for _ in range(30)]
    await append(journal, *events)
    broker, drainer = Broker(), None
    drainer = drainer_of(journal, broker)
    drainer.start()
    while journal.depth:
        await next_turn(drainer.loop)
    await drainer.stop()
    assert broker.events() == events
    assert broker.largest <= 1 << 20


async def test_messages_shrink_to_one_change_while_publishes_are_in_doubt_and_grow_again(
    make: Callable[..., Any],
) -> None:
    class SlowBroker(Broker):
        """Confirms no message that is larger than `max_bytes`."""

        max_bytes = 2_000

        async def publish(self, lane: str, body: bytes) -> None:
            if len(body) > self.max_bytes:
                self.largest = max(self.largest, len(body))
                raise InDoubt("no confirm in time")
            await super().publish(lane, body)

    journal = await make()
    events = [b'"%03d%s"' % (number, b"x" * 1_000) for number in range(400)]
    await append(journal, *events)
    broker = SlowBroker()
    drainer = drainer_of(journal, broker)
    for _ in range(20):
        with contextlib.suppress(InDoubt):
            await drainer.drain_some()
    assert broker.largest <= 64 << 10
    assert broker.taken
    assert {len(taken) for _, taken in broker.taken} == {1}
    broker.max_bytes = 1 << 30
    while journal.depth:
        await drainer.drain_some()
    assert broker.events() == events
    assert drainer.message_bytes > 2_000


async def test_oldest_reads_entries_up_to_a_size_and_at_least_one(make: Callable[..., Any]) -> None:
    journal = await make()
    await append(journal, b"x" * 100, b"y" * 100, b"z" * 300)
    assert [entry.event[:1] for entry in await journal.oldest(10, None, 250)] == [b"x", b"y"]
    assert [entry.event[:1] for entry in await journal.oldest(10, None, 50)] == [b"x"]
    await append(journal, b"w")  # no statement of an earlier read is open


async def test_lane_with_a_refusing_queue_does_not_hold_back_other_lanes(make: Callable[..., Any]) -> None:
    journal = await make()
    await append(journal, b'"order"', lane=Lane.CRITICAL)
    await append(journal, b'"dish"', lane=Lane.NORMAL)
    await append(journal, b'"history"', lane=Lane.BACKGROUND)
    broker = Broker(Lane.CRITICAL)
    with pytest.raises(InDoubt):
        await drainer_of(journal, broker).drain_some()
    assert broker.taken == [("normal", [b'"dish"']), ("background", [b'"history"'])]
    assert await contents(journal) == [b'"order"']
