"""Decides conflicts for the API and the command line: the operator keeps one of the two changes of a fork.

By the guard, the change with the larger (version, change id) is the winner in every store. The guard is only a rule, so
an operator may decide otherwise. The decision names the change to keep. If the entity has the value of the other change
in a field in which the two differ, a new change at head version + 1 restores the value of the kept change. Later
changes stay. If the operator keeps the loser and such a field has a third value by now, the decision is refused,
because only the restaurant knows the right value. Payments and stock moves are facts: the facts of both sides count
after every decision (`forked_payments.py` restores the payments of an order).

The conflict is locked during the decision. The new change is recorded before the conflict is closed. A failure in
between leaves the conflict open and the change recorded; a second attempt then makes no second change.
"""

from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from services.sync.conflicts import store as conflict_store
from services.sync.conflicts.store import Fork, Side
from services.sync.difference import difference
from services.sync.operator_changes import commit, record_first
from shared.entities import inventory_item, registry
from shared.entities import order as orders
from shared.entities.contract import Head, encode, now
from shared.entities.entity import VERSION_FIELD, Entity
from shared.entities.order import Order, OrderStatus, held_again, payment_status
from shared.errors import Conflict, InvalidInput
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.rail.head import Heads

_DERIVED_FIELDS = frozenset({"updated_at", "payment_status"})


class Differs(Struct, frozen=True, omit_defaults=True):
    """A leaf of the JSON in which the two states differ. A side that lacks the leaf is left out."""

    path: str
    winner: Any = UNSET
    loser: Any = UNSET


class ShownFork(Struct, frozen=True, kw_only=True):
    conflict: Fork
    winner: Side
    """The side with the larger (version, change id)."""
    loser: Side
    differs: list[Differs]
    head: Head | None
    """The head in PostgreSQL: the winner, or a later change."""


async def show(connection: Connection, id_: str) -> ShownFork:
    """Returns both sides of a conflict and how they differ. Raises NotFound."""
    conflict = await conflict_store.one(connection, id_)
    winner, loser = await conflict_store.sides(connection, conflict)
    entity = registry.ENTITIES[conflict.entity]
    stored = await states.find_state(connection, entity, conflict.restaurant_id, conflict.entity_id)
    return ShownFork(
        conflict=conflict,
        winner=winner,
        loser=loser,
        differs=[
            Differs(leaf["path"], leaf.get("before", UNSET), leaf.get("after", UNSET))
            for leaf in difference(winner.state, loser.state)
        ],
        head=None if stored is None else stored.head,
    )


class ConflictDecisions:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail) -> None:
        """`postgres`: a pool of the ops role."""
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail

    async def resolve(self, id_: str, *, keep: str, why: str, actor: str, role: str) -> Fork:
        """Enforces the decision and closes the conflict. `keep`: the id of the change to keep. Raises NotFound,
        InvalidInput, Conflict (`conflict_resolved`, `changed_since`, `version_conflict`, `out_of_stock`), Unavailable,
        OutcomeUnknown."""
        if not why.strip():
            raise InvalidInput("must not be empty", field="why")
        with record_first("the conflict") as recorded:
            async with self._postgres.connection() as connection, connection.transaction():
                conflict = await conflict_store.take(connection, id_)
                winner, loser = await conflict_store.sides(connection, conflict)
                if keep not in (winner.change_id, loser.change_id):
                    raise InvalidInput("must be the id of one of the two changes", field="keep")
                recorded.change_id = await self._enforce(connection, conflict, winner, loser, keep, actor)
                return await conflict_store.resolve(
                    connection, conflict, keep=keep, change_id=recorded.change_id, why=why, actor=actor, role=role
                )

    async def _enforce(
        self, connection: Connection, conflict: Fork, winner: Side, loser: Side, keep: str, actor: str
    ) -> str | None:
        """Commits the change that restores the values of the change `keep`. Returns the id of the new change, or None
        if the entity already has these values."""
        entity = registry.ENTITIES[conflict.entity]
        heads = Heads.through(connection, self._mirror)
        base = await heads.head(entity, conflict.restaurant_id, conflict.entity_id)
        if base is None:
            raise Conflict("the entity does not exist any more", code="changed_since", fields=[])
        kept, dropped = (winner, loser) if keep == winner.change_id else (loser, winner)
        after, encoded = with_decision(
            entity, base.raw, kept=kept.state, dropped=dropped.state, strict=keep != winner.change_id
        )
        if msgspec.json.decode(encoded) == _plain(entity, base.raw):
            return None
        event = event_between(entity, base.state, after)
        return await commit(self._rail, entity, event, after, base, actor=actor, made_from=encoded)


def with_decision(
    entity: Entity, current: bytes, *, kept: dict[str, Any], dropped: dict[str, Any], strict: bool
) -> tuple[Any, bytes]:
    """Returns the encoded state `current`, in which each field with the value of `dropped` has the value of `kept`
    instead: decoded, and encoded with the fields that this release does not know. Pure.

    A field in which `kept` and `dropped` differ can have a third value by now. If `strict`, such a field raises
    Conflict (`changed_since`). Otherwise the field keeps its value."""
    kept, dropped = (_plain(entity, encode(side)) for side in (kept, dropped))
    before, after = entity.decode_state(current), _plain(entity, current)
    ignored_fields = _DERIVED_FIELDS | {facts.field for facts in entity.facts} | {VERSION_FIELD}
    changed_since = []
    for name in sorted({*kept, *dropped} - ignored_fields):
        dropped_value, kept_value, value = (side.get(name, UNSET) for side in (dropped, kept, after))
        if kept_value in (dropped_value, value):
            continue
        if value != dropped_value:
            changed_since.append(name)
        elif kept_value is UNSET:
            del after[name]
        else:
            after[name] = kept_value
    if strict and changed_since:
        raise Conflict(
            f"these fields have changed since the fork: {', '.join(changed_since)}. Set them in the ordinary way, then"
            " keep the winner",
            code="changed_since",
            fields=changed_since,
        )
    encoded = encode(after)
    state = entity.decode_state(encoded)
    if entity is inventory_item.ENTITY and state.quantity != before.quantity:
        # The quantity of a side includes only the stock moves of that side.
        raise Conflict(
            "stock moved on both sides: count the item, then keep the winner",
            code="changed_since",
            fields=["quantity"],
        )
    if entity is orders.ENTITY:
        state = _with_derived_order_fields(before, state, now())
    return state, entity.encode_state(state, encoded)[1]


def _with_derived_order_fields(before: Order, after: Order, at: datetime) -> Order:
    if _is_closed(before) and not _is_closed(after):
        after = msgspec.structs.replace(after, holds=held_again(after, at))
    return msgspec.structs.replace(after, payment_status=payment_status(after.payments, after.total))


def _is_closed(order: Order) -> bool:
    return order.deleted_at is not None or order.status is OrderStatus.CANCELLED


def event_between(entity: Entity, before: Any, after: Any) -> str:
    """Returns the event of a change from `before` to `after`: deleted, restored or updated. Pure."""
    if after.deleted_at and not before.deleted_at:
        return "deleted"
    return "restored" if before.deleted_at and not after.deleted_at and "restored" in entity.events else "updated"


def _plain(entity: Entity, encoded: bytes) -> dict[str, Any]:
    """Returns a state as plain JSON values: all fields that this release knows, encoded as it encodes them, and the
    fields that it does not know."""
    found: dict[str, Any] = msgspec.json.decode(entity.encode_state(entity.decode_state(encoded), encoded)[1])
    return found
