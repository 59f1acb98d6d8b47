"""`write_batch` on a real PostgreSQL: forks, facts, any order of arrival, repetition, and every contract value."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import pairwise
from typing import Any
from uuid import uuid4

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import Struct, structs

from services.sync.writer import upsert
from services.sync.writer.upsert import DecodedChange, Outcome, write_batch
from shared.entities import registry
from shared.entities.contract import BrokenContract, Change, Lane, decode_change, encode
from shared.entities.entity import Entity, Facts, columns
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Customization, Order, OrderStatus, PaymentStatus
from shared.entities.order import state as law
from shared.entities.order.lines import NewVoid, void
from shared.entities.table import DiningTable
from shared.postgres.migrate import migrate
from shared.settings import Settings
from tests.rigs import order_law
from tests.rigs.builders import CREATED_AT, RESTAURANT, change, item, menu_item, order, payment
from tests.rigs.newer_release import registered
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

Database = Any
PROPERTY = settings(
    max_examples=40,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
async def urls(servers: Servers) -> AsyncIterator[Settings]:
    name = f"c{uuid4().hex[:10]}"
    await asyncio.to_thread(servers.postgres.make_database, name)
    chosen = Settings(
        _env_file=None,
        database_url=servers.postgres.url("ticketrail_owner", name),
        database_writer_url=servers.postgres.url("ticketrail_writer", name),
        database_api_url=servers.postgres.url("ticketrail_api", name),
        database_ops_url=servers.postgres.url("ticketrail_ops", name),
    )
    await migrate(chosen)
    yield chosen
    await asyncio.to_thread(servers.postgres.drop_database, name)


@pytest.fixture(scope="module")
async def owner(urls: Settings) -> AsyncIterator[Database]:
    connection = await asyncpg.connect(urls.database_url)
    yield connection
    await connection.close()


@pytest.fixture
async def database(urls: Settings, owner: Database) -> AsyncIterator[Database]:
    """A connection as the writer, with empty tables."""
    await empty(owner)
    connection = await asyncpg.connect(urls.database_writer_url)
    yield connection
    await connection.close()


async def empty(owner: Database) -> None:
    await owner.execute("truncate orders, order_items, payments, menu_items, tables, changes, conflicts")


def written(*changes: Change, lane: Lane = Lane.CRITICAL) -> list[DecodedChange]:
    return [DecodedChange(lane, *_read(one)) for one in changes]


def _read(one: Change) -> tuple[Any, Change, Any]:
    entity, state = registry.read(one)
    return entity, one, state


async def write(database: Database, *changes: Change) -> Outcome:
    return await write_batch(database, written(*changes), timeout_seconds=5.0)


TABLES = {
    "orders": "restaurant_id, id",
    "order_items": "restaurant_id, order_id, position",
    "payments": "restaurant_id, id",
    "menu_items": "restaurant_id, id",
    "tables": "restaurant_id, id",
    "conflicts": "restaurant_id, change_id, other_change_id",
    "changes": "restaurant_id, change_id",
}
# Columns that depend on when and where a row was written.
IGNORED = {"id of conflicts", "opened_at", "written_at", "xid", "seq", "lane"}


async def everything(database: Database) -> dict[str, list[dict[str, Any]]]:
    return {
        table: [
            {name: value for name, value in row.items() if not {name, f"{name} of {table}"} & IGNORED}
            for row in await database.fetch(f"select * from {table} order by {key}")
        ]
        for table, key in TABLES.items()
    }


async def conflicts(database: Database) -> list[tuple[int, str, str]]:
    rows = await database.fetch(
        "select version, change_id::text as one, other_change_id::text as other from conflicts order by 1, 2, 3"
    )
    return [tuple(row) for row in rows]


def pair(one: Change, other: Change) -> tuple[str, ...]:
    return tuple(sorted((one.id, other.id)))


async def test_older_version_in_the_same_batch_leaves_the_newer(database: Database) -> None:
    first = change(order(items=5))
    second = change(order(id=first.entity_id, items=2), base=first)
    assert await write(database, second, first) == Outcome(2, 0)
    assert await database.fetchval("select version from orders") == 2
    assert await database.fetchval("select count(*) from order_items") == 2


# -- forks ---------------------------------------------------------------------------------------------------------


async def test_fork_opens_one_conflict_and_the_larger_change_wins(database: Database) -> None:
    base = change(order())
    ours, theirs = (change(order(id=base.entity_id, notes=notes), base=base) for notes in ("ours", "theirs"))
    assert await write(database, base, ours) == Outcome(2, 0)
    assert await write(database, theirs) == Outcome(1, 1)
    assert await write(database, ours, theirs, base) == Outcome(0, 0)
    assert await conflicts(database) == [(2, *pair(ours, theirs))]
    head = await database.fetchval("select change_id::text from orders")
    assert head == max(ours.id, theirs.id)


async def test_fork_inside_one_batch_opens_one_conflict(database: Database) -> None:
    base = change(order())
    ours, theirs = (change(order(id=base.entity_id, notes=notes), base=base) for notes in ("ours", "theirs"))
    assert await write(database, theirs, base, ours) == Outcome(3, 1)
    assert await conflicts(database) == [(2, *pair(ours, theirs))]


async def test_concurrent_forks_open_one_conflict(urls: Settings, database: Database) -> None:
    base = change(order())
    await write(database, base)
    ours, theirs = (change(order(id=base.entity_id, notes=notes), base=base) for notes in ("ours", "theirs"))
    other = await asyncpg.connect(urls.database_writer_url)
    transaction = database.transaction()
    await transaction.start()
    assert await write(database, ours) == Outcome(1, 0)
    second = asyncio.create_task(write(other, theirs))
    watcher = await asyncpg.connect(urls.database_writer_url)

    async def waits() -> int:
        return int(await watcher.fetchval("select count(*) from pg_locks where not granted"))

    await eventually(waits, what="a second fork that waits for the first")
    await transaction.commit()
    assert await second == Outcome(1, 1)
    assert await conflicts(watcher) == [(2, *pair(ours, theirs))]
    assert await watcher.fetchval("select change_id::text from orders") == max(ours.id, theirs.id)
    for connection in (other, watcher):
        await connection.close()


async def test_two_first_versions_of_one_entity_are_a_fork(database: Database) -> None:
    one = change(order())
    other = change(order(id=one.entity_id, notes="other"))
    await write(database, one)
    await write(database, other)
    assert await conflicts(database) == [(1, *pair(one, other))]


async def test_two_changes_with_one_base_are_a_fork_at_any_version(database: Database) -> None:
    base = change(order())
    ours = change(order(id=base.entity_id, notes="ours"), base=base)
    jumped = change(order(id=base.entity_id, notes="jumped"), base=base, entityversion=7)
    await write(database, base, jumped)
    assert await conflicts(database) == []  # a gap in the versions alone is no fork
    await write(database, ours)
    assert await conflicts(database) == [(7, *pair(ours, jumped))]


async def test_payments_of_the_superseded_side_of_a_fork_are_kept(database: Database) -> None:
    base = change(order())
    ours, theirs = (
        change(order(id=base.entity_id, payments=(payment(amount=amount),)), base=base) for amount in (100, 200)
    )
    loser, winner = sorted((ours, theirs), key=lambda one: one.id)
    await write(database, winner)
    await write(database, loser, base)
    amounts = await database.fetch("select amount from payments order by amount")
    assert [row["amount"] for row in amounts] == [100, 200]


class VoidOfLine(Struct, frozen=True):
    id: str
    line_id: str
    at: datetime


def _voids(order: law.Order) -> list[VoidOfLine]:
    return [VoidOfLine(void.id, line.id, void.at) for line in order.items for void in line.voids]


@pytest.fixture
async def order_with_voids(owner: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Entity]:
    """An entity whose facts are in its lines."""
    voids = Facts(
        name="test_voids",
        parent="order_id",
        columns=tuple(columns("line_id uuid", "at timestamptz")),
        field="items",
        nested=_voids,
    )
    entity = replace(ORDER, state=law.Order, children=(), facts=(*ORDER.facts, voids))
    await owner.execute(
        "create table test_voids (restaurant_id uuid, order_id uuid, id uuid, line_id uuid, at timestamptz,"
        " primary key (restaurant_id, order_id, id)); grant select, insert on test_voids to ticketrail_writer"
    )
    monkeypatch.setitem(upsert._STATEMENTS, ORDER.name, upsert._statements(entity))  # noqa: SLF001
    with registered(entity):
        yield entity
    await owner.execute("drop table test_voids")


async def test_facts_of_a_line_are_kept_from_every_side_of_a_fork(database: Database, order_with_voids: Entity) -> None:
    placed = order_law.placed(order_law.line("soup", 900, 5), order_law.line("tea", 300, 5))
    base = change(placed)
    ours, theirs = [
        void(placed, order_law.act(2), NewVoid(id=order_law.named(f"void of {name}"), line=order_law.named(name)))
        for name in ("soup", "tea")
    ]
    sides = [change(side, base=base) for side in (ours, theirs)]
    await write(database, *sides)
    await write(database, base, sides[0])
    assert {(str(row["id"]), str(row["line_id"]), row["at"]) for row in await database.fetch("table test_voids")} == {
        (order_law.named(f"void of {name}"), order_law.named(name), ours.updated_at) for name in ("soup", "tea")
    }


def test_times_of_facts_in_a_line_must_be_in_range(order_with_voids: Entity) -> None:
    placed = order_law.placed(order_law.line("soup", 900, 5))
    gone = void(placed, order_law.act(2), NewVoid(id=order_law.named("gone"), line=order_law.named("soup")))
    (soup,) = gone.items
    late = structs.replace(soup.voids[0], at=datetime.max.replace(tzinfo=UTC))
    with pytest.raises(BrokenContract, match=r"test_voids.at is out of range"):
        registry.read(change(structs.replace(gone, items=(structs.replace(soup, voids=(late,)),))))


async def test_items_follow_the_head(database: Database) -> None:
    base = change(order(items=5))
    fewer = change(order(id=base.entity_id, items=(item(name="only one"),)), base=base)
    none = change(order(id=base.entity_id, items=0), base=fewer)
    await write(database, base)
    await write(database, fewer)
    assert [row["name"] for row in await database.fetch("select name from order_items")] == ["only one"]
    await write(database, none)
    assert await database.fetchval("select count(*) from order_items") == 0


async def test_batch_of_several_entities_is_all_or_nothing(database: Database) -> None:
    dish, bill = change(menu_item()), change(order())
    broken = msgspec.structs.replace(written(dish)[0], state=msgspec.structs.replace(menu_item(), price="no price"))
    with pytest.raises(asyncpg.DataError):
        await write_batch(database, [*written(bill), broken], timeout_seconds=5.0)
    assert await database.fetchval("select count(*) from orders") == 0
    await write(database, dish, bill)
    assert await database.fetchval("select count(*) from menu_items") == 1


# -- properties ----------------------------------------------------------------------------------------------------


def _history() -> list[Change]:
    """Two orders and a dish: updates, a fork with a payment on each side, a version gap, a deletion."""
    first = change(order(items=2))
    second = change(order(id=first.entity_id, items=1, payments=(payment(),)), base=first)
    fork = change(order(id=first.entity_id, items=4, payments=(payment(), payment())), base=first)
    after = change(order(id=first.entity_id, items=3, status=OrderStatus.RECEIVED), base=second)
    other = change(order(items=1))
    jump = change(order(id=other.entity_id, items=2, deleted_at=CREATED_AT), base=other, entityversion=5)
    dish = change(menu_item())
    dearer = change(menu_item(id=dish.entity_id, price=1_200), base=dish)
    return [first, second, fork, after, other, jump, dish, dearer]


HISTORY = _history()


@PROPERTY
@given(
    order_of_arrival=st.permutations(range(len(HISTORY))),
    again=st.lists(st.integers(0, len(HISTORY) - 1), max_size=8),
    cuts=st.sets(st.integers(1, 15)),
)
async def test_any_order_and_any_repetition_end_in_the_same_tables(
    database: Database, owner: Database, order_of_arrival: list[int], again: list[int], cuts: set[int]
) -> None:
    await empty(owner)
    for one in HISTORY:
        await write(database, one)
    expected = await everything(database)
    assert len(expected["conflicts"]) == 1 and len(expected["payments"]) == 3
    await empty(owner)
    arriving: Sequence[int] = [*order_of_arrival, *again]
    edges = [0, *sorted(cut for cut in cuts if cut < len(arriving)), len(arriving)]
    for begin, end in pairwise(edges):
        await write(database, *(HISTORY[place] for place in arriving[begin:end]))
    assert await everything(database) == expected


IDS = st.uuids().map(str)
LABELS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=200)
TEXTS = st.one_of(LABELS, st.just("\U0010ffff" * 2_000), st.just("\\u0000"), st.just("\x01\x7f\u2028'\"\\"))
MONEY = st.one_of(st.integers(0, 10**12), st.just(10**12))
ZONES = st.integers(-14 * 60 + 1, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
EDGES = st.sampled_from(
    [
        datetime.min.replace(tzinfo=timezone(timedelta(hours=14))),  # in UTC this moment is before the year 1
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2199, 12, 31, 23, 59, 59, 999_999, tzinfo=timezone(timedelta(hours=-12))),
    ]
)
TIMES = st.datetimes(datetime(1970, 1, 2), datetime(2199, 12, 30), timezones=ZONES)
ITEMS = st.builds(
    item,
    menu_item_id=IDS,
    name=LABELS,
    quantity=st.integers(1, 1_000),
    unit_price=MONEY,
    line_total=MONEY,
    special_instructions=st.none() | TEXTS,
    customizations=st.lists(st.builds(Customization, LABELS, LABELS), max_size=2).map(tuple),
)
PAYMENTS = st.builds(
    payment,
    id=IDS,
    amount=st.integers(-(10**12), 10**12),
    method=LABELS,
    created_at=TIMES | EDGES,
    reference=st.none() | LABELS,
)
ORDERS: st.SearchStrategy[Order] = st.builds(
    order,
    id=IDS,
    items=st.lists(ITEMS, max_size=3).map(tuple),
    order_number=st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40),
    business_day=st.dates() | st.sampled_from([date.min, date.max]),
    status=st.sampled_from(OrderStatus),
    currency=st.from_regex("^[A-Z]{3}$", fullmatch=True),
    subtotal=MONEY,
    tax_basis_points=st.integers(0, 10_000),
    tax_amount=MONEY,
    tip_amount=MONEY,
    discount_amount=MONEY,
    deposit_used=MONEY,
    total=MONEY,
    created_at=TIMES,
    updated_at=TIMES,
    table_id=st.none() | IDS,
    customer_name=st.none() | LABELS,
    customer_phone=st.none() | LABELS,
    customer_session_id=st.none() | LABELS,
    payment_method=st.none() | LABELS,
    payment_status=st.sampled_from(PaymentStatus),
    payments=st.lists(PAYMENTS, max_size=2).map(tuple),
    notes=st.none() | TEXTS,
    special_instructions=st.none() | TEXTS,
    placed_by=st.none() | LABELS,
    request_hash=st.none() | st.text(max_size=70),
    deleted_at=st.none() | TIMES,
)
TABLES_OF_A_RESTAURANT = st.builds(
    DiningTable,
    id=IDS,
    restaurant_id=st.just(RESTAURANT),
    label=LABELS,
    seats=st.integers(1, 1_000),
    created_at=TIMES,
    updated_at=TIMES,
)
DISHES = st.builds(menu_item, id=IDS, name=LABELS, price=MONEY, category=LABELS, description=st.none() | TEXTS)
# Text that JSON can write as an escape but PostgreSQL cannot read, and text that only looks like it.
TRAPS = st.sampled_from(["\x00", "\\u0000", "\\\x00", "\ud800", "\udc00\ud800", "\ud83c\udf5c", "\x01", "\ufffe"])
ANYTHING = TRAPS | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(PROPERTY, max_examples=200)
@given(
    state=st.one_of(ORDERS, DISHES, TABLES_OF_A_RESTAURANT),
    version=st.integers(1, 2**31 - 1),
    accepted_at=TIMES | EDGES,
    source=LABELS,
    traceparent=st.none() | LABELS,
    before=ANYTHING,
    ascii_only=st.booleans(),
)
async def test_postgres_stores_and_returns_every_value_that_the_contract_accepts(
    database: Database,
    owner: Database,
    state: Any,
    version: int,
    accepted_at: datetime,
    source: str,
    traceparent: str | None,
    before: Any,
    ascii_only: bool,
) -> None:
    made = change(state, entityversion=version, time=accepted_at, source=source, traceparent=traceparent)
    event = encode(made).replace(b'"before":{}', b'"before":' + _json(before, ascii_only=ascii_only), 1)
    try:
        accepted = decode_change(event)
        batch = written(accepted)
    except BrokenContract:
        return  # the decoder refuses this text, so PostgreSQL never gets it
    await empty(owner)
    await write_batch(database, batch, timeout_seconds=5.0)
    row = await database.fetchrow(
        "select data->'before' as before, (data->'after')::text as after, accepted_at from changes"
        " where restaurant_id = $1 and change_id = $2",
        RESTAURANT,
        accepted.id,
    )
    assert row["after"].encode() == bytes(accepted.data.after)
    assert row["before"].encode() == bytes(accepted.data.before)
    assert row["accepted_at"] == accepted.time


def _json(value: Any, *, ascii_only: bool) -> bytes:
    """Encodes as JSON, with escapes as some producers do, or without."""
    return json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
