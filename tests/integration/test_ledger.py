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
from services.sync.ledger.ledger_loop import LedgerLoop
from services.sync.ledger.report import Ledger, take_report
from services.sync.ledger.report_shapes import PLACES, LedgerReport, OpenChange
from services.sync.ledger.session import Patience
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

    async def report(self, **options: Any) -> LedgerReport:
        """Takes a report; fails if it does not add up or does not name every open change that it counts."""
        return self.checked(
            await take_report(self.rig.settings, self.ops, **{"timeout_seconds": TIMEOUT_SECONDS, **options})
        )

    def checked(self, found: LedgerReport) -> LedgerReport:
        # Every report must add up. This calls `pytest.fail`, because `until` retries after an AssertionError.
        if found.accepted != sum(getattr(found, place) for place in PLACES):
            pytest.fail(f"the report does not add up: {found}")
        for place in (*PLACES[1:], "only_in_postgres"):
            if getattr(found, place) != sum(one.place == place for one in found.open):
                pytest.fail(f"the report does not name every change that is {place}: {found}")
        return found

    async def until(self, **expected: int) -> LedgerReport:
        """Waits for a report that has exactly these counts, apart from `accepted`; returns it."""

        async def look() -> dict[str, int]:
            self.last = await self.report()
            return {name: count for name in PLACES if (count := getattr(self.last, name))}

        await eventually(look, within=40, what=f"a report of {expected}", until=lambda seen: seen == expected)
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


def unexplained(report: LedgerReport) -> list[OpenChange]:
    return [one for one in report.open if one.place == "unexplained"]


def traced(**fields: Any) -> Change:
    return change(order(items=1, **fields), traceparent=f"00-{TRACE}-b7ad6b7169203331-01")


# -- the places that explain a change --------------------------------------------------------------------------------


async def test_written_changes_count_once_as_synced(ledger_rig: LedgerRig) -> None:
    mine = [change(order(items=1)) for _ in range(5)]
    other = change(menu_item(restaurant_id=OTHER_RESTAURANT))
    await ledger_rig.rig.publish(*mine)
    await ledger_rig.rig.publish(mine[0], mine[1])  # a second copy of two changes, as after a publish in doubt
    await ledger_rig.rig.publish(other, lane=Lane.NORMAL)
    report = await ledger_rig.until(synced=6)
    assert report.since is None


async def test_change_that_waits_in_its_lane_is_queued(ledger_rig: LedgerRig) -> None:
    await ledger_rig.rig.writer.stop()
    made = [change(order(items=1)) for _ in range(3)]
    await ledger_rig.rig.publish(*made)
    waiting = await ledger_rig.until(queued=3)
    assert {one.change_id for one in waiting.open} == {one.id for one in made}
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
    # Without a row in `retries`, the message in the retry queue keeps the change from being unexplained.
    await eventually(lambda: ledger_rig.rig.count("retries"), what="the retry row", until=lambda count: count == 1)
    await ledger_rig.rig.database.execute("delete from retries")
    await ledger_rig.until(synced=1, queued=1)
    await ledger_rig.rig.heartbeats.loop.turn_after(ledger_rig.rig.heartbeats.loop.turns + 1)
    await ledger_rig.until(synced=1, queued=1)


async def test_dead_letter_explains_its_change_also_after_a_discard_or_an_edit(ledger_rig: LedgerRig) -> None:
    dead = [encode(traced()).replace(b'"total":', b'"total":-') for _ in range(3)]
    rig = ledger_rig.rig
    await rig.writer.stop()
    for event in dead:
        await rig.publish(event)
    await reject_all(rig.settings.rabbitmq_url, topology.lane_queue(Lane.CRITICAL), dead)
    await ledger_rig.another_writer().start()
    await rig.publish(change(order(items=1)), b'{"id": "no change at all"}')
    report = await ledger_rig.until(synced=1, queued=3)  # in the dead-letter queue, which nobody has collected
    assert report.unreadable == 1
    rig.collector.start()
    dead_letters = [one for one in await rig.dead_letters(4) if one.change_id]
    assert (await ledger_rig.until(synced=1, dead=3)).dead_outcomes == {"open": 3}
    async with ledger_rig.ops.connection() as connection, connection.transaction():
        one, two, _ = dead_letters
        by: dict[str, Any] = {"why": "a test", "actor": "a tester", "role": "operator"}
        await actions.discard(connection, one.id, revision=one.revision, **by)
        edit: dict[str, Any] = {"event": {}, "difference": [], "change_id": "11111111-1111-4111-8111-111111111111"}
        await actions.replace(connection, two.id, revision=two.revision, **edit, **by)
    report = await ledger_rig.until(synced=1, dead=3)
    assert report.dead_outcomes == {"open": 1, "discarded": 1, "edited": 1}


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
    report = await ledger_rig.until(journaled=2, queued=1)
    assert report.journals == {"orders-1.sqlite": 2}
    await ledger_rig.another_writer().start()
    assert (await ledger_rig.until(synced=2, journaled=1)).accepted == 3


