"""Finds gaps: versions without their predecessor in `changes`. The reconciler reports them, because a gap that stays
means that a change is lost."""

from typing import Any

import structlog

from shared.postgres.pool import Connection, Postgres

log = structlog.get_logger(__name__)

_MIN_AGE_MINUTES = 10
_MAX_AGE_MINUTES = 70

_GAPS = """
select c.restaurant_id::text, c.entity, c.entity_id::text, c.version
from changes c
where c.accepted_at between now() - make_interval(mins => $2) and now() - make_interval(mins => $1)
  and c.version > 1
  and not exists (
    select from changes p
    where p.restaurant_id = c.restaurant_id and p.entity = c.entity and p.entity_id = c.entity_id
      and p.version = c.version - 1
  )
limit 100
"""


async def list_gaps(connection: Connection, *, older_minutes: int, younger_minutes: int) -> list[dict[str, Any]]:
    """Returns up to 100 changes in this range of ages (in minutes) whose previous version is missing, because it is
    late or lost."""
    return [dict(row) for row in await connection.fetch(_GAPS, older_minutes, younger_minutes)]


async def report_gaps(postgres: Postgres) -> int:
    """Logs up to 100 gaps that are between 10 and 70 minutes old, and returns how many it logged. Younger gaps are
    normal, because changes may arrive in any order. Older gaps were logged while they were younger."""
    async with postgres.connection() as connection:
        found = await list_gaps(connection, older_minutes=_MIN_AGE_MINUTES, younger_minutes=_MAX_AGE_MINUTES)
    for gap in found:
        log.error("version_gap", **gap)
    return len(found)
