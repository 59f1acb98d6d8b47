"""PostgreSQL and Redis are unavailable together: creations continue, changes and reads get 503."""

import asyncio
from uuid import uuid4

import httpx
import pytest

from tests.rigs.outage import Outage, under_load, wait_acknowledged, wait_and_prove

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # its load goes on through two outages


async def test_with_both_stores_unavailable_creations_continue_and_changes_and_reads_get_503(outage: Outage) -> None:
    postgres, mirror = outage.servers.postgres, outage.servers.redis
    await outage.change_price(4_444)
    async with under_load(outage, 4) as load:
        for stop_postgres, stop_mirror, start_postgres, start_mirror in (
            (postgres.freeze, mirror.kill, postgres.thaw, mirror.start),
            (postgres.kill, mirror.freeze, postgres.start, mirror.thaw),
        ):
            await wait_acknowledged(load, 30)
            order = load.acknowledged[-1].order
            await asyncio.gather(asyncio.to_thread(stop_postgres), asyncio.to_thread(stop_mirror))
            try:
                placed = await outage.create()
                assert (placed["subtotal"], placed["visible"]) == (4_444, False)
                await outage.assert_refuses_changes(order)
                for path in (f"/api/orders/{order}", f"/api/orders/{placed['id']}", "/api/orders", "/api/menu"):
                    reply = await outage.call("GET", path)
                    assert reply.status_code == 503, f"{path}: {reply.status_code} {reply.text}"
                    assert int(reply.headers["retry-after"]) > 0
                await assert_one_order_for_one_key(outage)
                await wait_acknowledged(load, 10, kind="created")
            finally:
                await asyncio.gather(asyncio.to_thread(start_postgres), asyncio.to_thread(start_mirror))
            await outage.warm()
            await wait_acknowledged(load, 10, kind="changed")
            reply = await outage.call("GET", f"/api/orders/{placed['id']}")
            assert (reply.status_code, reply.json()["data"]["subtotal"]) == (200, 4_444)
    await wait_and_prove(outage, load)


async def assert_one_order_for_one_key(outage: Outage) -> None:
    """Asserts that two creations at the same time and a repeat, all with one key, give one order, although no store
    knows the order yet."""
    body, key = {"items": [{"menu_item_id": outage.system.dish(), "quantity": 1}]}, uuid4().hex

    async def place() -> httpx.Response:
        return await outage.call("POST", "/api/orders", body, key=key)

    replies = list(await asyncio.gather(place(), place()))
    assert {reply.status_code for reply in replies} <= {201, 409}, [reply.text for reply in replies]
    replies = [*(reply for reply in replies if reply.status_code == 201), await place()]
    assert len(replies) > 1
    assert [reply.status_code for reply in replies] == [201] * len(replies), [reply.text for reply in replies]
    assert len({reply.json()["data"]["id"] for reply in replies}) == 1
