"""Computes the sync status of a tenant: the numbers of its pending, synced, failed and conflicting entities."""

from collections.abc import Iterable
from typing import Any

from msgspec import Struct

from services.sync.mirror.thresholds import Above, warnings
from shared.entities import registry
from shared.entities.entity import Entity
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.settings import Settings


class Counts(Struct, frozen=True):
    """The number of entities in each sync state. A number is null while the store that has it is unavailable."""

    pending: int | None
    synced: int | None
    failed: int | None
    conflict: int | None


class SyncStatus(Struct, frozen=True):
    """The sync status of a restaurant. `unknown` lists the stores that are unavailable."""

    summary: str
    """The first of unknown, conflict, failed, pending, synced that applies."""
    above_threshold: bool
    warnings: list[Above]
    totals: Counts
    tables: dict[str, Counts]
    unknown: list[str]


_CONFLICTS = (
    "select entity, count(distinct entity_id) as open from conflicts"
    " where restaurant_id = $1 and resolved_at is null group by entity"
)


async def _stored(connection: Connection, entity: Entity, restaurant: str) -> int:
    count: int = await connection.fetchval(
        f"select count(*) from {entity.table.name} where restaurant_id = $1",  # noqa: S608  (a name of ours)
        restaurant,
    )
    return count


async def sync_status(settings: Settings, postgres: Postgres, mirror: Mirror, restaurant: str) -> dict[str, Any]:
    """Returns the sync status as plain values (`SyncStatus`). A failed change also counts as pending. `warnings` lists
    the numbers above their threshold."""
    tables: dict[str, dict[str, int | None]] = {}
    unknown = []
    try:
        async with postgres.tenant(restaurant) as connection:
            stored = {name: await _stored(connection, entity, restaurant) for name, entity in registry.ENTITIES.items()}
            conflicts = {row["entity"]: row["open"] for row in await connection.fetch(_CONFLICTS, restaurant)}
    except UNAVAILABLE:
        unknown.append("postgres")
        stored, conflicts = {}, {}
    for name in registry.ENTITIES:
        pending: int | None = None
        failed: int | None = None
        try:
            pending, failed = await mirror.counts(restaurant, name)
        except (MirrorUnavailable, MirrorInDoubt):
            if "mirror" not in unknown:
                unknown.append("mirror")
        tables[name] = {
            "pending": pending,
            "synced": stored.get(name),
            "failed": failed,
            "conflict": conflicts.get(name, 0) if stored else None,
        }
    totals = {state: _total(table[state] for table in tables.values()) for state in tables["order"]}
    above = warnings(settings, totals["pending"] or 0, totals["failed"] or 0)
    return {
        "summary": _summary(totals, unknown),
        "above_threshold": bool(above),
        "warnings": above,
        "totals": totals,
        "tables": tables,
        "unknown": unknown,
    }


def _total(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _summary(totals: dict[str, int | None], unknown: list[str]) -> str:
    """Returns the first of unknown, conflict, failed, pending, synced that applies."""
    if unknown:
        return "unknown"
    return next((state for state in ("conflict", "failed", "pending") if totals[state]), "synced")
