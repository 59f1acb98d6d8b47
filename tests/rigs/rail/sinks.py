"""The consumers of changes: the mirror writer and the PostgreSQL writer. They take the changes that a test delivers.

A test uses the real tables of PostgreSQL, or a model of a few lines. The model is written independently of the code
that it checks."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.sync.heartbeat import HeartbeatMonitor
from services.sync.mirror.mirror_writer import MirrorWriter
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import registry
from shared.entities.contract import Change
from shared.entities.entity import Entity
from shared.messaging.log import LogEntry
from shared.messaging.position import LogPosition, checksum
from shared.mirror.mirror import NOTHING_APPLIED, Apply, Mirror
from shared.mirror.stored_heads import StoredHead
from shared.observability.metrics import Metrics, WriterMetrics
from shared.observability.tracing import Tracer
from shared.postgres import states
from shared.postgres.pool import Connection, Postgres, PostgresUnavailable
from shared.settings import Settings
from tests.rigs.rail.changes import State, applied


class NoPostgres(Postgres):
    """A PostgreSQL that never answers."""

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        raise PostgresUnavailable("this test has no PostgreSQL")
        yield


def mirror_writer(settings: Settings, mirror: Mirror, *, postgres: Postgres | None = None) -> MirrorWriter:
    """Returns a mirror writer, not started. Without `postgres`, PostgreSQL is unavailable to it."""
    nothing: Any = None
    watch, tracer = HeartbeatMonitor(settings), Tracer("test", settings)
    postgres = postgres or NoPostgres("", settings)
    return MirrorWriter(settings, postgres, mirror, nothing, watch, tracer, WriterMetrics(Metrics()))


async def read_log(writer: MirrorWriter, log: Sequence[LogEntry], at: LogPosition, count: int) -> LogPosition:
    """The mirror writer reads up to `count` messages after `at`, which the mirror has reached. Returns its new
    position."""
    for entry in log[at.offset + 1 :][:count]:
        await writer.apply_entries([entry], at, entry.position)
        at = entry.position
    return at


async def read_again(writer: MirrorWriter, messages: Iterable[bytes], at: LogPosition) -> None:
    """The mirror writer reads messages in any order; its position in the log stays."""
    for body in messages:
        await writer.apply_entries([LogEntry(LogPosition(0, checksum(body)), "critical", body)], at, None)


class PostgresTables:
    """The tables of one restaurant. After each write, the states of the written changes are settled in `mirror`."""

    def __init__(self, postgres: Postgres, mirror: Mirror) -> None:
        self._postgres, self._mirror = postgres, mirror

    async def take(self, changes: Iterable[Change]) -> None:
        """Writes the changes in one batch."""
        unique = list({change.id: change for change in changes}.values())
        read = [(change, *registry.read(change)) for change in unique]
        async with self._postgres.connection() as connection:
            written = [DecodedChange(entity.lane, entity, change, state) for change, entity, state in read]
            await write_batch(connection, written, timeout_seconds=5.0)
        for change, entity, _ in read:
            standing = StoredHead(change.restaurantid, entity.name, change.entity_id, change.head)
            await self._mirror.settle([standing])

    async def find(self, entity: Entity, restaurant: str, id_: str) -> State | None:
        async with self._postgres.connection() as connection:
            stored = await states.find_state(connection, entity, restaurant, id_)
        return (stored.head, entity.decode_state(stored.state)) if stored else None


class PostgresModel:
    """Promise 5: whatever the order and repetition, the largest (version, change id) wins, and every change is kept."""

    def __init__(self) -> None:
        self.changes: dict[str, Change] = {}
        self.heads: dict[str, Change] = {}

    def take(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self.changes.setdefault(change.id, change)
            known = self.heads.get(change.entity_id)
            if known is None or (change.entityversion, change.id) > (known.entityversion, known.id):
                self.heads[change.entity_id] = change

    def find(self, id_: str) -> State | None:
        change = self.heads.get(id_)
        return (change.head, registry.read(change)[1]) if change else None

    async def fill(self, mirror: Mirror) -> LogPosition:
        """Fills an empty mirror, as the mirror writer does from the tables."""
        await mirror.begin_log()
        assert await mirror.apply(self._stored(), at=NOTHING_APPLIED) is not None
        return NOTHING_APPLIED

    async def tell(self, mirror: Mirror) -> None:
        """Brings a mirror to what the tables have, as the feed loop does."""
        assert await mirror.apply(self._stored()) is not None

    def _stored(self) -> list[Apply]:
        return [applied(one, "stored") for one in self.heads.values()]
