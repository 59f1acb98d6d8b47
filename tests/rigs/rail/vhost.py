"""Rails that share a vhost of a real RabbitMQ, and functions that read back their messages."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import aio_pika

from shared.entities.contract import Change, Lane
from shared.messaging import declare, topology
from shared.rail.journal import Journal
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.changes import changes_in
from tests.rigs.rail.instance import RailRig
from tests.rigs.rail.mirror_server import MirrorServer
from tests.rigs.servers import RabbitMQ, Redis, Servers
from tests.rigs.system import eventually

LANE = topology.lane_queue(Lane.CRITICAL)
# The timeout is long, because a machine that stalls for a moment must not look like an unavailable server.
_TIMEOUT_SECONDS = 5.0
_FROZEN_TIMEOUT_SECONDS = 0.5
_TIMEOUTS = ("redis", "publish", "claim", "reveal")
_STALE_SECONDS = 0.15


class VhostRail(RailRig):
    """`number` is the number of the instance, which also names its series of order numbers."""

    def __init__(self, number: int, settings: Settings, restaurant: str, journal: Journal | None) -> None:
        super().__init__(settings, MirrorServer(settings.redis_url), restaurant=restaurant, journal=journal)
        self.number, self.url = number, settings.rabbitmq_url

    async def queued(self, *, queue: str = LANE, at_least: int = 0) -> list[list[Change]]:
        """Waits for `at_least` messages in a lane's queue; takes all that are there and returns their changes."""
        messages: list[list[Change]] = []

        async def take() -> int:
            async with await aio_pika.connect(self.url, timeout=10) as connection:
                declared = await (await connection.channel()).get_queue(queue, ensure=False)
                while message := await declared.get(fail=False, timeout=10):
                    messages.append(changes_in(message.body))
                    await message.ack()
            return len(messages)

        await eventually(take, what=f"{at_least} messages in {queue}", until=lambda n: n >= at_least)
        return messages


class Vhost:
    """Makes rigs of one restaurant with a warm mirror; by default they use the Redis of the run."""

    def __init__(self, servers: Servers, url: str, folder: Path) -> None:
        self._servers, self._url, self._folder = servers, url, folder
        self._restaurant = builders.new_id()
        self.made: list[VhostRail] = []

    async def instance(
        self,
        *,
        redis: Redis | None = None,
        publisher: bool = True,
        journal_bytes: int = 1 << 24,
        timeout_seconds: float = _TIMEOUT_SECONDS,
        stale_seconds: float = _STALE_SECONDS,
    ) -> VhostRail:
        """Makes an instance, which connects to the broker now if `publisher` is true. `journal_bytes` is the size limit
        of its journal; 0 means no journal."""
        number = len(self.made) + 1
        timeouts: dict[str, Any] = {f"{name}_timeout_seconds": timeout_seconds for name in _TIMEOUTS}
        settings = Settings(
            _env_file=None,
            rabbitmq_url=self._url,
            redis_url=(redis or self._servers.redis).url,
            claim_stale_seconds=stale_seconds,
            publish_concurrency=2,
            **timeouts,
        )
        path = self._folder / f"{number}.sqlite"
        journal = Journal(path, instance=number, max_bytes=journal_bytes) if journal_bytes else None
        rig = VhostRail(number, settings, self._restaurant, journal)
        self.made.append(rig)
        await rig.up(publisher=publisher)
        await rig.server.warm()
        return rig

    @asynccontextmanager
    async def frozen(self, server: RabbitMQ | Redis) -> AsyncIterator[VhostRail]:
        """Freezes a server of the run for the block; yields another instance, which waits for it only briefly."""
        brief = await self.instance(timeout_seconds=_FROZEN_TIMEOUT_SECONDS)
        await brief.mirror.check()
        await asyncio.to_thread(server.freeze)
        try:
            yield brief
        finally:
            await asyncio.to_thread(server.thaw)


@asynccontextmanager
async def open_vhost(servers: Servers, folder: Path) -> AsyncIterator[Vhost]:
    name = f"rail-{uuid4().hex[:8]}"
    url = await asyncio.to_thread(servers.rabbitmq.make_vhost, name)
    settings = Settings(_env_file=None, rabbitmq_url=url, change_log_segment_bytes=1_000_000)
    async with await declare.connect(url) as connection:
        await declare.declare(connection, settings)
        await declare.declare_logs(connection, settings)
    vhost = Vhost(servers, url, folder)
    try:
        yield vhost
    finally:
        for rig in vhost.made:
            await rig.down()
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, name)


def ids(messages: list[list[Change]]) -> list[str]:
    return [change.id for message in messages for change in message]