# -- unexplained changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("management", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_each_change_of_a_purged_lane_is_named_with_its_trace_and_the_command_fails(
    make_ledger_rig: Any, servers: Servers, management: bool
) -> None:
    urls = {
        "rabbitmq_management_url": servers.rabbitmq.management_url,
        "rabbitmq_watcher_url": servers.rabbitmq.management_url.replace("ticketrail:", "ticketrail_watcher:", 1),
    }
    ledger_rig: LedgerRig = await make_ledger_rig(**(urls if management else {}))

    async def unavailable() -> list[str]:  # a management API that answers too late counts as unavailable
        return (await ledger_rig.report()).unavailable

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
    report = await ledger_rig.until(synced=1, unexplained=2)
    assert {one.change_id for one in unexplained(report)} == {one.id for one in lost}
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
    assert {one["trace_id"] for one in printed["open"]} == {TRACE}


async def test_row_that_is_missing_from_changes_is_named(ledger_rig: LedgerRig, servers: Servers) -> None:
    made = [traced() for _ in range(4)]
    await ledger_rig.rig.publish(*made)
    await ledger_rig.until(synced=4)
    await delete_changes(ledger_rig, servers, made[2])
    report = await ledger_rig.until(synced=3, unexplained=1)
    assert [(one.change_id, one.trace_id) for one in unexplained(report)] == [(made[2].id, TRACE)]


async def test_missing_and_damaged_journal_entries_are_named(ledger_rig: LedgerRig) -> None:
    lost, flipped, kept = traced(), traced(), traced()
    path = await ledger_rig.journal(lost, flipped, kept)
    await ledger_rig.until(journaled=3)
    with sqlite3.connect(path) as db:
        db.execute("delete from entries where seq = 1")
    report = await ledger_rig.until(journaled=2, unexplained=1)
    assert [(one.change_id, one.seen_in) for one in unexplained(report)] == [(lost.id, "orders-1.sqlite")]
    code, out, _ = await ledger_rig.cli("ledger", "--timeout", "1")
    assert code == 1
    assert f"change {lost.id}" in out
    with sqlite3.connect(path) as db:
        db.execute("update entries set event = replace(event, 'Masala', 'Masalo') where seq = 2")
    assert len(await ledger_rig.journals[0].oldest(10)) == 1  # the journal notices the damage when it reads the entry
    report = await ledger_rig.until(journaled=1, unexplained=2)
    assert {one.change_id for one in unexplained(report)} == {lost.id, flipped.id}


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
            report = ledger_rig.checked(await ledger.report())
            if report.unexplained or report.only_in_postgres:
                pytest.fail(f"reported although nothing is lost: {report.open}")
            return report.synced

        # A change counts as unexplained only after it has been missing for the timeout.
        deadline = time.monotonic() + 2 * timeout_seconds
        while time.monotonic() < deadline:
            await synced()
        stop.set()
        await asyncio.gather(*loads)

        assert sent > 100
        await eventually(synced, within=120, what="all changes synced", until=lambda count: count == sent)


async def test_next_report_reads_only_new_changes(ledger_rig: LedgerRig, servers: Servers) -> None:
    made = [change(order(items=1)) for _ in range(50)]
    await ledger_rig.rig.publish(*made)
    await ledger_rig.until(synced=50)
    # The test deletes most of `made` below, but not this change: the feed proves its position by the last row it read.
    await ledger_rig.rig.publish(change(order(items=1)))
    await ledger_rig.until(synced=51)
    async with Ledger(ledger_rig.rig.settings, ledger_rig.ops, timeout_seconds=TIMEOUT_SECONDS) as ledger:
        assert (await ledger.report()).synced == 51
        # These five changes are counted already, so a second copy changes nothing.
        await ledger_rig.rig.publish(*made[:5])
        await ledger_rig.rig.publish(change(order(items=1)))
        await delete_changes(ledger_rig, servers, *made[5:])  # a second reading would miss them

        async def synced() -> int:
            return ledger_rig.checked(await ledger.report()).synced

        assert await eventually(synced, what="the next change in the report", until=lambda count: count > 51) == 52


async def delete_changes(ledger_rig: LedgerRig, servers: Servers, *changes: Change) -> None:
    name = ledger_rig.rig.settings.database_url.rpartition("/")[2]
    superuser = await asyncpg.connect(servers.postgres.superuser_url.rpartition("/")[0] + f"/{name}")
    await superuser.execute("delete from changes where change_id = any($1::uuid[])", [one.id for one in changes])
    await superuser.close()


