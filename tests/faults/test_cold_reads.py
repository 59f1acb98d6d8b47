"""A read while the mirror cannot say whether an entity exists: 404 would promise that it does not."""

from uuid import uuid4

from deploy.local.port_check import find_free
from tests.rigs.restaurant import expect, refused, register_restaurant
from tests.rigs.system import System, eventually


async def test_read_of_a_missing_state_is_503_and_a_list_is_incomplete_until_the_mirror_is_warm(
    system: System,
) -> None:
    restaurant = await register_restaurant(system)
    dish = await restaurant.dish()
    cold, (closed,) = system.servers.extra_redis(), find_free(1)
    for name, redis in (("cold", cold.url), ("without-mirror", f"redis://127.0.0.1:{closed}/0")):
        async with system.another_orders(name, redis_url=redis) as url, system.client(token=restaurant.token) as admin:
            for path in ("/api/orders", "/api/menu", "/api/tables", "/api/customers"):
                reply = await admin.get(f"{url}{path}/{uuid4()}")
                refused(reply, 503, "unavailable")
                assert int(reply.headers["retry-after"]) >= 1
            assert (await admin.put(f"{url}/api/menu/{uuid4()}", json={"price": 1})).status_code == 503

            # A list may lack dishes that PostgreSQL does not have yet, and says so.
            for path in ("/api/orders", "/api/menu", "/api/payments"):
                reply = await admin.get(f"{url}{path}")
                expect(reply)
                assert reply.json()["complete"] is False, (name, path)
                assert reply.headers.get("x-served-by") in (None, "postgres")

            # The service reads the dishes that PostgreSQL has from there.
            async def stored(url: str = url) -> int:
                return (await admin.get(f"{url}/api/menu/{dish['id']}")).status_code

            await eventually(stored, what="the dish in PostgreSQL", until=lambda status: status == 200)
    async with system.client(token=restaurant.token) as admin:
        refused(await admin.get(f"/api/orders/{uuid4()}"), 404, "not_found")
        for path in ("/api/orders", "/api/menu", "/api/payments"):
            assert (await admin.get(path)).json()["complete"] is True, path
        assert expect(await admin.get(f"/api/menu/{dish['id']}"))["id"] == dish["id"]
