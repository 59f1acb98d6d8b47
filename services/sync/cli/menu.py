"""Changes a dish from the command line: reads the head of the dish, changes its state and commits a new version."""

from uuid import UUID

import msgspec

from shared.entities import menu_item
from shared.entities.contract import now
from shared.errors import NotFound
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Heads

_ENTITY = menu_item.ENTITY
_BETWEEN = """
select id::text, name from menu_items where restaurant_id = $1 and id between $2 and $3 order by id limit $4
"""


async def dishes_between(
    restaurant: str, connection: Connection, first: UUID, last: UUID, limit: int
) -> list[tuple[str, str]]:
    """Returns (id, name) of the dishes of a restaurant whose ids are from `first` to `last`, in order."""
    return [tuple(row) for row in await connection.fetch(_BETWEEN, restaurant, first, last, limit)]


async def edit_dish(
    postgres: Postgres,
    mirror: Mirror,
    rail: Rail,
    restaurant: str,
    dish_id: str,
    *,
    price: int | None = None,
    available: bool | None = None,
) -> bytes:
    """Commits the next version of a dish and returns its encoded state. Raises NotFound, ClaimLost if another change
    came first, and Unavailable while the mirror is cold."""
    found = await Heads(mirror, lambda _: postgres.connection()).head(_ENTITY, restaurant, dish_id)
    if found is None:
        raise NotFound("no such dish")
    before = found.state
    at = now()
    after = msgspec.structs.replace(
        before,
        price=before.price if price is None else price,
        is_available=before.is_available if available is None else available,
        updated_at=at,
    )
    draft = Draft(entity=_ENTITY, event="updated", state=after, base=found, at=at, source="sync")
    return (await rail.commit(draft)).raw
