"""Reads depths, rates and ages of the queues, for operators.

Depths and rates come from the management API, which is asked as a read-only user. While it is unavailable, the broker
gives the depths, and there are no rates. While both are unavailable, only the ages are known, from PostgreSQL. Nothing
here takes a message out of a queue, because that would count as a delivery.
"""

import asyncio
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote

import structlog
from aiormq.exceptions import ChannelNotFoundEntity
from msgspec import Struct

from shared.entities.contract import Lane, now
from shared.messaging import declare, topology
from shared.messaging.management import ask, vhost_of
from shared.messaging.publisher import BROKEN_LINK, closed_channel_as_connection_error
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_COLUMNS = (
    "name,messages,messages_ready,messages_unacknowledged,messages_dlx,consumers,"
    "message_stats.publish_details.rate,message_stats.deliver_get_details.rate,message_stats.ack_details.rate"
)
_TIMEOUT_SECONDS = 3.0
_HEARTBEATS = "select lane, sent_at from last_heartbeats"
_RETRYING = "select lane, count(*)::int8 as retrying, min(failed_at) as oldest from retries group by lane"


class QueueStatus(Struct, frozen=True, kw_only=True):
    name: str
    kind: Literal["lane", "retry", "dead", "log"]
    lane: str | None
    depth: int | None
    """The number of messages; None if it is unknown."""
    unacknowledged: int | None = None
    dead_lettering: int | None = None
    """The number of expired messages that leave a retry queue now. `depth` does not include them."""
    consumers: int | None = None
    in_per_second: float | None = None
    out_per_second: float | None = None
    oldest_seconds: float | None = None
    """An upper bound for the age of the oldest message. For a lane, it is the age of the newest heartbeat that came out
    of the lane."""


class QueuesReport(Struct, frozen=True):
    source: Literal["management", "broker", "none"]
    queues: list[QueueStatus]
    heartbeat_age_seconds: dict[str, float]
    retrying: dict[str, int]
    """Lane -> number of changes in its retry queues, according to PostgreSQL."""
    unavailable: list[str]
    """The sources that were unavailable: management, rabbitmq or postgres."""


async def queues_report(settings: Settings, postgres: Postgres) -> QueuesReport:
    """Asks all sources. Never raises because of an unavailable source. `postgres`: a pool of the ops role."""
    unavailable: list[str] = []
    source: Literal["management", "broker", "none"] = "management"
    try:
        found = await asyncio.to_thread(_from_management, settings)
    except (OSError, ValueError) as error:
        log.warning("management_unavailable", error=str(error) or type(error).__name__)
        unavailable.append("management")
        source = "broker"
        try:
            with closed_channel_as_connection_error():
                found = await _from_broker(settings)
        except BROKEN_LINK as broken:
            log.warning("broker_unavailable", error=str(broken) or type(broken).__name__)
            unavailable.append("rabbitmq")
            found, source = {}, "none"
    heartbeats: dict[str, datetime] = {}
    retries: dict[str, tuple[int, datetime]] = {}
    try:
        async with postgres.connection() as connection:
            heartbeats = {row["lane"]: row["sent_at"] for row in await connection.fetch(_HEARTBEATS)}
            retries = {row["lane"]: (row["retrying"], row["oldest"]) for row in await connection.fetch(_RETRYING)}
    except UNAVAILABLE:
        unavailable.append("postgres")
    at = now()
    ages = {lane: round((at - sent).total_seconds(), 1) for lane, sent in heartbeats.items()}
    oldest = {lane: round((at - failed).total_seconds(), 1) for lane, (_, failed) in retries.items()}
    queues = [_queue(name, kind, lane, found, ages, oldest) for name, kind, lane in _all(settings)]
    return QueuesReport(source, queues, ages, {lane: count for lane, (count, _) in retries.items()}, unavailable)


def _all(settings: Settings) -> list[tuple[str, Literal["lane", "retry", "dead", "log"], str | None]]:
    lanes: list[tuple[str, Literal["lane", "retry", "dead", "log"], str | None]] = []
    for lane in Lane:
        lanes.append((topology.lane_queue(lane), "lane", lane.value))
        lanes += [
            (topology.retry_queue(lane, step), "retry", lane.value) for step in topology.retry_delays_ms(settings)
        ]
        lanes.append((topology.dead_queue(lane), "dead", lane.value))
    logs = [(queue.name, "log", None) for queue in topology.logs(settings)]
    return [*lanes, (topology.MIRROR_DEAD, "dead", None), *logs]  # type: ignore[list-item]


def _queue(
    name: str,
    kind: Literal["lane", "retry", "dead", "log"],
    lane: str | None,
    found: dict[str, dict[str, Any]],
    ages: dict[str, float],
    oldest: dict[str, float],
) -> QueueStatus:
    seen = found.get(name, {})
    depth = seen.get("messages")
    waiting = (depth or 0) + (seen.get("messages_dlx") or 0)
    age = None
    if waiting and lane is not None:
        age = ages.get(lane) if kind == "lane" else oldest.get(lane) if kind == "retry" else None
    stats = seen.get("message_stats") or {}
    return QueueStatus(
        name=name,
        kind=kind,
        lane=lane,
        depth=depth,
        unacknowledged=seen.get("messages_unacknowledged"),
        dead_lettering=seen.get("messages_dlx"),
        consumers=seen.get("consumers"),
        in_per_second=(stats.get("publish_details") or {}).get("rate"),
        out_per_second=(stats.get("ack_details") or stats.get("deliver_get_details") or {}).get("rate"),
        oldest_seconds=age,
    )


def _from_management(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns name -> queue, as the management API describes it. Raises OSError (also for an HTTP error) or
    ValueError."""
    if not settings.rabbitmq_watcher_url:
        raise OSError("the setting TICKETRAIL_RABBITMQ_WATCHER_URL is empty")
    vhost = quote(vhost_of(settings.rabbitmq_url), safe="")
    found: Any = ask(
        settings.rabbitmq_watcher_url, "GET", f"/api/queues/{vhost}?columns={_COLUMNS}", timeout=_TIMEOUT_SECONDS
    )
    return {queue["name"]: queue for queue in found}


async def _from_broker(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns name -> depth and consumers, in the format of the management API. Raises one of BROKEN_LINK."""
    found: dict[str, dict[str, Any]] = {}
    async with (
        asyncio.timeout(_TIMEOUT_SECONDS),
        await declare.connect(settings.rabbitmq_url, timeout=_TIMEOUT_SECONDS) as connection,
    ):
        for name, _, _ in _all(settings):
            # Use a new channel for each queue: a missing queue closes its channel, and a robust channel would answer
            # from its cache.
            channel = await connection.channel()
            try:
                declared = (await channel.declare_queue(name, passive=True)).declaration_result
            except ChannelNotFoundEntity:
                continue
            found[name] = {"messages": declared.message_count, "consumers": declared.consumer_count}
            await channel.close()
    return found
