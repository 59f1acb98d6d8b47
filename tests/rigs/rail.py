"""A rail in this process with a vhost of its own and a mirror that the test warms; reads back what it published."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import aio_pika
from msgspec import structs

from shared.entities.contract import Change, Head, Lane, decode_change, encode, now, split_batch
from shared.entities.order import ENTITY as ORDER
from shared.entities.order import Order
from shared.messaging import declare, topology
from shared.messaging.publisher import Publisher
from shared.mirror import keys
from shared.mirror.mirror import LogState, Mirror
from shared.rail.commit import Committed, Rail
from shared.rail.draft import Draft, change_of
from shared.rail.drain import Drainer
from shared.rail.journal import Journal
from shared.rail.record import Recorder
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.servers import RabbitMQ, Redis, Servers
from tests.rigs.system import eventually

DAY = "2026-03-14"
STALE_SECONDS = 0.15
# Long, because a machine that stalls for a moment must not look like an unavailable server. While a test freezes a
# server, the short timeout applies.
TIMEOUT_SECONDS, FROZEN_TIMEOUT_SECONDS = 5.0, 0.5
LANE = topology.lane_queue(Lane.CRITICAL)


class RailRig:
    """One instance of a service with a rail."""

    def __init__(self, url: str, redis: Redis, folder: Path, *, instance: int = 1, journal: bool = True) -> None:
        self.url, self.redis, self.folder = url, redis, folder
        self.mirror = Mirror(redis.url, timeout=TIMEOUT_SECONDS, stale_seconds=STALE_SECONDS)
        self.publisher = Publisher(url, topology.CHANGES, queues=topology.bound_queues(), timeout=TIMEOUT_SECONDS)
        self.journal = Journal(folder / f"{instance}.sqlite", instance=instance, max_bytes=1 << 24) if journal else None
        self.recorder = Recorder(self.publisher, self.journal, under_way=2)
        self.rail = Rail(
            self.mirror,
            self.recorder,
            self.journal,
            claim_timeout_seconds=TIMEOUT_SECONDS,
            reveal_timeout_seconds=TIMEOUT_SECONDS,
        )
        self.drainer = Drainer(self.journal, self.publisher) if self.journal else None
        self.restaurant = builders.RESTAURANT

    async def up(self, *, publisher: bool = True) -> None:
        if self.journal:
            await self.journal.open()
        if publisher:
            await self.publisher.start(wait=10)
            assert self.publisher.connected

    async def down(self) -> None:
        if self.drainer:
            await self.drainer.stop()
        await self.rail.drain()
        await self.publisher.stop()
        await self.mirror.close()
        if self.journal:
            await self.journal.close()

    async def warm(self, gap: int = 0) -> None:
        """Makes the mirror warm, as the mirror writer does at the end of the log."""
        state = LogState("test", -1)
        await self.mirror.begin_log(state)
        assert await self.mirror.warm(state, [(self.restaurant, DAY)], gap)

    async def chill(self) -> None:
        """Makes the mirror cold, as it is after a restart until the mirror writer has filled it."""
        await self.mirror._redis.call("DEL", keys.WARM)

    @asynccontextmanager
    async def frozen(self, server: RabbitMQ | Redis) -> AsyncIterator[None]:
        """Freezes a server of the run for the block, with short timeouts towards it."""
        self._wait_for(server, FROZEN_TIMEOUT_SECONDS)
        await asyncio.to_thread(server.freeze)
        try:
            yield
        finally:
            await asyncio.to_thread(server.thaw)
            self._wait_for(server, TIMEOUT_SECONDS)

    def _wait_for(self, server: RabbitMQ | Redis, seconds: float) -> None:
        if isinstance(server, Redis):
            self.mirror._redis._timeout = self.rail._claim_seconds = self.rail._reveal_seconds = seconds
        else:
            self.publisher._timeout = seconds

    # -- changes -----------------------------------------------------------------------------------------------

    def creation(self, **fields: Any) -> Draft:
        order = builders.order(items=1, order_number="", restaurant_id=self.restaurant, **fields)
        return Draft(entity=ORDER, event="created", state=order, base=None, before=None, at=now(), source="orders")

    def update(self, on: Committed, **fields: Any) -> Draft:
        state = structs.replace(on.state, updated_at=on.state.updated_at + timedelta(seconds=1), **fields)
        return Draft(
            entity=ORDER,
            event="updated",
            state=state,
            base=on.head,
            before=on.state,
            at=now(),
            source="orders",
        )

    async def claim(self, draft: Draft) -> tuple[Change, Any]:
        """Only claims: the owner dies or stalls after the first step."""
        change = change_of(draft)
        numbered = draft.base is None
        reply = await self.mirror.claim(ORDER, change, encode(change), draft.base, DAY if numbered else None, 0)
        return change, reply

    # -- reading back ------------------------------------------------------------------------------------------

    async def read(self, id_: str) -> tuple[Head, Order] | None:
        _, (found,) = await self.mirror.read(self.restaurant, ORDER.name, [id_])
        return (found.head, ORDER.decode_state(found.state)) if found else None

    async def claims(self) -> int:
        """Number of this restaurant's claims in the index, stale or not."""
        members = await self.mirror._redis.call("ZRANGE", keys.CLAIMS, 0, -1)
        return sum(member.decode().startswith(self.restaurant) for member in members)

    async def queued(self, *, queue: str = LANE, at_least: int = 0) -> list[list[Change]]:
        """Waits for `at_least` messages in a lane's queue; takes all that are there and returns their changes."""
        messages: list[list[Change]] = []

        async def take() -> int:
            connection = await aio_pika.connect(self.url, timeout=10)
            async with connection:
                declared = await (await connection.channel()).get_queue(queue, ensure=False)
                while message := await declared.get(fail=False, timeout=10):
                    messages.append([decode_change(event) for event in split_batch(message.body)])
                    await message.ack()
            return len(messages)

        await eventually(take, what=f"{at_least} messages in {queue}", until=lambda n: n >= at_least)
        return messages

    async def journaled(self) -> list[Change]:
        assert self.journal
        return [decode_change(entry.event) for entry in await self.journal.oldest(10_000)]


MakeRail = Callable[..., Any]


@asynccontextmanager
async def rails(servers: Servers, folder: Path) -> AsyncIterator[MakeRail]:
    """Yields a function that makes rigs; they share one vhost and, by default, the Redis of the run."""
    name = f"rail-{uuid4().hex[:8]}"
    url = await asyncio.to_thread(servers.rabbitmq.make_vhost, name)
    settings = Settings(_env_file=None, rabbitmq_url=url, change_log_segment_bytes=1_000_000)
    async with await declare.connect(url) as connection:
        await declare.declare(connection, settings)
        await declare.declare_logs(connection, settings, "test")
    made: list[RailRig] = []
    restaurant = builders.new_id()

    async def make(*, redis: Redis | None = None, up: bool = True, publisher: bool = True, **options: Any) -> RailRig:
        rig = RailRig(url, redis or servers.redis, folder, instance=len(made) + 1, **options)
        rig.restaurant = restaurant
        made.append(rig)
        if up:
            await rig.up(publisher=publisher)
        return rig

    try:
        yield make
    finally:
        for rig in made:
            await rig.down()
        await asyncio.to_thread(servers.rabbitmq.delete_vhost, name)


def ids(messages: list[list[Change]]) -> list[str]:
    return [change.id for message in messages for change in message]
