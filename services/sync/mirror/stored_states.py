"""Puts states of PostgreSQL into the mirror, for the mirror writer, the warm-up and the feed loop."""

from collections.abc import Sequence
from contextlib import aclosing

import structlog
from msgspec import structs

from services.sync.failures.classification import describe
from shared.entities import registry
from shared.entities.entity import Entity
from shared.mirror.mirror import Apply, Mirror
from shared.mirror.stored_heads import StoredHead
from shared.postgres import states
from shared.postgres.pool import Connection
from shared.postgres.states import StoredState

log = structlog.get_logger(__name__)

STATES_PER_SCRIPT = 250
"""The maximum number of states in one script: Redis runs no other command while a script runs."""


class Rewind(Exception):
    """Another mirror has replaced the one that was in use, or the log does not prove its position."""


def stored_state(entity: Entity, stored: StoredState) -> Apply:
    """Returns a state of PostgreSQL as it is applied to the mirror."""
    return Apply(entity, entity.decode_state(stored.state), stored.head, stored.state, stored.accepted_at, "stored")


def readable_states(entity: Entity, found: Sequence[StoredState]) -> list[Apply]:
    """Returns states of PostgreSQL as they are applied to the mirror, without those that this release cannot read,
    because a newer one has written them."""
    readable = []
    for stored in found:
        try:
            readable.append(stored_state(entity, stored))
        except Exception as error:  # noqa: BLE001  (the log names it, and the newer release loads it)
            log.error("state_not_loaded", entity=entity.name, change_id=stored.head.change_id, error=describe(error))
    return readable


async def load_states(mirror: Mirror, connection: Connection, entities: Sequence[StoredHead]) -> list[StoredHead]:
    """Writes the states of PostgreSQL to the mirror, and returns the written ones."""
    written = []
    for name, entity in registry.ENTITIES.items():
        if not (ids := [(one.restaurant_id, one.id) for one in entities if one.entity == name]):
            continue
        async with aclosing(states.find_states(connection, entity, ids)) as blocks:
            async for block in blocks:
                applied = readable_states(entity, block)
                await mirror.apply(applied)
                written += [StoredHead(one.state.restaurant_id, name, one.state.id, one.head) for one in applied]
    return written


async def compared_with_postgres(connection: Connection, late: Sequence[Apply]) -> list[Apply]:
    """Returns what to apply in place of late states whose document the mirror lacks: the state itself if PostgreSQL is
    behind it, the state of PostgreSQL if it belongs to the live window, or nothing."""
    found: list[Apply] = []
    for entity in {one.entity.name: one.entity for one in late}.values():
        of_kind = [one for one in late if one.entity.name == entity.name]
        ids = list({(one.state.restaurant_id, one.state.id) for one in of_kind})
        async with aclosing(states.find_states(connection, entity, ids)) as blocks:
            in_postgres = [one async for block in blocks for one in readable_states(entity, block)]
        stored = {(one.state.restaurant_id, one.state.id): one for one in in_postgres}
        for one in of_kind:
            known = stored.get((one.state.restaurant_id, one.state.id))
            if known is None or known.head < one.head:
                found.append(structs.replace(one, how="reveal"))
        found += [one for one in in_postgres if entity.live(one.state)]
    return found
