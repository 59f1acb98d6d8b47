"""The ledger on real servers: each place a change can be in, made for real; and what is taken away is named."""

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
PATIENCE = 1.0


class Books:
    """A writer's rig with heartbeats, a folder for journals, and the ledger over it."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ops = Postgres(rig.settings.database_ops_url, rig.settings, size=2)
        self.journals: list[Journal] = []

    async def balance(self, **options: Any) -> Balance:
        found = await take_balance(self.rig.settings, self.ops, **{"timeout_seconds": PATIENCE, **options})
        wrong = [
            name
            for name in ("accepted", *PLACES)
            if getattr(found, name) != sum(getattr(one, name) for one in found.restaurants)
        ]
        # At every moment: not an assertion, which `until` would take for a balance that comes too early.
        if wrong or found.accepted != sum(getattr(found, place) for place in PLACES):
            pytest.fail(f"does not add up: {wrong} {found}")
        if found.unexplained != len(found.missing):
            pytest.fail(f"unexplained, and not named: {found}")
        return found

    async def until(self, **wanted: int) -> Balance:
        """A balance with these counts, and no others but those that are accepted."""

        async def look() -> dict[str, int]:
            self.last = await self.balance()
            return {name: count for name in PLACES if (count := getattr(self.last, name))}

        await eventually(look, within=40, what=f"a balance of {wanted}", until=lambda seen: seen == wanted)
        return self.last

    async def journal(self, *changes: Change, number: int = 1) -> Path:
        path = self.rig.settings.journal_folder / f"orders-{number}.sqlite"
        journal = Journal(path, instance=number, max_bytes=1 << 20)
        self.journals.append(journal)
        await journal.open()
        await journal.append([(Lane.CRITICAL, encode(one)) for one in changes])
        return path

    async def cli(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, what it printed, what it said beside)"""
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
        # By default without the management API, whose figures are seconds old.
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


# -- every place -----------------------------------------------------------------------------------------------------


async def test_what_is_written_is_synced_restaurant_by_restaurant_and_each_change_counts_once(books: Books) -> None:
    mine = [change(order(items=1)) for _ in range(5)]
    other = change(menu_item(restaurant_id=OTHER_RESTAURANT))
    await books.rig.publish(*mine)
    await books.rig.publish(mine[0], mine[1])  # once more, as after an ambiguous publish
    await books.rig.publish(other, lane=Lane.NORMAL)
    balance = await books.until(synced=6)
    counts = {one.restaurant_id: (one.accepted, one.synced) for one in balance.restaurants}
    assert counts == {mine[0].restaurantid: (5, 5), OTHER_RESTAURANT: (1, 1)}

    async def after_heartbeat() -> bool:
        return (await books.balance()).until is not None

    await eventually(after_heartbeat, what="a heartbeat out of every lane")


async def test_what_waits_in_its_lane_is_queued(books: Books) -> None:
    await books.rig.writer.stop()
    await books.rig.publish(*(change(order(items=1)) for _ in range(3)))
    await books.until(queued=3)
    await books.another_writer().start()
    await books.until(synced=3)


async def test_what_is_on_the_ladder_is_retrying(make_books: Any) -> None:
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
    # Where it could not be noted: by the number of messages that are there.
    await eventually(lambda: books.rig.count("retries"), what="noted", until=lambda count: count == 1)
    await books.rig.database.execute("delete from retries")
    await books.until(synced=1, retrying=1)


async def test_a_dead_letter_explains_a_change_also_when_it_was_discarded_or_edited(books: Books) -> None:
    dead = [encode(traced()).replace(b'"total":', b'"total":-') for _ in range(3)]
    await books.rig.publish(*dead, change(order(items=1)), b'{"id": "no change at all"}')
    balance = await books.until(synced=1, dead=3)
    assert balance.dead_outcomes == {"in_queue": 3}, "nobody has read the dead queue yet"
    assert balance.unreadable == 1
    books.rig.keeper.start()
    letters = [one for one in await books.rig.letters(4) if one.change_id]
    assert (await books.until(synced=1, dead=3)).dead_outcomes == {"open": 3}
    async with books.ops.connection() as connection, connection.transaction():
        one, two, _ = letters
        by = {"why": "a test", "actor": "a tester", "role": "operator"}
        await actions.discard(connection, one.id, revision=one.revision, **by)
        edit = {"event": {}, "difference": [], "change_id": "11111111-1111-4111-8111-111111111111"}
        await actions.replace(connection, two.id, revision=two.revision, **edit, **by)  # type: ignore[arg-type]
    balance = await books.until(synced=1, dead=3)
    assert balance.dead_outcomes == {"open": 1, "discarded": 1, "edited": 1}


