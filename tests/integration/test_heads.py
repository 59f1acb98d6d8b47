"""The head that a change is built on, with both stores in every state that decides it."""

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from msgspec import structs

from shared.entities.contract import encode, now
from shared.entities.entity import Entity
from shared.entities.menu_item import ENTITY as MENU_ITEM
from shared.entities.order import ENTITY as ORDER
from shared.errors import Unavailable
from shared.mirror import keys
from shared.mirror.stored_heads import StoredHead
from shared.postgres.pool import Postgres
from shared.rail.head import Heads, Standing
from shared.rail.idempotency import Creations
from shared.rail.outcomes import Committed
from tests.rigs import builders
from tests.rigs.postgres_writer import MakeRig
from tests.rigs.rail.changes import State, draft
from tests.rigs.rail.instance import no_postgres
from tests.rigs.rail.sinks import PostgresTables
from tests.rigs.servers import Redis, Servers
from tests.rigs.stock import StockRig

WINDOW = timedelta(days=3)


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    return servers.extra_redis()


@pytest.fixture
async def rig(redis: Redis) -> AsyncIterator[StockRig]:
    rig = StockRig(redis.url)
    await rig.server.warm()
    yield rig
    await rig.down()


@pytest.fixture
async def tables(make_rig: MakeRig, redis: Redis) -> Postgres:
    return (await make_rig(redis_url=redis.url)).postgres


async def order(rig: StockRig) -> State:
    return await rig.put(ORDER, rig.order())


def standing(state: State) -> Standing:
    return Standing(*state, encode(state[1]))


async def leaves_the_mirror(rig: StockRig, state: State) -> None:
    """PostgreSQL has the order, and the mirror has trimmed it."""
    await rig.mirror.settle([StoredHead(rig.restaurant, "order", state[1].id, state[0])])
    assert await rig.mirror.trim(rig.restaurant, "order", {state[1].id: state[0].change_id}) == 1


async def test_warm_mirror_gives_the_head_without_asking_postgres(rig: StockRig) -> None:
    made = await order(rig)
    heads = Heads(rig.mirror, no_postgres)
    assert await heads.head(ORDER, rig.restaurant, made[1].id) == standing(made)
    assert await heads.earlier(ORDER, rig.restaurant, made[1].id) == standing(made)


async def test_postgres_gives_the_heads_that_a_warm_mirror_lacks(rig: StockRig, tables: Postgres) -> None:
    old, new = await order(rig), await order(rig)
    await PostgresTables(tables, rig.mirror).take(rig.broker.recorded().values())
    await leaves_the_mirror(rig, old)
    heads = Heads(rig.mirror, tables.tenant)
    unknown = builders.new_id()
    found = await heads.heads(ORDER, rig.restaurant, dict.fromkeys((old[1].id, unknown, new[1].id)))
    assert {id_: (one.head, one.state) for id_, one in found.items()} == {old[1].id: old, new[1].id: new}
    assert await heads.head(ORDER, rig.restaurant, unknown) is None
    # The bytes are those that PostgreSQL has.
    assert ORDER.decode_state(found[old[1].id].raw) == old[1]


async def test_cold_mirror_knows_no_head(rig: StockRig, tables: Postgres) -> None:
    made = await order(rig)
    await PostgresTables(tables, rig.mirror).take(rig.broker.recorded().values())
    await rig.server.cool()
    with pytest.raises(Unavailable, match="warm"):
        await Heads(rig.mirror, tables.tenant, window=WINDOW).head(ORDER, rig.restaurant, made[1].id, now())


async def test_without_postgres_only_an_entity_of_the_live_window_is_known_not_to_exist(rig: StockRig) -> None:
    heads, id_ = Heads(rig.mirror, no_postgres, window=WINDOW), builders.new_id()
    assert await heads.head(ORDER, rig.restaurant, id_, now() - timedelta(days=2)) is None
    for born in (None, now() - timedelta(days=4)):
        with pytest.raises(Unavailable, match="cannot be read"):
            await heads.head(ORDER, rig.restaurant, id_, born)
    with pytest.raises(Unavailable, match="cannot be read"):
        await heads.heads(ORDER, rig.restaurant, {builders.new_id(): now(), id_: None})


