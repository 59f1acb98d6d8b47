"""Deciding a conflict: of two changes that could not both stand, which one holds. The API and the command line both
come here.

In every store the one with the larger (version, change id) stands: a rule, not a judgement. Where it is the right one
the conflict is closed, and nothing else happens. Where the other one is, a new change at head + 1 gives the entity what
differs between the two as the other had it; what was changed since then stays. Payments and moves are facts, of which
both sides count whatever is decided (`forked_payments.py` brings back those of an order).

The conflict is locked for the while. The change is recorded before the conflict says so: what breaks in between leaves
it open with a change that stands, and doing it again makes no second one.
"""

from typing import Any

import msgspec
from msgspec import UNSET, Struct

from services.sync.editing import difference
from services.sync.standing import commit, mirrored, stored
from shared.entities import order as orders
from shared.entities import registry
from shared.entities.contract import encode
from shared.entities.entity import Entity
from shared.entities.order import payment_status
from shared.errors import Conflict, InvalidInput, Unavailable
from shared.mirror.mirror import Mirror
from shared.postgres import conflicts
from shared.postgres.conflicts import Fork, Side
from shared.postgres.pool import AWAY, Connection, Postgres
from shared.rail.commit import Rail

_OF_NO_SIDE = frozenset({"updated_at", "payment_status"})


class Differs(Struct, frozen=True, omit_defaults=True):
    """A leaf in which the two states differ; a side that lacks it is left out."""

    path: str
    stands: Any = UNSET
    other: Any = UNSET


class ShownFork(Struct, frozen=True, kw_only=True):
    conflict: Fork
    stands: Side
    """The side with the larger (version, change id)."""
    other: Side
    differs: list[Differs]


async def show(connection: Connection, id_: str) -> ShownFork:
    """Raises NotFound."""
    conflict = await conflicts.one(connection, id_)
    stands, other = await conflicts.sides(connection, conflict)
    differs = [
        Differs(one["path"], one.get("before", UNSET), one.get("after", UNSET))
        for one in difference(stands.state, other.state)
    ]
    return ShownFork(conflict=conflict, stands=stands, other=other, differs=differs)


class Deciding:
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
        try:
            async with self._postgres.connection() as connection, connection.transaction():
                conflict = await conflicts.take(connection, id_)
                stands, other = await conflicts.sides(connection, conflict)
                if keep not in (stands.change_id, other.change_id):
                    raise InvalidInput("is neither of the two changes", field="keep")
                change_id = None
                if keep == other.change_id:
                    change_id = await self._bring_back(connection, conflict, stands, other, actor)
                return await conflicts.resolve(
                    connection, conflict, keep=keep, change_id=change_id, why=why, actor=actor, role=role
                )
        except AWAY as error:
            raise Unavailable("conflicts wait for the database", retry_after=2.0) from error

    async def _bring_back(
        self, connection: Connection, conflict: Fork, stands: Side, other: Side, actor: str
    ) -> str | None:
        """The id of the change, or None where what stands says so already."""
        entity = registry.ENTITIES[conflict.entity]
        base = await mirrored(self._mirror, entity, conflict.restaurant_id, conflict.entity_id)
        if base is None:
            base = await stored(connection, entity, conflict.restaurant_id, conflict.entity_id)
        if base is None:
            raise Conflict("nothing of it stands any more: keep the other side", code="changed_since", fields=[])
        after = with_the_other(entity, base[1], stands.state, other.state)
        if after == base[1]:
            return None
        event = "deleted" if after.deleted_at and not base[1].deleted_at else "updated"
        return await commit(self._rail, entity, event, after, base, actor=actor)


def with_the_other(entity: Entity, now_stands: Any, stood: dict[str, Any], other: dict[str, Any]) -> Any:
    """What stands now, with what differs between the two sides as the other one had it. Pure. Raises Conflict
    (`changed_since`): somebody has given one of these fields a third value."""
    left_alone = _OF_NO_SIDE | {facts.field for facts in entity.facts}
    present = _plain(now_stands)
    stood, other = (_plain(entity.decode_state(encode(side))) for side in (stood, other))
    fields = [
        name
        for name in sorted({*stood, *other})
        if name not in left_alone and stood.get(name, UNSET) != other.get(name, UNSET)
    ]
    third = [
        name for name in fields if present.get(name, UNSET) not in (stood.get(name, UNSET), other.get(name, UNSET))
    ]
    if third:
        raise Conflict(
            f"{', '.join(third)} changed since: change it by hand, and keep the side that stands",
            code="changed_since",
            fields=third,
        )
    for name in fields:
        if name in other:
            present[name] = other[name]
        else:
            present.pop(name, None)
    after = entity.decode_state(encode(present))
    if entity is orders.ENTITY:
        after = msgspec.structs.replace(after, payment_status=payment_status(after.payments, after.total))
    return after


def _plain(state: Any) -> dict[str, Any]:
    """As one of our own stores would have written it."""
    found: dict[str, Any] = msgspec.json.decode(encode(state))
    return found
