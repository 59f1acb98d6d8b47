"""The menus of an orders instance follow the reference log and the stores, and miss no change of a dish."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec import structs

from services.orders.menu import Menus
from shared.entities.contract import Change, Lane
from shared.entities.menu_item import MenuItem
from shared.messaging import declare, topology
from shared.messaging.log import LogReader
from shared.mirror import keys
from shared.mirror.identity import mirror_identity
from tests.rigs.builders import CREATED_AT, RESTAURANT, change, menu_item, message
from tests.rigs.postgres_writer import MakeRig, Rig
from tests.rigs.rail.changes import applied
from tests.rigs.servers import Redis, Servers
from tests.rigs.system import eventually


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    """A Redis for this module only, because its tests make the mirror warm and cold."""
    return servers.extra_redis()


class MenuRig:
    """The menus of an instance on a database, a vhost and a mirror of their own, with one dish in PostgreSQL."""

    def __init__(self, rig: Rig, servers: Servers, redis: Redis) -> None:
        self.rig = rig
        self.servers = servers
        self.redis = redis
        reader = LogReader(rig.settings.rabbitmq_url, name="test", idle_seconds=1.0, stream=topology.REFERENCE_LOG)
        self.menus = Menus(rig.postgres, rig.mirror, reader)
        self.dish = menu_item(price=100)
        self.created = change(self.dish)

    def priced(self, price: int, base: Change | None = None) -> tuple[MenuItem, Change]:
        dish = structs.replace(self.dish, price=price)
        return dish, change(dish, base=base or self.created)

    async def store(self, *changes: Change) -> None:
        """PostgreSQL gets the changes from their lane; no log has them."""
        await self.rig.publisher.publish_to_queue(topology.lane_queue(Lane.NORMAL), message(*changes))
        await self.rig.written(*changes)

    async def replace_log(self) -> None:
        async with await declare.connect(self.rig.settings.rabbitmq_url) as connection:
            await (await connection.channel()).queue_delete(topology.REFERENCE_LOG)
            await declare.declare_logs(connection, self.rig.settings)

    async def attached(self) -> None:
        async def look() -> bool:
            return self.menus.reader.caught_up

        await eventually(look, what="a reader at the end of the log")

    async def make_warm(self) -> None:
        await self.rig.mirror.begin_log()
        position = await self.rig.mirror.log_position()
        server, _ = await self.rig.mirror.server()
        identity = mirror_identity(1, CREATED_AT)
        assert position is not None and await self.rig.mirror.warm(position, server, identity)

    async def costs(self, price: int) -> None:
        async def look() -> int:
            book = await self.menus.book(RESTAURANT)
            return book.dishes[self.dish.id].price

        await eventually(look, what=f"a price of {price}", until=lambda found: found == price)


@pytest.fixture
async def menu(make_rig: MakeRig, servers: Servers, redis: Redis) -> AsyncIterator[MenuRig]:
    await redis.command("FLUSHALL")
    rig: Any = await make_rig(redis_url=redis.url)
    made = MenuRig(rig, servers, redis)
    await rig.as_owner(f"insert into restaurants (id, name, slug) values ('{RESTAURANT}', 'Test', 'test')")
    await rig.writer.start()
    await made.store(made.created)
    yield made
    await made.menus.stop()


async def test_change_in_the_log_reaches_the_menu_although_no_store_has_it(menu: MenuRig) -> None:
    menu.menus.start()
    await menu.menus.load_all(attach_seconds=10.0)
    await menu.costs(100)
    _, dearer = menu.priced(200)
    await menu.rig.publisher.publish_to_queue(topology.REFERENCE_LOG, message(dearer))
    await menu.costs(200)


async def test_change_that_the_log_delivers_before_its_menu_is_loaded_is_kept(menu: MenuRig) -> None:
    _, dearer = menu.priced(200)
    menu.menus.start()
    await menu.attached()
    await menu.rig.publisher.publish_to_queue(topology.REFERENCE_LOG, message(dearer))
    turns = menu.menus.loop.turns
    await menu.menus.loop.turn_after(turns)
    await menu.menus.load_all()
    await menu.costs(200)


async def test_change_between_the_load_and_the_attach_is_loaded_at_the_mark(menu: MenuRig) -> None:
    await menu.menus.load_all()
    await menu.costs(100)
    await menu.store(menu.priced(200)[1])
    menu.menus.start()
    await menu.costs(200)


async def test_change_that_a_cut_stream_lost_is_loaded_after_the_break(menu: MenuRig) -> None:
    menu.menus.start()
    await menu.menus.load_all(attach_seconds=10.0)
    await menu.costs(100)
    await menu.store(menu.priced(200)[1])
    await menu.replace_log()
    await menu.costs(200)


async def test_change_that_only_the_lost_mirror_had_is_loaded_when_the_mirror_turns_warm(menu: MenuRig) -> None:
    """PostgreSQL is behind, and the log entry of the change is older than the part that the menus read."""
    menu.menus.start()
    await menu.menus.load_all(attach_seconds=10.0)
    await menu.costs(100)
    _, dearer = menu.priced(200)
    await menu.rig.mirror.apply([applied(dearer)])
    await menu.make_warm()
    await menu.costs(200)
    # The same again after a mirror was lost.
    await menu.redis.command("DEL", keys.WARM)
    turns = menu.menus.load_loop.turns
    await menu.menus.load_loop.turn_after(turns + 1)
    await menu.rig.mirror.apply([applied(menu.priced(300, base=dearer)[1])])
    await menu.make_warm()
    await menu.costs(300)


async def test_menus_are_loaded_again_when_the_stores_answer(menu: MenuRig, redis: Redis) -> None:
    """The load after a break fails, because both stores are unavailable. It is repeated until it succeeds."""
    menu.menus.start()
    await menu.menus.load_all(attach_seconds=10.0)
    await menu.costs(100)
    await menu.store(menu.priced(200)[1])
    await asyncio.to_thread(menu.servers.postgres.freeze)
    try:
        await menu.replace_log()
        turns = menu.menus.load_loop.turns
        await menu.menus.load_loop.turn_after(turns + 1)
        await menu.costs(100)  # the last known menu
    finally:
        await asyncio.to_thread(menu.servers.postgres.thaw)
    await menu.costs(200)
