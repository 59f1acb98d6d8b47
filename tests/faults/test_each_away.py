"""The table of promises, row by row: a backend or service is killed and then frozen under load. While it is
unavailable, orders are placed, changed, read and pushed as its row says. Afterwards the ledger explains every change.
test_mirror_lost.py tests the row of the mirror, and test_journal_takes_over.py has more on the journal."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from msgspec import Struct

from tests.chaos.watch import Watch
from tests.rigs.outage import Outage, acknowledged, proven, under_load
from tests.rigs.system import eventually

pytestmark = pytest.mark.timeout(300)


class Row(Struct, frozen=True):
    things: tuple[str, ...]
    durability: str = "broker"
    pushed: bool = True
    """Whether changes are pushed while it is unavailable; otherwise they are pushed afterwards, by cursor."""
    seed: int = 0


ROWS = {
    "PostgreSQL": Row(("postgres",), seed=11),
    "RabbitMQ": Row(("rabbitmq",), durability="journal", pushed=False, seed=12),
    "the sync service": Row(("worker", "sync"), seed=13),
    "the notifier": Row(("notifier",), pushed=False, seed=14),
}


class Screen(Watch):
    """A watched screen that also remembers orders with their versions."""

    def __init__(self, outage: Outage) -> None:
        super().__init__(outage)
        self.shown: set[tuple[str, int]] = set()

    def take(self, restaurant: str, event: dict[str, Any]) -> None:
        super().take(restaurant, event)
        if "changeId" in event:
            self.shown.add((event["data"]["id"], event["version"]))

    async def shows(self, expected: set[tuple[str, int]], *, within: float = 60.0) -> None:
        async def missing() -> set[tuple[str, int]]:
            return expected - self.shown

        await eventually(
            missing, within=within, what="acknowledged changes on the screen", until=lambda found: not found
        )


@asynccontextmanager
async def screen_of(outage: Outage) -> AsyncIterator[Screen]:
    screen = Screen(outage)
    screen.start()
    try:
        yield screen
    finally:
        await screen.stop()


@asynccontextmanager
async def unavailable(outage: Outage, things: tuple[str, ...], how: str) -> AsyncIterator[None]:
    def of_all(what: str) -> list[Callable[[], object]]:
        return [getattr(outage.one(name), what) for name in things]

    stop, back = ("kill", None) if how == "killed" else ("freeze", "thaw")
    await asyncio.gather(*(asyncio.to_thread(one) for one in of_all(stop)))
    try:
        yield
    finally:
        if back is not None:
            await asyncio.gather(*(asyncio.to_thread(one) for one in of_all(back)))
        else:
            await asyncio.gather(*(outage.start_again(name) for name in things))


async def changed_by(outage: Outage, order: str, notes: str) -> dict[str, Any]:
    """Changes an order and repeats on a 503, because on a busy machine the mirror may miss its half second."""

    async def change() -> httpx.Response:
        return await outage.call("PUT", f"/api/orders/{order}", {"notes": notes})

    reply = await eventually(change, what="the change", until=lambda reply: reply.status_code == 200)
    data: dict[str, Any] = reply.json()["data"]
    return data


async def ordered(outage: Outage, durability: str, notes: str) -> dict[str, Any]:
    """An order that was placed and changed with this durability. On a busy machine a confirm may be late, so that the
    journal takes the change instead of the broker; then another order is placed."""
    for _ in range(5):
        placed = await outage.create()
        changed = await changed_by(outage, placed["id"], notes)
        if placed["durability"] == changed["durability"] == durability:
            return changed
    pytest.fail(f"no order was placed and changed with durability {durability}")


async def read_and_listed(outage: Outage, expected: dict[str, Any]) -> None:
    """Waits until reads and lists show the order; repeats for the same reason."""

    async def got(path: str) -> Any:
        reply = await outage.call("GET", path)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    async def found() -> tuple[int, str]:
        order = await got(f"/api/orders/{expected['id']}")
        return order["version"], order["notes"]

    async def listed() -> set[str]:
        return {one["id"] for one in await got("/api/orders?limit=200")}

    await eventually(found, what="read", until=lambda seen: seen == (expected["version"], expected["notes"]))
    await eventually(listed, what="listed", until=lambda seen: expected["id"] in seen)


@pytest.mark.parametrize("what", ROWS)
async def test_the_row_of_an_unavailable_backend_holds_and_afterwards_nothing_is_missing(
    outage: Outage, what: str
) -> None:
    row = ROWS[what]
    async with screen_of(outage) as screen, under_load(outage, row.seed) as load:
        for how in ("killed", "frozen"):
            await acknowledged(load, 20)
            async with unavailable(outage, row.things, how):
                changed = await ordered(outage, row.durability, f"while it is {how}")
                mine = {(changed["id"], 1), (changed["id"], changed["version"])}
                await read_and_listed(outage, changed)
                if row.pushed:
                    await screen.shows(mine)
                for act in ("created", "changed", "paid"):
                    await acknowledged(load, 3, what=act)
            await screen.shows(mine)
        await acknowledged(load, 10)
    await screen.shows({(one.order, one.version) for one in load.acknowledged if one.version})
    await proven(outage, load)
    assert not screen.wrong
