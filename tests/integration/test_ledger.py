"""The ledger on real servers: changes in each place that it counts, and changes that were removed and must be named."""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from services.sync.dead_letters import actions
from services.sync.ledger.accepted_log import AcceptedLog
from services.sync.ledger.balance import PLACES, AcceptedChange, Balance
from services.sync.ledger.ledger import Ledger, take_balance
from services.sync.writer.postgres_writer import PostgresWriter
from shared.entities.contract import Change, Lane, encode, encode_batch, now
from shared.errors import Unavailable
from shared.messaging import topology
from shared.messaging.declare import connect
from shared.observability.metrics import Metrics, WriterMetrics
from shared.postgres.pool import Postgres
from shared.rail.instance import Lease
from shared.rail.journal import Journal
from shared.rail.set_aside import files_aside
from shared.settings import Settings
from tests.rigs import zygote
from tests.rigs.builders import OTHER_RESTAURANT, change, menu_item, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import applied
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
TIMEOUT_SECONDS = 1.0


class LedgerRig:
    """A rig of the PostgreSQL writer with heartbeats and a folder for journals, and its ledger."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ops = Postgres(rig.settings.database_ops_url, rig.settings, size=2)
        self.journals: list[Journal] = []

    async def balance(self, **options: Any) -> Balance:
        """Takes a balance; fails if it does not add up or does not list every unexplained change that it counts."""
        found = await take_balance(self.rig.settings, self.ops, **{"timeout_seconds": TIMEOUT_SECONDS, **options})
        wrong = [
            name
            for name in ("accepted", *PLACES)
            if getattr(found, name) != sum(getattr(one, name) for one in found.restaurants)
        ]
        # Every balance must add up. This calls `pytest.fail`, because `until` retries after an AssertionError.
        if wrong or found.accepted != sum(getattr(found, place) for place in PLACES):
            pytest.fail(f"the balance does not add up: {wrong} {found}")
        if found.unexplained != len(found.missing):
            pytest.fail(
                f"the ledger counts {found.unexplained} unexplained changes and lists {len(found.missing)}: {found}"
            )
        return found

    async def until(self, **expected: int) -> Balance:
        """Waits for a balance that has exactly these counts, apart from `accepted`; returns it."""

        async def look() -> dict[str, int]:
            self.last = await self.balance()
            return {name: count for name in PLACES if (count := getattr(self.last, name))}

        await eventually(look, within=40, what=f"a balance of {expected}", until=lambda seen: seen == expected)
        return self.last

    async def journal(self, *changes: Change, number: int = 1) -> Path:
        """Opens the journal of an instance with these changes in it; returns its path."""
        path = self.rig.settings.journal_folder / f"orders-{number}.sqlite"
        journal = Journal(path, instance=number, max_bytes=1 << 20)
        self.journals.append(journal)
        await journal.open()
        await journal.append([(Lane.CRITICAL, encode(one)) for one in changes])
        return path

    async def cli(self, *arguments: str) -> tuple[int, str, str]:
        """Runs `ticketrail`; returns (exit code, stdout, stderr)."""
        settings = self.rig.settings.model_dump(mode="json")
        env = {key: value for key, value in os.environ.items() if not key.startswith("TICKETRAIL_")}
        for name, value in settings.items():
            if value is not None:
                text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
                env[f"TICKETRAIL_{name.upper()}"] = text
        return await asyncio.to_thread(zygote.run, ["services.sync.cli", *arguments], env=env)

    def another_writer(self) -> PostgresWriter:
        rig = self.rig
        rig.writer = PostgresWriter(
            *(rig.settings, rig.postgres, rig.publisher, rig.watch, rig.tracer, WriterMetrics(Metrics()))
        )
        return rig.writer


@pytest.fixture
async def make_ledger_rig(make_rig: MakeRig, tmp_path: Path) -> AsyncIterator[Any]:
    made: list[LedgerRig] = []

    async def make(**settings: Any) -> LedgerRig:
        # By default the ledger does not use the management API, because its figures are several seconds old.
        urls = {"rabbitmq_management_url": "", "rabbitmq_watcher_url": ""}
        ledger_rig = LedgerRig(await make_rig(home=tmp_path, **{**urls, **settings}))
        made.append(ledger_rig)
        await ledger_rig.rig.writer.start()
        await ledger_rig.rig.heartbeats.start()
        return ledger_rig

    yield make
    for ledger_rig in made:
        for journal in ledger_rig.journals:
            await journal.close()
        await ledger_rig.ops.close()


@pytest.fixture
async def ledger_rig(make_ledger_rig: Any) -> LedgerRig:
    made: LedgerRig = await make_ledger_rig()
    return made


def traced(**fields: Any) -> Change:
    return change(order(items=1, **fields), traceparent=f"00-{TRACE}-b7ad6b7169203331-01")


# -- the places that explain a change --------------------------------------------------------------------------------


async def test_written_changes_count_once_as_synced_for_each_restaurant(ledger_rig: LedgerRig) -> None:
    mine = [change(order(items=1)) for _ in range(5)]
    other = change(menu_item(restaurant_id=OTHER_RESTAURANT))
    await ledger_rig.rig.publish(*mine)
    await ledger_rig.rig.publish(mine[0], mine[1])  # a second copy of two changes, as after a publish in doubt
    await ledger_rig.rig.publish(other, lane=Lane.NORMAL)
    balance = await ledger_rig.until(synced=6)
    counts = {one.restaurant_id: (one.accepted, one.synced) for one in balance.restaurants}
    assert counts == {mine[0].restaurantid: (5, 5), OTHER_RESTAURANT: (1, 1)}

    async def after_heartbeat() -> bool:
        return (await ledger_rig.balance()).until is not None

    await eventually(after_heartbeat, what="a heartbeat from every lane")


async def test_change_that_waits_in_its_lane_is_queued(ledger_rig: LedgerRig) -> None:
    await ledger_rig.rig.writer.stop()
    await ledger_rig.rig.publish(*(change(order(items=1)) for _ in range(3)))
    await ledger_rig.until(queued=3)
    await ledger_rig.another_writer().start()
    await ledger_rig.until(synced=3)


async def test_change_on_the_retry_ladder_is_retrying(make_ledger_rig: Any) -> None:
    ledger_rig: LedgerRig = await make_ledger_rig(retry_steps_ms=(60_000,))
    await ledger_rig.rig.as_owner(
        """
        create function fail() returns trigger language plpgsql as
            $$ begin raise exception 'try again' using errcode = 'serialization_failure'; end $$;
        create trigger fail before insert on menu_items for each row execute function fail();
        """
    )
    unlucky, fine = change(menu_item()), change(order(items=1))
    await ledger_rig.rig.publish(unlucky, lane=Lane.NORMAL)
    await ledger_rig.rig.publish(fine)
    await ledger_rig.until(synced=1, retrying=1)
    # Without a row in `retries`, the ledger counts the messages in the retry queue.
    await eventually(lambda: ledger_rig.rig.count("retries"), what="the retry row", until=lambda count: count == 1)
    await ledger_rig.rig.database.execute("delete from retries")
    await ledger_rig.until(synced=1, retrying=1)


async def test_dead_letter_explains_its_change_also_after_a_discard_or_an_edit(ledger_rig: LedgerRig) -> None:
    dead = [encode(traced()).replace(b'"total":', b'"total":-') for _ in range(3)]
    rig = ledger_rig.rig
    await rig.writer.stop()
    for event in dead:
        await rig.publish(event)
    await reject_all(rig.settings.rabbitmq_url, topology.lane_queue(Lane.CRITICAL), dead)
    await ledger_rig.another_writer().start()
    await rig.publish(change(order(items=1)), b'{"id": "no change at all"}')
    balance = await ledger_rig.until(synced=1, dead=3)
    assert balance.dead_outcomes == {"in_queue": 3}, (
        "dead letters that no collector has read are not counted in their queue"
    )
    assert balance.unreadable == 1
    rig.collector.start()
    dead_letters = [one for one in await rig.dead_letters(4) if one.change_id]
    assert (await ledger_rig.until(synced=1, dead=3)).dead_outcomes == {"open": 3}
    async with ledger_rig.ops.connection() as connection, connection.transaction():
        one, two, _ = dead_letters
        by: dict[str, Any] = {"why": "a test", "actor": "a tester", "role": "operator"}
        await actions.discard(connection, one.id, revision=one.revision, **by)
        edit: dict[str, Any] = {"event": {}, "difference": [], "change_id": "11111111-1111-4111-8111-111111111111"}
        await actions.replace(connection, two.id, revision=two.revision, **edit, **by)
    balance = await ledger_rig.until(synced=1, dead=3)
    assert balance.dead_outcomes == {"open": 1, "discarded": 1, "edited": 1}


async def reject_all(url: str, queue: str, events: Sequence[bytes]) -> None:
    """Rejects the messages of these events, so that the broker itself moves them to the dead-letter queue, as it does
    at the delivery limit. Returns the heartbeats between them to the queue."""
    left = {encode_batch((event,)) for event in events}
    async with await connect(url) as connection, connection.channel() as channel:
        source = await channel.get_queue(queue, ensure=False)
        while left:  # closing the channel returns the heartbeats
            message = await source.get(timeout=10)
            assert message is not None
            if message.body in left:
                left.discard(message.body)
                await message.reject(requeue=False)


async def test_change_in_a_journal_is_journaled_and_counts_once_when_it_also_waits_in_a_lane(
    ledger_rig: LedgerRig,
) -> None:
    await ledger_rig.rig.writer.stop()
    both, only_journal, only_lane = traced(), traced(), traced()
    await ledger_rig.journal(both, only_journal)
    await ledger_rig.rig.publish(both, only_lane)
    balance = await ledger_rig.until(journaled=2, queued=1)
    assert balance.journals == {"orders-1.sqlite": 2}
    await ledger_rig.another_writer().start()
    assert (await ledger_rig.until(synced=2, journaled=1)).accepted == 3


# -- unexplained changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("management", [False, True])
async def test_each_change_of_a_purged_lane_is_named_with_its_trace_and_the_command_fails(
    make_ledger_rig: Any, servers: Servers, management: bool
) -> None:
    urls = {
        "rabbitmq_management_url": servers.rabbitmq.management_url,
        "rabbitmq_watcher_url": servers.rabbitmq.management_url.replace("ticketrail:", "ticketrail_watcher:", 1),
    }
    ledger_rig: LedgerRig = await make_ledger_rig(**(urls if management else {}))

    async def unavailable() -> list[str]:  # a management API that answers too late counts as unavailable
        return (await ledger_rig.balance()).unavailable

    await eventually(
        unavailable,
        what="the list of unavailable sources",
        until=lambda found: found == ([] if management else ["management"]),
    )
    await ledger_rig.rig.publish(change(order(items=1)))
    await ledger_rig.until(synced=1)
    assert (await ledger_rig.cli("ledger", "--all", "--timeout", "1"))[0] == 0
    await ledger_rig.rig.writer.stop()
    lost = [traced() for _ in range(2)]
    await ledger_rig.rig.publish(*lost)
    async with ledger_rig.rig.channel() as channel:
        queue = await channel.get_queue(topology.lane_queue(Lane.CRITICAL), ensure=False)
        await queue.purge()
    await ledger_rig.another_writer().start()
    balance = await ledger_rig.until(synced=1, unexplained=2)
    assert {one.change_id for one in balance.missing} == {one.id for one in lost}
    timeout = [] if management else ["--timeout", "1"]
    code, out, _ = await ledger_rig.cli("ledger", *timeout)
    assert code == 1
    assert all(f"change {one.id} of {one.subject}" in out for one in lost), out
    assert TRACE in out
    if management:
        return  # the management API reports depths seconds late, and each balance waits for them
    code, out, _ = await ledger_rig.cli("ledger", "--all", "--json", *timeout)
    printed = msgspec.json.decode(out)
    assert (code, printed["accepted"], printed["synced"], printed["unexplained"]) == (1, 3, 1, 2)
    assert {one["trace_id"] for one in printed["missing"]} == {TRACE}
    # A later change was built on a lost change and has its content, so the ledger names this successor.
    await ledger_rig.rig.publish(change(order(items=1, id=lost[0].entity_id), base=lost[0]))
    balance = await ledger_rig.until(synced=2, unexplained=2)
    assert sum(one.successor is not None for one in balance.missing) == 1


async def test_row_that_is_missing_from_changes_is_named(ledger_rig: LedgerRig, servers: Servers) -> None:
    made = [traced() for _ in range(4)]
    await ledger_rig.rig.publish(*made)
    await ledger_rig.until(synced=4)
    name = ledger_rig.rig.settings.database_url.rpartition("/")[2]
    superuser = await asyncpg.connect(servers.postgres.superuser_url.rpartition("/")[0] + f"/{name}")
    await superuser.execute("delete from changes where change_id = $1", made[2].id)
    await superuser.close()
    balance = await ledger_rig.until(synced=3, unexplained=1)
    assert [(one.change_id, one.trace_id) for one in balance.missing] == [(made[2].id, TRACE)]


async def test_missing_and_damaged_journal_entries_are_named(ledger_rig: LedgerRig) -> None:
    lost, flipped, kept = traced(), traced(), traced()
    path = await ledger_rig.journal(lost, flipped, kept)
    await ledger_rig.until(journaled=3)
    with sqlite3.connect(path) as db:
        db.execute("delete from entries where seq = 1")
    balance = await ledger_rig.until(journaled=2, unexplained=1)
    assert [(one.change_id, one.seen_in) for one in balance.missing] == [(lost.id, "orders-1.sqlite")]
    code, out, _ = await ledger_rig.cli("ledger", "--timeout", "1")
    assert code == 1
    assert f"change {lost.id}" in out
    with sqlite3.connect(path) as db:
        db.execute("update entries set event = replace(event, 'Masala', 'Masalo') where seq = 2")
    assert len(await ledger_rig.journals[0].oldest(10)) == 1  # the journal notices the damage when it reads the entry
    balance = await ledger_rig.until(journaled=1, unexplained=2)
    assert {one.change_id for one in balance.missing} == {lost.id, flipped.id}


# -- under load and without backends ---------------------------------------------------------------------------------


async def test_no_change_is_unexplained_under_load_and_all_are_synced_at_the_end(
    make_ledger_rig: Any,
) -> None:
    # The timeout is long: while a batch of one consumer is delayed, another consumer passes the heartbeats behind it.
    ledger_rig: LedgerRig = await make_ledger_rig(database_timeout_seconds=15.0)
    stop = asyncio.Event()
    sent = 0

    async def load() -> None:
        nonlocal sent
        while not stop.is_set():
            await ledger_rig.rig.publish(*(change(order(items=1)) for _ in range(5)))
            await ledger_rig.rig.publish(change(menu_item()), lane=Lane.NORMAL)
            sent += 6

    loads = [asyncio.create_task(load()) for _ in range(3)]
    timeout_seconds = 6.0
    async with Ledger(ledger_rig.rig.settings, ledger_rig.ops, timeout_seconds=timeout_seconds) as ledger:

        async def synced() -> int:
            balance = await ledger.balance()
            if balance.missing:
                pytest.fail(f"reported as unexplained: {balance.missing}")
            return balance.synced

        # A change counts as unexplained only after it has been missing for the timeout.
        deadline = time.monotonic() + 2 * timeout_seconds
        while time.monotonic() < deadline:
            await synced()
        stop.set()
        await asyncio.gather(*loads)

        assert sent > 100
        await eventually(synced, within=120, what="all changes synced", until=lambda count: count == sent)


class CountingLog(AcceptedLog):
    """Notes how many changes each question to PostgreSQL is about."""

    def __init__(self, settings: Settings, ops: Postgres) -> None:
        super().__init__(settings, ops, None)
        self.asked: list[int] = []

    async def settle(self, entries: Sequence[AcceptedChange]) -> None:
        self.asked.append(len(entries))
        await super().settle(entries)


async def test_next_look_continues_reading_and_asks_for_no_change_twice(ledger_rig: LedgerRig) -> None:
    made = [change(order(items=1)) for _ in range(50)]
    await ledger_rig.rig.publish(*made)
    await ledger_rig.until(synced=50)
    settings = ledger_rig.rig.settings
    log = CountingLog(settings, ledger_rig.ops)
    async with Ledger(settings, ledger_rig.ops, timeout_seconds=TIMEOUT_SECONDS, accepted_log=log) as ledger:
        assert (await ledger.balance()).synced == 50
        assert sum(log.asked) >= 50
        log.asked.clear()
        # These five changes are counted already, so a second copy changes nothing.
        await ledger_rig.rig.publish(*made[:5])
        await ledger_rig.rig.publish(change(order(items=1)))

        async def synced() -> int:
            return (await ledger.balance()).synced

        assert await eventually(synced, what="the next change in the balance", until=lambda count: count > 50) == 51
        assert max(log.asked) <= 1


async def test_balance_begins_at_the_given_time(ledger_rig: LedgerRig) -> None:
    await ledger_rig.rig.publish(change(order(items=1)))
    await ledger_rig.until(synced=1)
    assert (await ledger_rig.balance(since=now())).accepted <= 1
    await ledger_rig.rig.publish(change(order(items=1)))
    await ledger_rig.until(synced=2)
    code, out, err = await ledger_rig.cli("ledger", "--since", "yesterday")
    assert (code, out) == (2, "")
    assert "ISO 8601" in err


async def test_change_that_is_pending_only_in_the_mirror_is_a_hint_and_not_unexplained(ledger_rig: LedgerRig) -> None:
    restaurant = f"{os.urandom(4).hex()}-1111-4111-8111-111111111111"
    state = order(items=1, restaurant_id=restaurant)
    one = change(state, time=now() - timedelta(minutes=2))  # a younger change may not be in the log yet
    await ledger_rig.rig.mirror.keep_restaurant(restaurant, b"{}")
    await ledger_rig.rig.mirror.apply([applied(one)])
    found = await ledger_rig.balance(mirror=ledger_rig.rig.mirror)
    assert one.id in {hint.change_id for hint in found.mirror_only}
    assert found.unexplained == 0
    await ledger_rig.rig.publish(one)
    await ledger_rig.until(synced=1)
    found = await ledger_rig.balance(mirror=ledger_rig.rig.mirror)
    assert one.id not in {hint.change_id for hint in found.mirror_only}


async def test_ledger_needs_postgres_and_the_command_says_so(ledger_rig: LedgerRig, servers: Servers) -> None:
    await asyncio.to_thread(servers.postgres.stop)
    try:
        with pytest.raises(Unavailable):
            await ledger_rig.balance()
        code, _, err = await ledger_rig.cli("ledger")
        assert code == 2
        assert "needs PostgreSQL" in err
    finally:
        await asyncio.to_thread(servers.postgres.start)


# -- the journal commands --------------------------------------------------------------------------------------------


async def test_show_lists_waiting_changes_of_a_running_instance_and_changes_nothing(ledger_rig: LedgerRig) -> None:
    made = [traced() for _ in range(3)]
    path = await ledger_rig.journal(*made)
    code, out, _ = await ledger_rig.cli("journal", "show", "--instance", "1")
    assert code == 0
    assert "3 changes wait (3 critical)" in out
    assert f"process {os.getpid()}" in out
    assert all(one.id in out and one.subject in out for one in made), out
    code, out, _ = await ledger_rig.cli("journal", "show", str(path), "--json", "--limit", "1")
    printed = msgspec.json.decode(out)
    assert (code, printed["count"], len(printed["entries"]), printed["lanes"]) == (0, 3, 1, {"critical": 3})
    first = printed["entries"][0]
    assert (first["change_id"], first["trace_id"], first["bytes"]) == (made[0].id, TRACE, len(encode(made[0])))
    assert first["age_seconds"] >= 0
    await ledger_rig.journals[0].append([(Lane.CRITICAL, encode(traced()))])
    assert ledger_rig.journals[0].depth == 4


async def test_drain_is_refused_for_a_running_instance_and_publishes_an_orphaned_journal(
    ledger_rig: LedgerRig,
) -> None:
    made = [traced() for _ in range(300)]
    dish = change(menu_item())
    path = await ledger_rig.journal(*made)
    await ledger_rig.journals[0].append([(Lane.NORMAL, encode(dish))])
    code, _, err = await ledger_rig.cli("journal", "drain", "--instance", "1")
    assert code == 1
    assert "the instance of this journal runs" in err
    assert ledger_rig.journals[0].depth == 301
    await ledger_rig.journals[0].close()
    code, out, _ = await ledger_rig.cli("journal", "drain", "--instance", "1")
    assert (code, out) == (0, f"301 changes published (300 critical, 1 normal), 0 left in {path}\n")
    await ledger_rig.rig.written(*made, dish)
    await ledger_rig.until(synced=301)
    code, out, _ = await ledger_rig.cli("journal", "drain", str(path), "--json")
    assert (code, msgspec.json.decode(out)["published"]) == (0, 0)
    with Lease.take(path.parent, "orders", 1, within=0.0):
        pass


async def test_drain_without_a_broker_keeps_all_entries_and_says_so(ledger_rig: LedgerRig, servers: Servers) -> None:
    path = await ledger_rig.journal(traced())
    await ledger_rig.journals[0].close()
    url = ledger_rig.rig.settings.rabbitmq_url
    ledger_rig.rig.settings = ledger_rig.rig.settings.model_copy(
        update={"rabbitmq_url": "amqp://nobody:here@127.0.0.1:1/"}
    )
    code, out, err = await ledger_rig.cli("journal", "drain", str(path))
    ledger_rig.rig.settings = ledger_rig.rig.settings.model_copy(update={"rabbitmq_url": url})
    assert code == 1
    assert "0 changes published (none), 1 left" in out
    assert "RabbitMQ does not accept the entries" in err
    await ledger_rig.until(journaled=1)


async def test_show_names_the_damaged_entry_of_a_journal_and_drain_publishes_the_others(ledger_rig: LedgerRig) -> None:
    made = [traced(notes=f"{n:0400}") for n in range(30)]
    path = await ledger_rig.journal(*made)
    await ledger_rig.journals[0].close()
    data = bytearray(path.read_bytes())
    data[data.index(f'"notes":"{7:0400}'.encode()) + 40] ^= 1
    path.write_bytes(bytes(data))
    code, out, _ = await ledger_rig.cli("journal", "show", str(path))
    assert code == 1
    assert f"damaged: change {made[7].id} of {made[7].subject}" in out
    code, out, err = await ledger_rig.cli("journal", "drain", str(path))
    assert code == 1
    assert "29 changes published" in out
    assert "1 damaged entries were not published" in err
    assert "the file was damaged and set aside" in err
    balance = await ledger_rig.until(synced=29, unexplained=1)
    assert [one.change_id for one in balance.missing] == [made[7].id]
    [aside] = files_aside(path)
    assert aside.read_bytes() == bytes(data)
    assert (await ledger_rig.cli("journal", "drain", str(aside)))[0] == 1


async def test_drain_exits_with_1_if_it_sets_a_file_aside_although_every_entry_is_published(
    ledger_rig: LedgerRig,
) -> None:
    path = await ledger_rig.journal(traced())
    await ledger_rig.journals[0].close()
    path.write_bytes(b"destroyed header" + path.read_bytes()[16:])
    code, out, err = await ledger_rig.cli("journal", "drain", str(path))
    assert (code, len(files_aside(path))) == (1, 1)
    assert "1 changes published" in out
    assert "the file was damaged and set aside" in err
    assert "damaged entries" not in err
    assert (await ledger_rig.cli("journal", "drain", str(path)))[0] == 0