async def test_report_begins_at_a_checkpoint_and_still_names_every_open_change(ledger_rig: LedgerRig) -> None:
    rig = ledger_rig.rig
    before, lost = change(order(items=1)), change(order(items=1))
    await rig.publish(before)
    await ledger_rig.until(synced=1)
    await rig.writer.stop()
    await rig.publish(lost)
    async with rig.channel() as channel:
        await (await channel.get_queue(topology.lane_queue(Lane.CRITICAL), ensure=False)).purge()
    await ledger_rig.another_writer().start()
    leader = LedgerLoop(rig.settings, rig.postgres, rig.publisher, patience=Patience(look_up=3_600))
    leader.start()
    try:

        async def checkpoint() -> LedgerReport:
            return await ledger_rig.report(since=now() + timedelta(minutes=1))

        report = await eventually(
            checkpoint,
            within=30,
            what="a checkpoint",
            until=lambda found: bool(found.since and found.unexplained),
        )
        await rig.publish(change(order(items=1)))
        report = await eventually(checkpoint, what="the next change", until=lambda found: found.synced > 0)
    finally:
        await leader.stop()
    assert report.synced == 1, "the change before the checkpoint counts again"
    assert [one.change_id for one in unexplained(report)] == [lost.id]
    assert report.leader is not None
    assert report.leader.log_low < report.leader.log_at
    assert report.alarms == ["unexplained"]
    code, out, err = await ledger_rig.cli("ledger", "--since", "yesterday")
    assert (code, out) == (2, "")
    assert "ISO 8601" in err


@pytest.mark.slow  # the ledger waits for what may still come
async def test_change_that_the_log_lacks_is_named(ledger_rig: LedgerRig) -> None:
    made = change(order(items=1))
    await ledger_rig.rig.publisher.publish_to_queue(
        topology.lane_queue(Lane.CRITICAL), encode_batch((encode(made),)), timeout=10
    )
    await ledger_rig.rig.written(made)
    report = await ledger_rig.until(synced=1)
    assert [(one.place, one.change_id) for one in report.open] == [("only_in_postgres", made.id)]
    code, out, _ = await ledger_rig.cli("ledger", "--all")
    assert (code, f"only in postgres: change {made.id}" in out) == (0, True), out


async def test_old_checkpoint_is_an_alarm(ledger_rig: LedgerRig) -> None:
    await ledger_rig.rig.database.execute(
        "insert into checkpoints (log_low, log_low_crc, log_at, log_at_crc, feed_xid, feed_seq, at)"
        " values (-1, 0, -1, 0, '0', 0, now() - interval '6 minutes')"
    )
    assert (await ledger_rig.report()).alarms == ["age"]
    code, out, _ = await ledger_rig.cli("ledger")
    assert code == 0
    assert "no worker compares" in out


async def test_change_that_is_pending_only_in_the_mirror_is_a_hint_and_not_unexplained(ledger_rig: LedgerRig) -> None:
    restaurant = f"{os.urandom(4).hex()}-1111-4111-8111-111111111111"
    state = order(items=1, restaurant_id=restaurant)
    one = change(state, time=now() - timedelta(minutes=2))  # a younger change may not be in the log yet
    await ledger_rig.rig.mirror.keep_restaurant(restaurant, b"{}")
    await ledger_rig.rig.mirror.apply([applied(one)])
    found = await ledger_rig.report(mirror=ledger_rig.rig.mirror)
    assert one.id in {hint.change_id for hint in found.mirror_only}
    assert found.unexplained == 0
    await ledger_rig.rig.publish(one)
    await ledger_rig.until(synced=1)
    found = await ledger_rig.report(mirror=ledger_rig.rig.mirror)
    assert one.id not in {hint.change_id for hint in found.mirror_only}


async def test_ledger_needs_postgres_and_the_command_says_so(ledger_rig: LedgerRig, servers: Servers) -> None:
    await asyncio.to_thread(servers.postgres.stop)
    try:
        with pytest.raises(Unavailable):
            await ledger_rig.report()
        code, _, err = await ledger_rig.cli("ledger")
        assert code == 2
        assert err.startswith("Error: postgres is away: ")
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
    report = await ledger_rig.until(synced=29, unexplained=1)
    assert [one.change_id for one in unexplained(report)] == [made[7].id]
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


async def test_ledger_prints_one_line_for_each_backend_that_is_away(ledger_rig: LedgerRig) -> None:
    settings = ledger_rig.rig.settings
    nobody = "127.0.0.1:9"
    ledger_rig.rig.settings = settings.model_copy(
        update={"database_ops_url": f"postgresql://nobody:x@{nobody}/none", "rabbitmq_url": f"amqp://x:x@{nobody}/"}
    )
    try:
        code, out, err = await ledger_rig.cli("ledger")
        assert (code, out) == (2, "")
        postgres, rabbitmq = err.splitlines()
        assert postgres.startswith("Error: postgres is away: ConnectionRefusedError")
        assert rabbitmq.startswith("Error: rabbitmq is away: ")
        ledger_rig.rig.settings = settings.model_copy(update={"redis_url": f"redis://{nobody}/0"})
        code, out, err = await ledger_rig.cli("ledger")
        assert (code, err) == (0, "")
        assert [line for line in out.splitlines() if "mirror" in line] == ["unavailable: mirror"]
    finally:
        ledger_rig.rig.settings = settings
