"""The sources of the ledger besides the change log: PostgreSQL, the queues, the journals on this host, the mirror."""

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from msgspec import Struct

from services.sync.ledger import queues
from services.sync.ledger import store as ledger_store
from services.sync.ledger.balance import AcceptedChange, is_id
from services.sync.ledger.store import LastHeartbeat
from shared.entities import registry
from shared.entities.contract import now
from shared.mirror.mirror import Mirror
from shared.observability.tracing import trace_id_of
from shared.postgres.pool import Postgres
from shared.rail.journal_file import Damaged, Name, list_entries, name_of
from shared.rail.salvage import Salvage
from shared.rail.set_aside import journals_in, readable
from shared.settings import Settings

log = structlog.get_logger(__name__)

_BLOCK = 5_000
_MIN_PENDING_AGE = timedelta(minutes=1)
_MAX_PENDING = 1_000


class Journals(Struct, frozen=True):
    waiting: dict[str, AcceptedChange]
    damaged: dict[str, AcceptedChange]
    """Change id -> change, for entries that no journal has intact."""
    depths: dict[str, int]
    unread: list[str]


class Depths(Struct, frozen=True):
    lanes: dict[str, int]
    """Lane -> messages in it. With the management API this includes the messages that a consumer holds."""
    unknown: dict[tuple[str, str], int]
    """(retrying or dead, lane) -> messages in such queues whose ids PostgreSQL does not know."""
    away: list[str]


def journals(folder: Path) -> Journals:
    """Reads all journals in the folder, also while their instances run. Changes nothing."""
    found = Journals({}, {}, {}, [])
    for path in journals_in(folder).values() if folder.exists() else ():
        try:
            waiting, damaged = list_entries(readable(path))
        except (sqlite3.Error, ValueError) as error:
            log.warning("journal_salvaged", journal=str(path), error=str(error))
            try:
                waiting, damaged = _salvaged(readable(path))
            except OSError:
                found.unread.append(path.name)
                continue
        found.depths[path.name] = len(waiting)
        found.waiting.update(_entries(waiting, path.name))
        found.damaged.update(_entries([one.name for one in damaged if one.name is not None], path.name))
    for change_id in found.waiting.keys() & found.damaged.keys():
        del found.damaged[change_id]
    return found


def _salvaged(path: Path) -> tuple[list[Name], list[Damaged]]:
    salvage = Salvage(path)
    return [name_of(lane, event) for lane, event in salvage.entries()], salvage.damaged()


def _entries(names: Sequence[Name], journal: str) -> dict[str, AcceptedChange]:
    return {
        one.change_id: AcceptedChange(
            change_id=one.change_id,
            restaurant_id=one.restaurant_id if is_id(one.restaurant_id) else "",
            subject=one.subject,
            version=one.version,
            lane=one.lane,
            accepted_at=one.accepted_at,
            trace_id=trace_id_of(one.traceparent),
            seen_in=journal,
        )
        for one in names
        if is_id(one.change_id)
    }


async def depths(settings: Settings, ops: Postgres) -> Depths:
    """Raises one of UNAVAILABLE."""
    found = await queues.look(settings, ops)
    async with ops.connection() as connection:
        noted = await ledger_store.retry_counts(connection)
    lanes: dict[str, int] = {}
    unknown: dict[tuple[str, str], int] = {}
    for queue in found.queues:
        if queue.lane is None:
            continue
        # An unknown depth counts as 1, because the queue may hold messages.
        count = 1 if queue.depth is None else queue.depth + (queue.dead_lettering or 0)
        if queue.kind == "lane":
            lanes[queue.lane] = count
        else:
            place = ("retrying" if queue.kind == "retry" else "dead", queue.lane)
            unknown[place] = unknown.get(place, 0) + count
    for lane, count in noted.items():
        unknown["retrying", lane] = max(0, unknown.get(("retrying", lane), 0) - count)
    return Depths(lanes, unknown, found.away)


async def heartbeats(ops: Postgres) -> dict[str, LastHeartbeat]:
    async with ops.connection() as connection:
        return await ledger_store.heartbeats(connection)


async def slugs(ops: Postgres) -> dict[str, str]:
    async with ops.connection() as connection:
        return await ledger_store.slugs(connection)


async def synced(ops: Postgres, entries: Sequence[AcceptedChange]) -> set[str]:
    found: set[str] = set()
    for block in _blocks([one for one in entries if one.restaurant_id]):
        async with ops.connection() as connection:
            found |= await ledger_store.synced(connection, [one.key for one in block])
    return found


async def dead(ops: Postgres, entries: Sequence[AcceptedChange]) -> dict[str, str]:
    """Change id -> open, replaying, discarded or edited."""
    found: dict[str, str] = {}
    for block in _blocks(entries):
        async with ops.connection() as connection:
            found |= await ledger_store.dead(connection, [one.change_id for one in block])
    return found


async def retrying(ops: Postgres, entries: Sequence[AcceptedChange]) -> set[str]:
    found: set[str] = set()
    for block in _blocks([one for one in entries if one.restaurant_id]):
        async with ops.connection() as connection:
            found |= await ledger_store.retrying(connection, [one.key for one in block])
    return found


async def successors(ops: Postgres, entries: Sequence[AcceptedChange]) -> dict[str, str]:
    if not entries:
        return {}
    async with ops.connection() as connection:
        return await ledger_store.successors(connection, [one.key for one in entries if one.restaurant_id])


async def pending_in_mirror(mirror: Mirror, since: datetime | None) -> list[AcceptedChange]:
    """Changes that are pending in the mirror for more than a minute and were accepted at or after `since`; at most the
    newest thousand of each entity and restaurant. Raises MirrorUnavailable, MirrorInDoubt."""
    found: list[AcceptedChange] = []
    newest = now() - _MIN_PENDING_AGE
    for restaurant in await mirror.restaurant_ids():
        for entity in registry.ENTITIES.values():
            ids = (await mirror.pending_ids(restaurant, entity.name))[:_MAX_PENDING]
            if not ids:
                continue
            accepted = await mirror.accepted_at(restaurant, entity.name, ids)
            _, documents = await mirror.read(restaurant, entity.name, ids)
            for id_, seconds, document in zip(ids, accepted, documents, strict=True):
                if seconds is None or document is None:
                    continue
                at = datetime.fromtimestamp(seconds, UTC)
                if at < newest and (since is None or at >= since):
                    head = document.head
                    found.append(
                        AcceptedChange(
                            change_id=head.change_id,
                            restaurant_id=restaurant,
                            subject=f"{entity.name}/{id_}",
                            version=head.version,
                            lane=entity.lane.value,
                            accepted_at=at,
                            trace_id=None,
                            seen_in="mirror",
                        )
                    )
    return found


def _blocks(entries: Sequence[AcceptedChange]) -> Iterator[Sequence[AcceptedChange]]:
    for start in range(0, len(entries), _BLOCK):
        yield entries[start : start + _BLOCK]
