"""Computes the sync status: the numbers of pending, synced, failed and conflicting entities, of one restaurant or of
all of them.

`SyncStatus` is the reply of `/api/ops/sync`. `TerminalStatus` has the same numbers with the names of the contract that
terminals were written for, and is the reply of `/api/sync/status`.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

from msgspec import Struct

from services.sync.mirror.thresholds import Above, warnings
from shared.entities import registry
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Connection
from shared.settings import Settings

Connect = Callable[[], AbstractAsyncContextManager[Connection]]
"""Opens a connection that sees what the caller may see."""


class Counts(Struct, frozen=True):
    """The number of entities in each sync state. A number is null while its store is unavailable."""

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


class TerminalCounts(Struct, frozen=True):
    """The number of entities in each sync state. A number is null while its store is unavailable."""

    pending: int | None
    failed: int | None
    synced: int | None
    conflicts: int | None


class TerminalSummary(Struct, frozen=True, rename="camel"):
    total_tables: int
    tables_with_pending: int
    tables_with_failed: int
    tables_with_synced: int
    tables_with_conflicts: int


class TerminalStatus(Struct, frozen=True, rename="camel"):
    """The sync status with the names of the terminals' contract."""

    terminal_id: str | None
    """The terminal that the request named. The numbers are those of its restaurant."""
    tables: dict[str, TerminalCounts]
    """Name of the entity in the terminals' contract, such as SaleOrder -> numbers."""
    totals: TerminalCounts
    summary: TerminalSummary


_STORED = "select count(*) from {table} where {mine}"
_CONFLICTS = (
    "select entity, count(distinct entity_id) as open from conflicts"
    " where {mine} and resolved_at is null group by entity"
)


async def sync_status(settings: Settings, connect: Connect, mirror: Mirror, restaurant: str | None) -> SyncStatus:
    """Returns the sync status of a restaurant, or of all restaurants for None. A failed change also counts as pending.
    `warnings` lists the numbers above their threshold; thresholds are
    those of one restaurant."""
    # A condition such as `$1 is null or restaurant_id = $1` would keep PostgreSQL from using the index.
    mine, arguments = ("restaurant_id = $1", (restaurant,)) if restaurant else ("true", ())
    unknown = []
    stored: dict[str, int] = {}
    conflicts: dict[str, int] = {}
    try:
        async with connect() as connection:
            for name, entity in registry.ENTITIES.items():
                stored[name] = await connection.fetchval(_STORED.format(table=entity.table.name, mine=mine), *arguments)
            open_conflicts = await connection.fetch(_CONFLICTS.format(mine=mine), *arguments)
            conflicts = {row["entity"]: row["open"] for row in open_conflicts}
    except UNAVAILABLE:
        unknown.append("postgres")
        stored = {}
    unsynced: Mapping[str, tuple[int, int]] = {}
    try:
        unsynced = await _unsynced(mirror, [restaurant] if restaurant else await mirror.restaurant_ids())
    except (MirrorUnavailable, MirrorInDoubt):
        unknown.append("mirror")
    tables = {}
    for name in registry.ENTITIES:
        pending, failed = unsynced.get(name, (None, None))
        tables[name] = Counts(pending, stored.get(name), failed, conflicts.get(name, 0) if stored else None)
    totals = Counts(*(_total(getattr(table, state) for table in tables.values()) for state in Counts.__struct_fields__))
    above = warnings(settings, totals.pending or 0, totals.failed or 0) if restaurant else []
    return SyncStatus(_summary(totals, unknown), bool(above), above, totals, tables, unknown)


def terminal_status(found: SyncStatus, terminal_id: str | None) -> TerminalStatus:
    """Returns the status with the names of the terminals' contract."""
    tables = {registry.ENTITIES[name].wire_alias: _terminal_counts(counts) for name, counts in found.tables.items()}
    having = (
        sum(bool(getattr(counts, state)) for counts in tables.values())
        for state in ("pending", "failed", "synced", "conflicts")
    )
    return TerminalStatus(terminal_id, tables, _terminal_counts(found.totals), TerminalSummary(len(tables), *having))


def _terminal_counts(counts: Counts) -> TerminalCounts:
    return TerminalCounts(counts.pending, counts.failed, counts.synced, counts.conflict)


async def _unsynced(mirror: Mirror, restaurants: list[str]) -> dict[str, tuple[int, int]]:
    """Returns entity -> (pending, failed), summed over the restaurants. Raises MirrorUnavailable, MirrorInDoubt."""
    found = dict.fromkeys(registry.ENTITIES, (0, 0))
    for restaurant in restaurants:  # one after the other, so that a request never fills the connection to the mirror
        counts = await asyncio.gather(*(mirror.counts(restaurant, name) for name in found))
        for name, (pending, failed) in zip(found, counts, strict=True):
            found[name] = found[name][0] + pending, found[name][1] + failed
    return found


def _total(counts: Iterable[Any]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _summary(totals: Counts, unknown: list[str]) -> str:
    """Returns the first of unknown, conflict, failed, pending, synced that applies."""
    if unknown:
        return "unknown"
    return next((state for state in ("conflict", "failed", "pending") if getattr(totals, state)), "synced")
