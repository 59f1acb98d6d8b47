"""Reads the changes of an entity from PostgreSQL, so that a test can publish them again."""

from typing import Any

from msgspec import Raw

from shared.entities.contract import Change, ChangeData, Lane
from tests.rigs.restaurant import RestaurantRig
from tests.rigs.system import eventually

_CHANGES = """
select change_id::text as id, source, type, entity || '/' || entity_id as subject, accepted_at as time,
    restaurant_id::text as restaurantid, lane, version as entityversion, base_change_id::text as basechangeid,
    (data->'after')::text as after, (data->'before')::text as before
from changes where restaurant_id = $1 and entity_id = $2 order by version
"""


async def recorded(restaurant: RestaurantRig, id_: str, count: int) -> list[Change]:
    """Waits until PostgreSQL has `count` changes of the entity; returns them by version."""
    async with restaurant.system.database() as connection:

        async def look() -> Any:
            return await connection.fetch(_CHANGES, restaurant.id, id_)

        rows = await eventually(look, what=f"{count} changes of {id_}", until=lambda found: len(found) == count)
    found = []
    for row in rows:
        fields = dict(row)
        data = ChangeData(after=Raw(fields.pop("after").encode()), before=Raw(fields.pop("before").encode()))
        priority = Lane(fields.pop("lane")).priority
        found.append(Change(**fields, data=data, priority=priority))
    return found
