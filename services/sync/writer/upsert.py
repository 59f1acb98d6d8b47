"""Writes batches of changes into PostgreSQL. No other module writes the tables of entities, `changes` and `heartbeats`,
and no other module opens conflicts.

Guarantee: `write_batch` is one transaction. The final content of the tables does not depend on the order of the
batches, on repetitions, or on the number of concurrent writers:

    entities' tables  the state with the largest (version, change id) wins, and its children with it
    facts             every fact that a written state has carried
    changes           every change once, verbatim
    conflicts         every pair of changes that claim one version or have one base

Order inside the transaction: entities come first. If two changes of a fork are written at the same time, the row locks
of the entity serialize them, so that the second one finds the first one when it looks for forks. All writers visit the
tables in the same order and sort rows by key, because two writers would deadlock otherwise. PostgreSQL refuses two
versions of one row in one upsert, so only the highest version in a batch is sent.

The statements are built once, from the declarations in `shared/entities`. Values travel as one array per column.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import Struct

from services.sync.failures import retry_store
from shared.entities import registry
from shared.entities.contract import Change, Lane
from shared.entities.entity import Column, Entity
from shared.entities.signal import Signal
from shared.postgres.pool import Connection

Key = tuple[str, str]
"""(restaurant id, entity id)"""


class DecodedChange(Struct, frozen=True):
    """One decoded and validated change to write, with the state after the change."""

    lane: Lane
    entity: Entity
    change: Change
    state: Any

    @property
    def key(self) -> Key:
        return (self.change.restaurantid, self.change.entity_id)


class Outcome(Struct, frozen=True):
    new: int
    """The number of changes that were not in `changes` yet."""
    forks: int
    """The number of conflicts that were opened."""


class _Statements(Struct, frozen=True):
    upsert: str
    delete_children: tuple[str, ...]
    insert_children: tuple[str, ...]
    insert_facts: tuple[str, ...]


def _unnest(types: Iterable[str]) -> str:
    return ", ".join(f"${number}::{type_}[]" for number, type_ in enumerate(types, 1))


def _insert(table: str, keys: Sequence[tuple[str, str]], columns: Sequence[Column]) -> str:
    pairs = [*keys, *((column.name, column.pg_type) for column in columns)]
    names = ", ".join(name for name, _ in pairs)
    return f"insert into {table} as t ({names}) select * from unnest({_unnest(type_ for _, type_ in pairs)})"  # noqa: S608


def _statements(entity: Entity) -> _Statements:
    guard = (("version", "int4"), ("change_id", "uuid"))
    owner = (("restaurant_id", "uuid"), ("id", "uuid"))
    replaced = ("version", "change_id", *(column.name for column in entity.table.columns))
    assignments = ", ".join(f"{name} = excluded.{name}" for name in replaced)
    return _Statements(
        upsert=_insert(entity.table.name, (*owner, *guard), entity.table.columns)
        + f" on conflict (restaurant_id, id) do update set {assignments}"
        " where (excluded.version, excluded.change_id) > (t.version, t.change_id)"
        # xmax is 0 if the row was inserted and not updated. Such a row has no children yet.
        " returning t.restaurant_id::text, t.id::text, t.xmax = 0 as inserted",
        delete_children=tuple(
            f"delete from {child.name} t using unnest($1::uuid[], $2::uuid[]) as gone (restaurant_id, parent)"  # noqa: S608
            f" where t.restaurant_id = gone.restaurant_id and t.{child.parent} = gone.parent"
            for child in entity.children
        ),
        insert_children=tuple(
            _insert(
                child.name,
                (("restaurant_id", "uuid"), (child.parent, "uuid"), ("position", "int4")),
                child.columns,
            )
            for child in entity.children
        ),
        insert_facts=tuple(
            _insert(fact.name, (*owner, (fact.parent, "uuid")), fact.columns) + " on conflict do nothing"
            for fact in entity.facts
        ),
    )


_STATEMENTS = {name: _statements(entity) for name, entity in registry.ENTITIES.items()}

_CHANGES: Sequence[tuple[str, str, Callable[[DecodedChange], Any]]] = (
    ("restaurant_id", "uuid", lambda decoded: decoded.change.restaurantid),
    ("change_id", "uuid", lambda decoded: decoded.change.id),
    ("entity", "text", lambda decoded: decoded.entity.name),
    ("entity_id", "uuid", lambda decoded: decoded.change.entity_id),
    ("version", "int4", lambda decoded: decoded.change.entityversion),
    ("base_change_id", "uuid", lambda decoded: decoded.change.basechangeid),
    ("type", "text", lambda decoded: decoded.change.type),
    ("source", "text", lambda decoded: decoded.change.source),
    ("lane", "text", lambda decoded: decoded.lane.value),
    ("accepted_at", "timestamptz", lambda decoded: decoded.change.time),
    ("traceparent", "text", lambda decoded: decoded.change.traceparent),
    ("actor", "text", lambda decoded: decoded.change.actor),
    ("data", "json", lambda decoded: data_of(decoded.change)),
)
_INSERT_CHANGES = (
    _insert("changes", [(name, type_) for name, type_, _ in _CHANGES], ())
    + " on conflict do nothing returning restaurant_id, change_id"
)

# The two ids of a pair are sorted, so that a fork opens one conflict, whichever change is written second. Each half of
# the union uses its own index.
_INSERT_CONFLICTS = """
with mine as (
    select c.restaurant_id, c.entity, c.entity_id, c.version, c.change_id, c.base_change_id
    from unnest($1::uuid[], $2::uuid[]) as new (restaurant_id, change_id)
    join changes c using (restaurant_id, change_id)
), pairs as (
    select mine.*, other.version as other_version, other.change_id as other_change_id
    from mine join changes other using (restaurant_id, entity, entity_id, version)
    where other.change_id <> mine.change_id
    union all
    select mine.*, other.version, other.change_id
    from mine join changes other
        on other.restaurant_id = mine.restaurant_id and other.base_change_id = mine.base_change_id
        and other.entity = mine.entity and other.entity_id = mine.entity_id
    where other.change_id <> mine.change_id
)
insert into conflicts (restaurant_id, entity, entity_id, version, change_id, other_change_id)
select distinct restaurant_id, entity, entity_id, greatest(version, other_version),
    least(change_id, other_change_id), greatest(change_id, other_change_id)
