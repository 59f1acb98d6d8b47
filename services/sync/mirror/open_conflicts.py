"""Sets the sync state `conflict` in the mirror, so that it agrees with PostgreSQL, and counts open conflicts.

The feed loop (feed_loop.py) tells the mirror the other sync states. This module reads PostgreSQL and writes only the
mirror.
"""

import math

from shared.mirror import keys
from shared.mirror.mirror import Mirror
from shared.postgres import states
from shared.postgres.pool import Postgres


class OpenConflicts:
    """Every method raises MirrorUnavailable, MirrorInDoubt or one of UNAVAILABLE if a store does not answer."""

    def __init__(self, postgres: Postgres, mirror: Mirror) -> None:
        """`postgres`: a pool of the writer role."""
        self._postgres = postgres
        self._mirror = mirror
        self.number = math.nan
        """The number of entities with an open conflict in all restaurants at the last count; NaN while unknown."""

    async def note(self) -> None:
        """Sets and clears the state `conflict` in the mirror, and counts the open conflicts."""
        # The mirror is read first. Otherwise a conflict that opens between the two reads would be cleared in the
        # mirror.
        try:
            in_mirror = await self._mirror.conflicts()
        finally:  # count conflicts even if the mirror is unavailable, because most of them arise while it is lost
            in_postgres = await self._open_conflicts()
        await self._mirror.note_conflicts(sorted(in_postgres - in_mirror), sorted(in_mirror - in_postgres))

    async def _open_conflicts(self) -> set[str]:
        self.number = math.nan
        async with self._postgres.connection() as connection:
            found = await states.list_conflicts(connection)
        self.number = len(found)
        return {keys.member(*entity_key) for entity_key in found}
