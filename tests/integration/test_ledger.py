"""The ledger on real servers: changes in each place that it counts, and changes that were removed and must be named."""

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from services.sync.dead_letters import actions
from services.sync.ledger.balance import PLACES, Balance
from services.sync.ledger.ledger import Ledger, take_balance
from services.sync.writer.postgres_writer import PostgresWriter
from shared.entities.contract import Change, Lane, encode, now
from shared.entities.order import ENTITY as ORDER
from shared.errors import Unavailable
from shared.messaging import topology
from shared.mirror.mirror import Apply
from shared.observability.metrics import Metrics, WriterMetrics
from shared.postgres.pool import Postgres
from shared.rail.instance import Lease
from shared.rail.journal import Journal
from shared.rail.set_aside import files_aside
from tests.rigs import zygote
from tests.rigs.builders import OTHER_RESTAURANT, change, menu_item, order
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
TIMEOUT_SECONDS = 1.0


class Books:
    """A rig of the PostgreSQL writer with heartbeats and a folder for journals, and its ledger."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ops = Postgres(rig.settings.database_ops_url, rig.settings, size=2)
        self.journals: list[Journal] = []

    async def balance(self, **options: Any) -> Balance:
        """Takes a balance; fails when it does not add up or an unexplained change has no name."""
        found = await take_balance(self.rig.settings, self.ops, **{"timeout_seconds": TIMEOUT_SECONDS, **options})
        wrong = [
            name
            for name in ("accepted", *PLACES)
            if getattr(found, name) != sum(getattr(one, name) for one in found.restaurants)
        ]
        # Every balance must add up. `pytest.fail`, because `until` retries after an AssertionError.
        if wrong or found.accepted != sum(getattr(found, place) for place in PLACES):
            pytest.fail(f"does not add up: {wrong} {found}")
        if found.unexplained != len(found.missing):
            pytest.fail(f"unexplained changes without a name: {found}")
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
            *(rig.settings, rig.postgres, rig.mirror, rig.publisher, rig.watch, rig.tracer, WriterMetrics(Metrics()))
        )
        return rig.writer


@pytest.fixture
async def make_books(make_rig: MakeRig, tmp_path: Path) -> AsyncIterator[Any]:
    made: list[Books] = []

    async def make(**settings: Any) -> Books:
        # By default without the management API, because its figures are seconds old.
        urls = {"rabbitmq_management_url": "", "rabbitmq_watcher_url": ""}
        books = Books(await make_rig(home=tmp_path, **{**urls, **settings}))
        made.append(books)
        await books.rig.writer.start()
        await books.rig.heartbeats.start()
        return books

    yield make
    for books in made:
        for journal in books.journals:
            await journal.close()
        await books.ops.close()


@pytest.fixture
async def books(make_books: Any) -> Books:
    made: Books = await make_books()
    return made


def traced(**fields: Any) -> Change:
    return change(order(items=1, **fields), traceparent=f"00-{TRACE}-b7ad6b7169203331-01")


# -- the places that explain a change --------------------------------------------------------------------------------


async def test_written_changes_count_once_as_synced_for_each_restaurant(books: Books) -> None:
    mine = [change(order(items=1)) for _ in range(5)]
    other = change(menu_item(restaurant_id=OTHER_RESTAURANT))
    await books.rig.publish(*mine)
    await books.rig.publish(mine[0], mine[1])  # a second copy, as after a publish in doubt
    await books.rig.publish(other, lane=Lane.NORMAL)
    balance = await books.until(synced=6)
    counts = {one.restaurant_id: (one.accepted, one.synced) for one in balance.restaurants}
    assert counts == {mine[0].restaurantid: (5, 5), OTHER_RESTAURANT: (1, 1)}

    async def after_heartbeat() -> bool:
        return (await books.balance()).until is not None

    await eventually(after_heartbeat, what="a heartbeat from every lane")


async def test_change_that_waits_in_its_lane_is_queued(books: Books) -> None:
    await books.rig.writer.stop()
    await books.rig.publish(*(change(order(items=1)) for _ in range(3)))
    await books.until(queued=3)
    await books.another_writer().start()
    await books.until(synced=3)


async def test_change_on_the_retry_ladder_is_retrying(make_books: Any) -> None:
    books: Books = await make_books(retry_steps_ms=(60_000,))
    await books.rig.as_owner(
        """
        create function fail() returns trigger language plpgsql as
            $$ begin raise exception 'try again' using errcode = 'serialization_failure'; end $$;
        create trigger fail before insert on menu_items for each row execute function fail();
        """
    )
    unlucky, fine = change(menu_item()), change(order(items=1))
    await books.rig.publish(unlucky, lane=Lane.NORMAL)
    await books.rig.publish(fine)
    await books.until(synced=1, retrying=1)
    # Without a row in `retries`, the ledger counts the messages in the retry queue.
    await eventually(lambda: books.rig.count("retries"), what="noted", until=lambda count: count == 1)
    await books.rig.database.execute("delete from retries")
    await books.until(synced=1, retrying=1)


async def test_dead_letter_explains_its_change_also_after_a_discard_or_an_edit(books: Books) -> None:
    dead = [encode(traced()).replace(b'"total":', b'"total":-') for _ in range(3)]
    await books.rig.publish(*dead, change(order(items=1)), b'{"id": "no change at all"}')
    balance = await books.until(synced=1, dead=3)
    assert balance.dead_outcomes == {"in_queue": 3}, "no collector has read the dead-letter queue yet"
    assert balance.unreadable == 1
    books.rig.collector.start()
    dead_letters = [one for one in await books.rig.dead_letters(4) if one.change_id]
    assert (await books.until(synced=1, dead=3)).dead_outcomes == {"open": 3}
    async with books.ops.connection() as connection, connection.transaction():
        one, two, _ = dead_letters
        by = {"why": "a test", "actor": "a tester", "role": "operator"}
        await actions.discard(connection, one.id, revision=one.revision, **by)
        edit = {"event": {}, "difference": [], "change_id": "11111111-1111-4111-8111-111111111111"}
        await actions.replace(connection, two.id, revision=two.revision, **edit, **by)  # type: ignore[arg-type]
    balance = await books.until(synced=1, dead=3)
    assert balance.dead_outcomes == {"open": 1, "discarded": 1, "edited": 1}


async def test_change_in_a_journal_is_journaled_and_counts_once_when_it_also_waits_in_a_lane(books: Books) -> None:
    await books.rig.writer.stop()
    both, only_journal, only_lane = traced(), traced(), traced()
    await books.journal(both, only_journal)
    await books.rig.publish(both, only_lane)
    balance = await books.until(journaled=2, queued=1)
    assert balance.journals == {"orders-1.sqlite": 2}
    await books.another_writer().start()
    assert (await books.until(synced=2, journaled=1)).accepted == 3


# -- unexplained changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("management", [False, True])
async def test_each_change_of_a_purged_lane_is_named_with_its_trace_and_the_command_fails(
    make_books: Any, servers: Servers, management: bool
) -> None:
    urls = {
        "rabbitmq_management_url": servers.rabbitmq.management_url,
        "rabbitmq_watcher_url": servers.rabbitmq.management_url.replace("ticketrail:", "ticketrail_watcher:", 1),
    }
    books: Books = await make_books(**(urls if management else {}))

    async def unavailable() -> list[str]:  # a management API that answers late counts as unavailable
        return (await books.balance()).away

    await eventually(
        unavailable,
        what="the list of unavailable sources",
        until=lambda found: found == ([] if management else ["management"]),
    )
    await books.rig.publish(change(order(items=1)))
    await books.until(synced=1)
    assert (await books.cli("ledger", "--all", "--timeout", "1"))[0] == 0
    await books.rig.writer.stop()
    lost = [traced() for _ in range(2)]
    await books.rig.publish(*lost)
    async with books.rig.channel() as channel:
        queue = await channel.get_queue(topology.lane_queue(Lane.CRITICAL), ensure=False)
        await queue.purge()
    await books.another_writer().start()
    balance = await books.until(synced=1, unexplained=2)
    assert {one.change_id for one in balance.missing} == {one.id for one in lost}
    timeout = [] if management else ["--timeout", "1"]
    code, out, _ = await books.cli("ledger", *timeout)
    assert code == 1
    assert all(f"change {one.id} of {one.subject}" in out for one in lost), out
    assert TRACE in out
    if management:
        return  # the management API reports depths seconds late, and each balance waits for them
    code, out, _ = await books.cli("ledger", "--all", "--json", *timeout)
    printed = msgspec.json.decode(out)
    assert (code, printed["accepted"], printed["synced"], printed["unexplained"]) == (1, 3, 1, 2)
    assert {one["trace_id"] for one in printed["missing"]} == {TRACE}
    # A later change was built on a lost one, so its content is not lost: the ledger names this successor.
    await books.rig.publish(change(order(items=1, id=lost[0].entity_id), base=lost[0]))
    balance = await books.until(synced=2, unexplained=2)
    assert sum(one.successor is not None for one in balance.missing) == 1


async def test_row_that_is_missing_from_changes_is_named(books: Books, servers: Servers) -> None:
    made = [traced() for _ in range(4)]
    await books.rig.publish(*made)
    await books.until(synced=4)
    name = books.rig.settings.database_url.rpartition("/")[2]
    superuser = await asyncpg.connect(servers.postgres.superuser_url.rpartition("/")[0] + f"/{name}")
    await superuser.execute("delete from changes where change_id = $1", made[2].id)
    await superuser.close()
    balance = await books.until(synced=3, unexplained=1)
    assert [(one.change_id, one.trace_id) for one in balance.missing] == [(made[2].id, TRACE)]


async def test_missing_and_damaged_journal_entries_are_named(books: Books) -> None:
    lost, flipped, kept = traced(), traced(), traced()
    path = await books.journal(lost, flipped, kept)
    await books.until(journaled=3)
    with sqlite3.connect(path) as db:
        db.execute("delete from entries where seq = 1")
    balance = await books.until(journaled=2, unexplained=1)
    assert [(one.change_id, one.seen_in) for one in balance.missing] == [(lost.id, "orders-1.sqlite")]
    code, out, _ = await books.cli("ledger", "--timeout", "1")
    assert code == 1
    assert f"change {lost.id}" in out
    with sqlite3.connect(path) as db:
        db.execute("update entries set event = replace(event, 'Masala', 'Masalo') where seq = 2")
    assert len(await books.journals[0].oldest(10)) == 1  # reading finds the damage
    balance = await books.until(journaled=1, unexplained=2)
    assert {one.change_id for one in balance.missing} == {lost.id, flipped.id}


# -- under load and without backends ---------------------------------------------------------------------------------


async def test_no_change_is_unexplained_under_load_and_all_are_synced_at_the_end(
    make_books: Any,
) -> None:
    # A long timeout: while a batch of one consumer is delayed, another consumer passes the heartbeats behind it.
    books: Books = await make_books(database_timeout_seconds=15.0)
    stop = asyncio.Event()
    sent = 0

    async def load() -> None:
        nonlocal sent
        while not stop.is_set():
            await books.rig.publish(*(change(order(items=1)) for _ in range(5)))
            await books.rig.publish(change(menu_item()), lane=Lane.NORMAL)
            sent += 6

    loads = [asyncio.create_task(load()) for _ in range(3)]
    timeout_seconds = 6.0
    async with Ledger(books.rig.settings, books.ops, timeout_seconds=timeout_seconds) as ledger:

        async def synced() -> int:
            balance = await ledger.look()
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
        await eventually(synced, within=120, what="all synced", until=lambda count: count == sent)


async def test_next_look_continues_reading_and_asks_for_no_change_twice(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [change(order(items=1)) for _ in range(50)]
    await books.rig.publish(*made)
    await books.until(synced=50)
    async with Ledger(books.rig.settings, books.ops, timeout_seconds=TIMEOUT_SECONDS) as ledger:
        assert (await ledger.look()).synced == 50
        asked: list[int] = []
        settle = ledger._log.settle

        async def counted(entries: Any) -> None:
            asked.append(len(entries))
            await settle(entries)

        monkeypatch.setattr(ledger._log, "settle", counted)
        await books.rig.publish(*made[:5])  # they are counted already
        await books.rig.publish(change(order(items=1)))

        async def synced() -> int:
            return (await ledger.look()).synced

        assert await eventually(synced, what="the next one", until=lambda count: count > 50) == 51
        assert max(asked) <= 1


async def test_balance_begins_at_the_given_time(books: Books) -> None:
    await books.rig.publish(change(order(items=1)))
    await books.until(synced=1)
    assert (await books.balance(since=now())).accepted <= 1
    await books.rig.publish(change(order(items=1)))
    await books.until(synced=2)
    code, out, err = await books.cli("ledger", "--since", "yesterday")
    assert (code, out) == (2, "")
    assert "ISO 8601" in err


async def test_change_that_is_pending_only_in_the_mirror_is_a_hint_and_not_unexplained(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    from services.sync.ledger import sources

    restaurant = f"{os.urandom(4).hex()}-1111-4111-8111-111111111111"
    state = order(items=1, restaurant_id=restaurant)
    one = change(state)
    await books.rig.mirror.keep_restaurant(restaurant, b"{}")
    await books.rig.mirror.apply([Apply(ORDER, state, one.head, bytes(one.data.after), one.time)])
    monkeypatch.setattr(sources, "_MIN_PENDING_AGE", sources._MIN_PENDING_AGE * 0)
    found = await books.balance(mirror=books.rig.mirror)
    assert one.id in {hint.change_id for hint in found.mirror_only}
    assert found.unexplained == 0
    await books.rig.publish(one)
    await books.until(synced=1)
    found = await books.balance(mirror=books.rig.mirror)
    assert one.id not in {hint.change_id for hint in found.mirror_only}


async def test_ledger_needs_postgres_and_the_command_says_so(books: Books, servers: Servers) -> None:
    await asyncio.to_thread(servers.postgres.stop)
    try:
        with pytest.raises(Unavailable):
            await books.balance()
        code, _, err = await books.cli("ledger")
        assert code == 2
        assert "needs PostgreSQL" in err
    finally:
        await asyncio.to_thread(servers.postgres.start)


# -- the journal commands --------------------------------------------------------------------------------------------


async def test_show_lists_waiting_changes_of_a_running_instance_and_changes_nothing(books: Books) -> None:
    made = [traced() for _ in range(3)]
    path = await books.journal(*made)
    code, out, _ = await books.cli("journal", "show", "--instance", "1")
    assert code == 0
    assert "3 changes wait (3 critical)" in out
    assert f"process {os.getpid()}" in out
    assert all(one.id in out and one.subject in out for one in made), out
    code, out, _ = await books.cli("journal", "show", str(path), "--json", "--limit", "1")
    printed = msgspec.json.decode(out)
    assert (code, printed["count"], len(printed["entries"]), printed["lanes"]) == (0, 3, 1, {"critical": 3})
    first = printed["entries"][0]
    assert (first["change_id"], first["trace_id"], first["bytes"]) == (made[0].id, TRACE, len(encode(made[0])))
    assert first["age_seconds"] >= 0
    await books.journals[0].append([(Lane.CRITICAL, encode(traced()))])
    assert books.journals[0].depth == 4


async def test_drain_is_refused_for_a_running_instance_and_publishes_an_orphaned_journal(
    books: Books,
) -> None:
    made = [traced() for _ in range(300)]
    dish = change(menu_item())
    path = await books.journal(*made)
    await books.journals[0].append([(Lane.NORMAL, encode(dish))])
    code, _, err = await books.cli("journal", "drain", "--instance", "1")
    assert code == 1
    assert "its instance runs" in err
    assert books.journals[0].depth == 301
    await books.journals[0].close()
    code, out, _ = await books.cli("journal", "drain", "--instance", "1")
    assert (code, out) == (0, f"301 changes published (300 critical, 1 normal), 0 left in {path}\n")
    await books.rig.written(*made, dish)
    await books.until(synced=301)
    code, out, _ = await books.cli("journal", "drain", str(path), "--json")
    assert (code, msgspec.json.decode(out)["published"]) == (0, 0)
    with Lease.take(path.parent, "orders", 1, within=0.0):
        pass


async def test_drain_without_a_broker_keeps_all_entries_and_says_so(books: Books, servers: Servers) -> None:
    path = await books.journal(traced())
    await books.journals[0].close()
    url = books.rig.settings.rabbitmq_url
    books.rig.settings = books.rig.settings.model_copy(update={"rabbitmq_url": "amqp://nobody:here@127.0.0.1:1/"})
    code, out, err = await books.cli("journal", "drain", str(path))
    books.rig.settings = books.rig.settings.model_copy(update={"rabbitmq_url": url})
    assert code == 1
    assert "0 changes published (none), 1 left" in out
    assert "RabbitMQ does not accept them" in err
    await books.until(journaled=1)


async def test_show_names_the_damaged_entry_of_a_journal_and_drain_publishes_the_others(books: Books) -> None:
    made = [traced(notes=f"{n:0400}") for n in range(30)]
    path = await books.journal(*made)
    await books.journals[0].close()
    data = bytearray(path.read_bytes())
    data[data.index(f'"notes":"{7:0400}'.encode()) + 40] ^= 1
    path.write_bytes(bytes(data))
    code, out, _ = await books.cli("journal", "show", str(path))
    assert code == 1
    assert f"damaged: change {made[7].id} of {made[7].subject}" in out
    code, out, err = await books.cli("journal", "drain", str(path))
    assert code == 1
    assert "29 changes published" in out
    assert "1 damaged entries were not published" in err
    assert "the file was damaged and set aside" in err
    balance = await books.until(synced=29, unexplained=1)
    assert [one.change_id for one in balance.missing] == [made[7].id]
    [aside] = files_aside(path)
    assert aside.read_bytes() == bytes(data)
    assert (await books.cli("journal", "drain", str(aside)))[0] == 1