async def test_what_lies_in_a_journal_is_journaled_and_what_waits_in_a_lane_too_counts_once(books: Books) -> None:
    await books.rig.writer.stop()
    both, alone, lane = traced(), traced(), traced()
    await books.journal(both, alone)
    await books.rig.publish(both, lane)
    balance = await books.until(journaled=2, queued=1)
    assert balance.journals == {"orders-1.sqlite": 2}
    await books.another_writer().start()
    assert (await books.until(synced=2, journaled=1)).accepted == 3


# -- what is nowhere -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("management", [False, True])
async def test_of_a_lane_that_was_purged_every_change_is_named_with_its_trace_and_the_command_fails(
    make_books: Any, servers: Servers, management: bool
) -> None:
    urls = {
        "rabbitmq_management_url": servers.rabbitmq.management_url,
        "rabbitmq_watcher_url": servers.rabbitmq.management_url.replace("ticketrail:", "ticketrail_watcher:", 1),
    }
    books: Books = await make_books(**(urls if management else {}))

    async def away() -> list[str]:  # it may be slow to answer, and is called away then
        return (await books.balance()).away

    await eventually(away, what="who is away", until=lambda found: found == ([] if management else ["management"]))
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
    patience = [] if management else ["--timeout", "1"]
    code, out, _ = await books.cli("ledger", *patience)
    assert code == 1
    assert all(f"change {one.id} of {one.subject}" in out for one in lost), out
    assert TRACE in out
    if management:
        return  # it tells depths seconds late, and each look waits for it
    code, out, _ = await books.cli("ledger", "--all", "--json", *patience)
    said = msgspec.json.decode(out)
    assert (code, said["accepted"], said["synced"], said["unexplained"]) == (1, 3, 1, 2)
    assert {one["trace_id"] for one in said["missing"]} == {TRACE}
    # A change that was built on one of them is there: what it said is not lost, and that is told.
    await books.rig.publish(change(order(items=1, id=lost[0].entity_id), base=lost[0]))
    balance = await books.until(synced=2, unexplained=2)
    assert sum(one.successor is not None for one in balance.missing) == 1


async def test_a_row_that_is_gone_from_changes_is_named(books: Books, servers: Servers) -> None:
    made = [traced() for _ in range(4)]
    await books.rig.publish(*made)
    await books.until(synced=4)
    name = books.rig.settings.database_url.rpartition("/")[2]
    superuser = await asyncpg.connect(servers.postgres.superuser_url.rpartition("/")[0] + f"/{name}")
    await superuser.execute("delete from changes where change_id = $1", made[2].id)
    await superuser.close()
    balance = await books.until(synced=3, unexplained=1)
    assert [(one.change_id, one.trace_id) for one in balance.missing] == [(made[2].id, TRACE)]


async def test_an_entry_that_is_gone_from_a_journal_is_named_and_so_is_one_that_is_damaged(books: Books) -> None:
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
    assert len(await books.journals[0].oldest(10)) == 1  # it notices
    balance = await books.until(journaled=1, unexplained=2)
    assert {one.change_id for one in balance.missing} == {lost.id, flipped.id}


# -- at work ---------------------------------------------------------------------------------------------------------