from pairs
order by 1, 5, 6
on conflict do nothing
"""

_STORE_HEARTBEATS = """
insert into heartbeats (id, lane, sent_at)
select * from unnest($1::uuid[], $2::text[], $3::timestamptz[])
on conflict (id) do nothing
"""


def data_of(change: Change) -> str:
    """Returns `data` as JSON, with `before` and `after` exactly as received. `decode_change` has checked that both are
    valid UTF-8."""
    return f'{{"before":{bytes(change.data.before).decode()},"after":{bytes(change.data.after).decode()}}}'


def highest(written: Iterable[DecodedChange]) -> list[DecodedChange]:
    """Returns the change with the highest head of each entity, sorted by key."""
    found: dict[Key, DecodedChange] = {}
    for decoded in written:
        known = found.get(decoded.key)
        if known is None or decoded.change.head > known.change.head:
            found[decoded.key] = decoded
    return [found[key] for key in sorted(found)]


async def write_batch(
    connection: Connection,
    written: Sequence[DecodedChange],
    heartbeats: Sequence[Signal] = (),
    *,
    timeout_seconds: float,
    retried: Sequence[tuple[str, str]] = (),
) -> Outcome:
    """Writes all changes and heartbeats in one transaction. `timeout_seconds`: after this time the server cancels a
    statement or stops waiting for a lock. `retried`: (restaurant id, change id) of the changes from the retry ladder.

    `timeout_seconds` must be less than the command timeout of the connection. Then a slow statement ends with an error
    of the server (QueryCanceledError, LockNotAvailableError), and a command timeout means that the server does not
    answer at all.
    """
    async with connection.transaction():
        # While a new database has no statistics, the planner would otherwise read all of `changes` for every batch.
        milliseconds = int(timeout_seconds * 1000)
        await connection.execute(
            f"set local statement_timeout = {milliseconds}; set local lock_timeout = {milliseconds * 9 // 10};"
            " set local enable_seqscan = off; set local enable_hashjoin = off; set local enable_mergejoin = off"
        )
        for name, entity in registry.ENTITIES.items():
            if of_entity := [decoded for decoded in written if decoded.entity.name == name]:
                await _write_entities(connection, entity, of_entity)
        new, forks = await _write_changes(connection, written) if written else (0, 0)
        if heartbeats:
            await _store_heartbeats(connection, heartbeats)
        if retried:
            await retry_store.forget(connection, retried)
    return Outcome(new, forks)


async def _write_entities(connection: Connection, entity: Entity, written: Sequence[DecodedChange]) -> None:
    statements = _STATEMENTS[entity.name]
    highest_changes = highest(written)
    rows = await connection.fetch(
        statements.upsert,
        [decoded.change.restaurantid for decoded in highest_changes],
        [decoded.change.entity_id for decoded in highest_changes],
        [decoded.change.entityversion for decoded in highest_changes],
        [decoded.change.id for decoded in highest_changes],
        *_arrays(entity.table.columns, [decoded.state for decoded in highest_changes]),
    )
    inserted = {(row[0], row[1]): row[2] for row in rows}
    applied = [decoded for decoded in highest_changes if decoded.key in inserted]
    updated = [decoded.key for decoded in applied if not inserted[decoded.key]]
    for child, delete, insert in zip(
        entity.children, statements.delete_children, statements.insert_children, strict=True
    ):
        if updated:
            await connection.execute(delete, [key[0] for key in updated], [key[1] for key in updated])
        lines = [
            (decoded.key, place, row) for decoded in applied for place, row in enumerate(child.rows(decoded.state), 1)
        ]
        if lines:
            await connection.execute(
                insert,
                [key[0] for key, _, _ in lines],
                [key[1] for key, _, _ in lines],
                [place for _, place, _ in lines],
                *_arrays(child.columns, [row for _, _, row in lines]),
            )
    for fact, insert in zip(entity.facts, statements.insert_facts, strict=True):
        found = {(*decoded.key, row.id): row for decoded in written for row in fact.rows(decoded.state)}  # type: ignore[attr-defined]
        if found:
            facts = [
                (restaurant, id_, parent, found[restaurant, parent, id_]) for restaurant, parent, id_ in sorted(found)
            ]
            await connection.execute(
                insert,
                [restaurant for restaurant, _, _, _ in facts],
                [id_ for _, id_, _, _ in facts],
                [parent for _, _, parent, _ in facts],
                *_arrays(fact.columns, [row for _, _, _, row in facts]),
            )


async def _write_changes(connection: Connection, written: Sequence[DecodedChange]) -> tuple[int, int]:
    ordered = sorted(written, key=lambda decoded: (decoded.change.restaurantid, decoded.change.id))
    arrays = [[value(decoded) for decoded in ordered] for _, _, value in _CHANGES]
    new = await connection.fetch(_INSERT_CHANGES, *arrays)
    if not new:
        return 0, 0  # all changes were written before, and that write has looked for forks
    status = await connection.execute(_INSERT_CONFLICTS, [row[0] for row in new], [row[1] for row in new])
    return len(new), int(status.rpartition(" ")[2])


async def _store_heartbeats(connection: Connection, heartbeats: Sequence[Signal]) -> None:
    ordered = sorted(heartbeats, key=lambda heartbeat: heartbeat.id)
    await connection.execute(
        _STORE_HEARTBEATS,
        [heartbeat.id for heartbeat in ordered],
        [heartbeat.lane for heartbeat in ordered],
        [heartbeat.time for heartbeat in ordered],
    )


def _arrays(columns: Sequence[Column], rows: Sequence[Any]) -> list[list[Any]]:
    return [[column.of(row) for row in rows] for column in columns]
