"""Deciding a conflict: of two changes that could not both stand, which one holds. The API and the command line both
come here.

Of the two the one with the larger (version, change id) wins in every store: a rule, not a judgement. Deciding says
which one holds, and sees to it that it does: what differs between the two, and stands as the other one had it, is given
back by a new change at head + 1. What was changed since then stays; where that is a field that the loser is to give
back, nobody but the restaurant can say what holds, and the decision is refused. Payments and moves are facts, of which
both sides count whatever is decided (`forked_payments.py` brings back those of an order).

The conflict is locked for the while. The change is recorded before the conflict says so: what breaks in between leaves
it open with a change that stands, and doing it again makes no second one.
"""

from datetime import datetime
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from services.sync.conflicts import store as conflict_store
from services.sync.conflicts.store import Fork, Side
from services.sync.difference import difference
from services.sync.head import commit, current_head, record_first
from shared.entities import inventory_item, registry
from shared.entities import order as orders
from shared.entities.contract import Head, encode, now
from shared.entities.entity import Entity
from shared.entities.order import Order, OrderStatus, payment_status
from shared.errors import Conflict, InvalidInput
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail

_OF_NO_SIDE = frozenset({"updated_at", "payment_status"})


class Differs(Struct, frozen=True, omit_defaults=True):
    """A leaf in which the two states differ; a side that lacks it is left out."""

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
    """What stands in PostgreSQL now: the winner, or what was built since."""


async def show(connection: Connection, id_: str) -> ShownFork:
    """Raises NotFound."""
    conflict = await conflict_store.one(connection, id_)
    winner, loser = await conflict_store.sides(connection, conflict)
    entity = registry.ENTITIES[conflict.entity]
    stored = await states.one(connection, entity, conflict.restaurant_id, conflict.entity_id)
    return ShownFork(
        conflict=conflict,
        winner=winner,
        loser=loser,
        differs=[
            Differs(one["path"], one.get("before", UNSET), one.get("after", UNSET))
            for one in difference(winner.state, loser.state)
        ],
        head=None if stored is None else stored.head,
    )


class ConflictDecisions:
    def __init__(self, postgres: Postgres, mirror: Mirror, rail: Rail) -> None:
        """`postgres` as the ops role."""
        self._postgres = postgres
        self._mirror = mirror
        self._rail = rail

    async def resolve(self, id_: str, *, keep: str, why: str, actor: str, role: str) -> Fork:
        """`keep`: the change that holds. Raises NotFound, InvalidInput, Conflict (`conflict_resolved`, `changed_since`,
        `version_conflict`, `out_of_stock`), Unavailable, OutcomeUnknown."""
        if not why.strip():
            raise InvalidInput("a reason is needed", field="why")
        with record_first("the conflict") as recorded:
            async with self._postgres.connection() as connection, connection.transaction():
                conflict = await conflict_store.take(connection, id_)
                winner, loser = await conflict_store.sides(connection, conflict)
                if keep not in (winner.change_id, loser.change_id):
                    raise InvalidInput("is neither of the two changes", field="keep")
                recorded.change_id = await self._hold(connection, conflict, winner, loser, keep, actor)
                return await conflict_store.resolve(
                    connection, conflict, keep=keep, change_id=recorded.change_id, why=why, actor=actor, role=role
                )

    async def _hold(
        self, connection: Connection, conflict: Fork, winner: Side, loser: Side, keep: str, actor: str
    ) -> str | None:
        """The id of the change that was needed, or None."""
        entity = registry.ENTITIES[conflict.entity]
        base = await current_head(connection, self._mirror, entity, conflict.restaurant_id, conflict.entity_id)
        if base is None:
            raise Conflict("nothing of it stands any more", code="changed_since", fields=[])
        if keep == winner.change_id:
            after = holding(entity, base[1], kept=winner.state, dropped=loser.state, strict=False)
        else:
            after = holding(entity, base[1], kept=loser.state, dropped=winner.state, strict=True)
        if after == base[1]:
            return None
        return await commit(self._rail, entity, event_between(entity, base[1], after), after, base, actor=actor)


def holding(entity: Entity, present: Any, *, kept: dict[str, Any], dropped: dict[str, Any], strict: bool) -> Any:
    """`present`, with what it has of `dropped` as `kept` had it. Pure. `strict`: raises Conflict (`changed_since`)
    where a field in which they differ has a third value by now; else that stays."""
    kept, dropped = (_plain(entity.decode_state(encode(side))) for side in (kept, dropped))
    after = _plain(present)
    left_alone = _OF_NO_SIDE | {facts.field for facts in entity.facts}
    third = []
    for name in sorted({*kept, *dropped} - left_alone):
        was, wanted, stands = (side.get(name, UNSET) for side in (dropped, kept, after))
        if was == wanted or stands == wanted:
            continue
        if stands != was:
            third.append(name)
        elif wanted is UNSET:
            del after[name]
        else:
            after[name] = wanted
    if strict and third:
        raise Conflict(
            f"{', '.join(third)} changed since: change it by hand, and keep the other one",
            code="changed_since",
            fields=third,
        )
    state = entity.decode_state(encode(after))
    if entity is inventory_item.ENTITY and state.quantity != present.quantity:
        # Each side has the sum of its own moves, and both moved.
        raise Conflict(
            "quantity moved on both sides: count it anew, and keep the one that stands",
            code="changed_since",
            fields=["quantity"],
        )
    return _order_again(present, state, now()) if entity is orders.ENTITY else state


def _order_again(before: Order, after: Order, at: datetime) -> Order:
    if _gone(before) and not _gone(after):
        # What it gave back it takes anew: the stock may have been counted meanwhile.
        holds = tuple(msgspec.structs.replace(hold, held_at=at) for hold in after.holds)
        after = msgspec.structs.replace(after, holds=holds)
    return msgspec.structs.replace(after, payment_status=payment_status(after.payments, after.total))


def _gone(order: Order) -> bool:
    return order.deleted_at is not None or order.status is OrderStatus.CANCELLED


def event_between(entity: Entity, before: Any, after: Any) -> str:
    """What those who follow the events are told. Pure."""
    if after.deleted_at and not before.deleted_at:
        return "deleted"
    return "restored" if before.deleted_at and not after.deleted_at and "restored" in entity.events else "updated"


def _plain(state: Any) -> dict[str, Any]:
    """As one of our own stores would have written it."""
    found: dict[str, Any] = msgspec.json.decode(encode(state))
    return found
