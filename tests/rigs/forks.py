"""Forks for tests: two changes that claim the same version of one entity."""

from typing import Any

from shared.entities.contract import Change
from shared.entities.entity import Entity
from tests.rigs.system import System, eventually


async def wait_stored(system: System, entity: Entity, id_: str) -> tuple[Any, str]:
    """Waits until PostgreSQL has the entity; returns (its state, the id of its change)."""

    async def look() -> Any:
        async with system.database() as connection:
            return await connection.fetchrow(
                "select change_id::text, (data->'after')::text as state from changes where entity_id = $1", id_
            )

    row = await eventually(look, what=f"the {entity.name} in PostgreSQL")
    return entity.decode_state(row["state"].encode()), row["change_id"]


def fork(first: Change, second: Change) -> tuple[Change, Change]:
    """Returns (winner, loser) by the guard."""
    return (first, second) if first.head > second.head else (second, first)