async def test_while_a_load_runs_nothing_is_called_unexplained_and_it_ends_with_all_of_it_synced(
    make_books: Any,
) -> None:
    # While a batch of one consumer is delayed, the other passes the heartbeats behind it.
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
    patience = 6.0
    async with Ledger(books.rig.settings, books.ops, timeout_seconds=patience) as ledger:

        async def synced() -> int:
            balance = await ledger.look()
            if balance.missing:
                pytest.fail(f"called unexplained: {balance.missing}")
            return balance.synced

        deadline = time.monotonic() + 2 * patience  # what is missing is called so when it has been for that long
        while time.monotonic() < deadline:
            await synced()
        stop.set()
        await asyncio.gather(*loads)

        assert sent > 100
        await eventually(synced, within=120, what="all synced", until=lambda count: count == sent)


async def test_watching_reads_on_and_asks_for_nothing_twice(books: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [change(order(items=1)) for _ in range(50)]
    await books.rig.publish(*made)
    await books.until(synced=50)
    async with Ledger(books.rig.settings, books.ops, timeout_seconds=PATIENCE) as ledger:
        assert (await ledger.look()).synced == 50
        asked: list[int] = []
        settle = ledger._log.settle

        async def counted(entries: Any) -> None:
            asked.append(len(entries))
            await settle(entries)

        monkeypatch.setattr(ledger._log, "settle", counted)
        await books.rig.publish(*made[:5])  # which counted already
        await books.rig.publish(change(order(items=1)))

        async def synced() -> int:
            return (await ledger.look()).synced

        assert await eventually(synced, what="the next one", until=lambda count: count > 50) == 51
        assert max(asked) <= 1


async def test_a_window_begins_where_it_is_told_to(books: Books) -> None:
    await books.rig.publish(change(order(items=1)))
    await books.until(synced=1)
    assert (await books.balance(since=now())).accepted <= 1
    await books.rig.publish(change(order(items=1)))
    await books.until(synced=2)
    code, out, err = await books.cli("ledger", "--since", "yesterday")
    assert (code, out) == (2, "")
    assert "ISO 8601" in err


async def test_what_the_mirror_alone_shows_as_pending_is_a_hint_and_no_more(
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


async def test_without_postgres_there_is_no_balance_and_the_command_says_so(books: Books, servers: Servers) -> None:
    await asyncio.to_thread(servers.postgres.stop)
    try:
        with pytest.raises(Unavailable):
            await books.balance()
        code, _, err = await books.cli("ledger")
        assert code == 2
        assert "needs PostgreSQL" in err
    finally:
        await asyncio.to_thread(servers.postgres.start)


# -- the journal's commands, whose entries the ledger counts ---------------------------------------------------------


async def test_show_lists_what_waits_beside_the_instance_that_lives_and_changes_nothing(books: Books) -> None:
    made = [traced() for _ in range(3)]
    path = await books.journal(*made)
    code, out, _ = await books.cli("journal", "show", "--instance", "1")
    assert code == 0
    assert "3 changes wait (3 critical)" in out
    assert f"process {os.getpid()}" in out
    assert all(one.id in out and one.subject in out for one in made), out
    code, out, _ = await books.cli("journal", "show", str(path), "--json", "--limit", "1")
    said = msgspec.json.decode(out)
    assert (code, said["count"], len(said["entries"]), said["lanes"]) == (0, 3, 1, {"critical": 3})
    first = said["entries"][0]
    assert (first["change_id"], first["trace_id"], first["bytes"]) == (made[0].id, TRACE, len(encode(made[0])))
    assert first["age_seconds"] >= 0
    await books.journals[0].append([(Lane.CRITICAL, encode(traced()))])
    assert books.journals[0].depth == 4


async def test_drain_brings_the_journal_of_an_instance_that_is_gone_to_postgres_and_is_refused_while_it_lives(
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


async def test_drain_without_a_broker_keeps_everything_and_says_so(books: Books, servers: Servers) -> None:
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


async def test_of_a_damaged_journal_show_names_what_is_broken_and_drain_sends_the_rest(books: Books) -> None:
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
    assert "1 damaged entries were not sent" in err
    assert "was set aside" in err
    balance = await books.until(synced=29, unexplained=1)
    assert [one.change_id for one in balance.missing] == [made[7].id]
    [aside] = files_aside(path)
    assert aside.read_bytes() == bytes(data)
    assert (await books.cli("journal", "drain", str(aside)))[0] == 1
