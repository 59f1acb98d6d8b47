"""Reads the sources of the ledger other than the change log: PostgreSQL, the queues, the journals on this host, the
mirror."""

import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import structlog
from msgspec import Struct

from services.sync.ledger import queues
from services.sync.ledger import store as ledger_store
from services.sync.ledger.balance import AcceptedChange, is_id
from shared.entities import registry
from shared.entities.contract import now
from shared.mirror.mirror import Mirror
from shared.observability.tracing import trace_id_of
from shared.postgres.pool import Postgres
from shared.rail.journal_file import Damaged, Name, list_entries, name_of
from shared.rail.journal_salvage import Salvage
from shared.rail.set_aside import journals_in, readable
from shared.settings import Settings

log = structlog.get_logger(__name__)

_CHUNK_SIZE = 5_000
_MIN_PENDING_AGE = timedelta(minutes=1)
_MAX_PENDING = 1_000


class Journals(Struct, frozen=True):
    waiting: dict[str, AcceptedChange]
    """Change id -> change, for intact entries."""
    damaged: dict[str, AcceptedChange]
    """Change id -> change, for damaged entries without an intact copy in any journal."""
    depths: dict[str, int]
    """Name of a journal -> number of its intact entries."""
    unreadable: list[str]
    """The names of journals that could not be read."""


class Depths(Struct, frozen=True):
    lanes: dict[str, int]
    """Lane -> number of messages. From the management API, it includes the messages that consumers hold."""
    unknown: dict[tuple[str, str], int]
    """(retrying or dead, lane) -> number of messages in such queues that PostgreSQL does not list."""
    unavailable: list[str]
    """The sources that were unavailable."""


def journals(folder: Path) -> Journals:
    """Reads all journals in the folder without changing them. Their instances may run."""
    found = Journals({}, {}, {}, [])
    for path in journals_in(folder).values() if folder.exists() else ():
        try:
            waiting, damaged = list_entries(readable(path))
        except (sqlite3.Error, ValueError) as error:
            log.warning("journal_salvaged", journal=str(path), error=str(error))
            try:
                waiting, damaged = _salvaged(readable(path))
            except OSError:
                found.unreadable.append(path.name)
                continue
        found.depths[path.name] = len(waiting)
        found.waiting.update(_entries(waiting, path.name))
        found.damaged.update(_entries([entry.name for entry in damaged if entry.name is not None], path.name))
    for change_id in found.waiting.keys() & found.damaged.keys():
        del found.damaged[change_id]
    return found


def _salvaged(path: Path) -> tuple[list[Name], list[Damaged]]:
    salvage = Salvage(path)
    return [name_of(lane, event) for lane, event in salvage.entries()], salvage.damaged()


def _entries(names: Sequence[Name], journal: str) -> dict[str, AcceptedChange]:
    return {
        name.change_id: AcceptedChange(
            change_id=name.change_id,
            restaurant_id=name.restaurant_id if is_id(name.restaurant_id) else "",
            subject=name.subject,
            version=name.version,
            lane=name.lane,
            accepted_at=name.accepted_at,
            trace_id=trace_id_of(name.traceparent),
            seen_in=journal,
        )
        for name in names
        if is_id(name.change_id)
    }


async def depths(settings: Settings, ops: Postgres) -> Depths:
    """Returns the depths of the queues. Raises one of UNAVAILABLE."""
    found = await queues.queues_report(settings, ops)
    async with ops.connection() as connection:
        listed = await ledger_store.retry_counts(connection)
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
    for lane, count in listed.items():
        unknown["retrying", lane] = max(0, unknown.get(("retrying", lane), 0) - count)
    return Depths(lanes, unknown, found.unavailable)


async def heartbeats(ops: Postgres) -> dict[str, datetime]:
    async with ops.connection() as connection:
        return await ledger_store.heartbeats(connection)


async def slugs(ops: Postgres) -> dict[str, str]:
    async with ops.connection() as connection:
        return await ledger_store.slugs(connection)


async def synced(ops: Postgres, entries: Sequence[AcceptedChange]) -> set[str]:
    found: set[str] = set()
    for block in _blocks([change for change in entries if change.restaurant_id]):
        async with ops.connection() as connection:
            found |= await ledger_store.synced(connection, [change.key for change in block])
    return found


async def dead(ops: Postgres, entries: Sequence[AcceptedChange]) -> dict[str, str]:
    """Returns change id -> open, replaying, discarded or edited, for changes with a dead letter."""
    found: dict[str, str] = {}
    for block in _blocks(entries):
        async with ops.connection() as connection:
            found |= await ledger_store.dead(connection, [change.change_id for change in block])
    return found


async def retrying(ops: Postgres, entries: Sequence[AcceptedChange]) -> set[str]:
    found: set[str] = set()
    for block in _blocks([change for change in entries if change.restaurant_id]):
        async with ops.connection() as connection:
            found |= await ledger_store.retrying(connection, [change.key for change in block])
    return found


async def successors(ops: Postgres, entries: Sequence[AcceptedChange]) -> dict[str, str]:
    if not entries:
        return {}
    async with ops.connection() as connection:
        return await ledger_store.successors(connection, [change.key for change in entries if change.restaurant_id])


async def pending_in_mirror(mirror: Mirror, since: datetime | None) -> list[AcceptedChange]:
    """Returns changes that are pending in the mirror for more than a minute and were accepted at or after `since`; at
    most the newest thousand per entity and restaurant. Raises MirrorUnavailable, MirrorInDoubt."""
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
    for start in range(0, len(entries), _CHUNK_SIZE):
        yield entries[start : start + _CHUNK_SIZE]