async def test_earlier_creation_is_found_in_a_cold_mirror_that_is_ahead_or_behind(
    rig: StockRig, tables: Postgres
) -> None:
    made = await order(rig)
    heads, alone = Heads(rig.mirror, tables.tenant), Heads(rig.mirror, no_postgres)
    later = structs.replace(made[1], notes="later")
    changed = await rig.put(ORDER, later, made)
    changes = {change.entityversion: change for change in rig.broker.recorded().values()}
    await rig.server.cool()
    assert await heads.earlier(ORDER, rig.restaurant, made[1].id) == standing(changed)  # PostgreSQL has nothing yet
    await PostgresTables(tables, rig.mirror).take([changes[1]])
    assert await heads.earlier(ORDER, rig.restaurant, made[1].id) == standing(changed)
    await PostgresTables(tables, rig.mirror).take([changes[2]])
    await rig.server.wipe()
    await rig.reveal(changes[1])
    found = await heads.earlier(ORDER, rig.restaurant, made[1].id)
    assert found is not None and (found.head, found.state) == changed
    assert await alone.earlier(ORDER, rig.restaurant, made[1].id) == standing(made)
    assert await heads.earlier(ORDER, rig.restaurant, builders.new_id()) is None
    with pytest.raises(Unavailable):
        await alone.earlier(ORDER, rig.restaurant, builders.new_id())


async def test_change_on_a_head_from_postgres_is_committed(rig: StockRig, tables: Postgres) -> None:
    made = await order(rig)
    await PostgresTables(tables, rig.mirror).take(rig.broker.recorded().values())
    await leaves_the_mirror(rig, made)
    found = await Heads(rig.mirror, tables.tenant).head(ORDER, rig.restaurant, made[1].id)
    assert found is not None
    done = await rig.rail.commit(draft(ORDER, structs.replace(found.state, notes="late"), (found.head, found.state)))
    assert (done.head.version, done.state.notes) == (2, "late")


async def test_repeat_of_an_order_that_a_wiped_mirror_does_not_know_yet_is_replayed(
    rig: StockRig, tables: Postgres
) -> None:
    made = await order(rig)
    await PostgresTables(tables, rig.mirror).take(rig.broker.recorded().values())
    await rig.server.wipe()
    await rig.server.warm()
    await rig.server.call("DEL", keys.KEYS)
    creations = Creations(rig.rail, Heads(rig.mirror, tables.tenant))
    repeated = structs.replace(draft(ORDER, structs.replace(rig.order(), id=made[1].id)), keyed=True)
    found = await creations.create(repeated)
    assert isinstance(found, Standing) and found.head == made[0]
    new = await creations.create(structs.replace(draft(ORDER, rig.order()), keyed=True))
    assert isinstance(new, Committed) and new.visible


async def test_creation_with_a_key_continues_while_no_store_knows_whether_it_is_a_repeat(
    rig: StockRig,
) -> None:
    await rig.server.call("DEL", keys.KEYS)
    creations = Creations(rig.rail, Heads(rig.mirror, no_postgres))
    new = await creations.create(structs.replace(draft(ORDER, rig.order()), keyed=True))
    assert isinstance(new, Committed) and new.state.order_number == "0001", "the order was created without a claim"


class NotAsked:
    async def earlier(self, entity: Entity, restaurant: str, id_: str) -> Standing | None:
        raise AssertionError(f"the stores were asked for {entity.name} {id_}")


async def test_creation_of_an_entity_that_never_leaves_the_mirror_searches_no_store(rig: StockRig) -> None:
    await rig.server.call("DEL", keys.KEYS)
    dish = builders.menu_item(restaurant_id=rig.restaurant)
    made = await Creations(rig.rail, NotAsked()).create(structs.replace(draft(MENU_ITEM, dish), keyed=True))
    assert isinstance(made, Committed) and made.visible
