"""Repairs the differences between the two sides of the ledger: sends a change of the log to its lane again, or
publishes a change of PostgreSQL to the logs again.

Both are repeats with the same change id, so a wrong one costs a message and changes nothing: the PostgreSQL writer and
the mirror drop what they have. A publish that fails is tried again in the next round.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

import msgspec
import structlog

from services.sync.ledger.log_changes import changes_in
from services.sync.ledger.sides import LogOnly
from shared.entities.contract import Change, ChangeData, Lane, encode, encode_batch
from shared.messaging.log import LogReader
from shared.messaging.publisher import InDoubt, NotSent, Publisher
from shared.messaging.topology import LOG, REFERENCE_LOG, lane_queue
from shared.postgres.blocks import in_blocks
from shared.postgres.checkpoints import BEFORE_LOG
from shared.postgres.pool import Connection
from shared.settings import Settings

log = structlog.get_logger(__name__)

_PUBLISH_TIMEOUT_SECONDS = 10.0
_RECORDED = """
select change_id::text, restaurant_id::text, entity, entity_id::text, version, base_change_id::text, type, source, lane,
    accepted_at, traceparent, actor, data::text
from changes join unnest($1::uuid[], $2::uuid[]) as wanted (restaurant_id, change_id) using (restaurant_id, change_id)
"""


class Repairs:
    def __init__(self, settings: Settings, publisher: Publisher) -> None:
        self._settings = settings
        self._publisher = publisher

    async def resend(self, wanted: Mapping[str, LogOnly]) -> list[str]:
        """Reads these changes (change id -> where it is) in the log again, and sends each one to its lane alone.
        Returns the ids that the broker has confirmed."""
        sent: list[str] = []
        async with aclosing(self._events(wanted)) as events:
            async for change_id, event in events:
                if not await self._publish(lane_queue(Lane(wanted[change_id].lane)), event):
                    break
                sent.append(change_id)
        return sent

    async def _events(self, wanted: Mapping[str, LogOnly]) -> AsyncGenerator[tuple[str, bytes], None]:
        first = min(wanted.values(), key=lambda one: one.at.offset)
        last = max(one.at.offset for one in wanted.values())
        reader = LogReader(self._settings.rabbitmq_url, name="ledger-again", idle_seconds=5.0)
        missing, places = set(wanted), {one.at for one in wanted.values()}
        async with aclosing(reader.read("first" if first.before == BEFORE_LOG else first.before)) as batches:
            async for batch in batches:
                if batch.broken is not None:  # the leader notices the same, and begins a new session
                    return
                for entry in batch.entries:
                    if entry.position not in places:
                        continue
                    for seen, event in changes_in(entry.body)[0]:
                        if seen.id in missing and wanted[seen.id].at == entry.position:
                            missing.discard(seen.id)
                            yield seen.id, event
                if not missing or batch.last.offset >= last or batch.caught_up:
                    return

    async def republish(self, connection: Connection, wanted: Iterable[tuple[str, str]]) -> int:
        """Publishes changes of PostgreSQL, given as (restaurant id, change id), to the logs. Returns their number."""
        keys = list(wanted)
        restaurants, changes = [key[0] for key in keys], [key[1] for key in keys]
        done = 0
        async with aclosing(in_blocks(connection, _RECORDED, restaurants, changes, column="data")) as blocks:
            async for rows in blocks:
                for row in rows:
                    event = event_of(dict(row))
                    if row["lane"] != Lane.CRITICAL and not await self._publish(REFERENCE_LOG, event):
                        return done
                    if not await self._publish(LOG, event):
                        return done
                    done += 1
        return done

    async def _publish(self, queue: str, event: bytes) -> bool:
        try:
            await self._publisher.publish_to_queue(queue, encode_batch((event,)), timeout=_PUBLISH_TIMEOUT_SECONDS)
        except (NotSent, InDoubt) as error:
            log.warning("ledger_repair_waits", queue=queue, error=str(error))
            return False
        return True


def event_of(row: Mapping[str, Any]) -> bytes:
    """Returns the event of a row of `changes`, with its `data` exactly as it was received."""
    change = Change(
        id=row["change_id"],
        source=row["source"],
        type=row["type"],
        subject=f"{row['entity']}/{row['entity_id']}",
        time=row["accepted_at"],
        restaurantid=row["restaurant_id"],
        priority=Lane(row["lane"]).priority,
        entityversion=row["version"],
        basechangeid=row["base_change_id"],
        traceparent=row["traceparent"],
        actor=row["actor"],
        data=msgspec.json.decode(row["data"], type=ChangeData),
    )
    return encode(change)
