"""What stands of an entity, for those who build a change on it outside the orders service."""

from typing import Any

from shared.entities.contract import Standing
from shared.entities.entity import Entity
from shared.errors import Unavailable
from shared.mirror.connection import MirrorAway, MirrorInDoubt
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Connection


async def mirrored(mirror: Mirror, entity: Entity, restaurant: str, id_: str) -> tuple[Standing, Any] | None:
    """What a warm mirror has; None: it has none such. Raises Unavailable without a warm mirror: then nobody can say
    what stands."""
    try:
        warm, (document,) = await mirror.read(restaurant, entity.name, [id_])
    except (MirrorAway, MirrorInDoubt) as error:
        raise Unavailable("changes wait until the mirror is warm", retry_after=2.0) from error
    if not warm:
        raise Unavailable("changes wait until the mirror is warm", retry_after=2.0)
    return None if document is None else (document.standing, entity.decode_state(document.state))


async def stored(connection: Connection, entity: Entity, restaurant: str, id_: str) -> tuple[Standing, Any] | None:
    """What PostgreSQL has; `connection` as a role that sees this restaurant."""
    found = await states.one(connection, entity, restaurant, id_)
    return None if found is None else (found.standing, entity.decode_state(found.state))
