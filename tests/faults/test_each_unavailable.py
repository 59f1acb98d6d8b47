"""Tests each row of the table of promises in docs/architecture.md: a backend or service is killed under load, and later
frozen. While it is unavailable, orders are placed, changed, read and pushed as its row says. Afterwards the ledger
explains every change. test_mirror_lost.py tests the row of the mirror, and test_journal_takes_over.py has more tests of
the journal."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from msgspec import Struct

from tests.chaos.screens import Screens
from tests.rigs.outage import Outage, under_load, wait_acknowledged, wait_and_prove
from tests.rigs.system import eventually

pytestmark = pytest.mark.timeout(300)


class Row(Struct, frozen=True):
    targets: tuple[str, ...]
    durability: str = "broker"
    pushed: bool = True
    """True if changes are pushed during the outage. Otherwise screens receive them afterwards, by cursor."""
    seed: int = 0


ROWS = {
    "PostgreSQL": Row(("postgres",), seed=11),
    "RabbitMQ": Row(("rabbitmq",), durability="journal", pushed=False, seed=12),
    "the sync service": Row(("worker", "sync"), seed=13),
    "the notifier": Row(("notifier",), pushed=False, seed=14),
}


class OrderScreen(Screens):
    """A screen that also remembers the version of each order that it received."""

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
async def screen_of(outage: Outage) -> AsyncIterator[OrderScreen]:
    screen = OrderScreen(outage)
    screen.start()
    try:
        yield screen
    finally:
        await screen.stop()


@asynccontextmanager
async def unavailable(outage: Outage, targets: tuple[str, ...], how: str) -> AsyncIterator[None]:
    """Kills or freezes the targets for the block."""

    def methods(name: str) -> list[Callable[[], object]]:
        return [getattr(outage.target(target), name) for target in targets]

    stop, resume = ("kill", None) if how == "killed" else ("freeze", "thaw")
    await asyncio.gather(*(asyncio.to_thread(one) for one in methods(stop)))
    try:
        yield
    finally:
        if resume is not None:
            await asyncio.gather(*(asyncio.to_thread(one) for one in methods(resume)))
        else:
            await asyncio.gather(*(outage.start_again(name) for name in targets))


async def change_order(outage: Outage, order: str, notes: str) -> dict[str, Any]:
    """Changes an order. Repeats on a 503, because a busy machine may delay the mirror's reply beyond its timeout of
    half a second."""

    async def change() -> httpx.Response:
        return await outage.call("PUT", f"/api/orders/{order}", {"notes": notes})

    reply = await eventually(change, what="the change", until=lambda reply: reply.status_code == 200)
    data: dict[str, Any] = reply.json()["data"]
    return data


async def place_and_change(outage: Outage, durability: str, notes: str) -> dict[str, Any]:
    """Returns an order that was placed and changed with this durability. On a busy machine a confirm may be late, and
    the journal takes the change instead of the broker. Then the function places another order."""
    for _ in range(5):
        placed = await outage.create()
        changed = await change_order(outage, placed["id"], notes)
        if placed["durability"] == changed["durability"] == durability:
            return changed
    pytest.fail(f"no order was placed and changed with durability {durability}")


async def assert_read_and_listed(outage: Outage, expected: dict[str, Any]) -> None:
    """Waits until reads and lists show the order. A busy machine may need several requests."""

    async def got(path: str) -> Any:
        reply = await outage.call("GET", path)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    async def found() -> tuple[int, str]:
        order = await got(f"/api/orders/{expected['id']}")
        return order["version"], order["notes"]

    async def listed() -> set[str]:
        return {one["id"] for one in await got("/api/orders?limit=200")}

    await eventually(
        found, what="the order as expected", until=lambda seen: seen == (expected["version"], expected["notes"])
    )
    await eventually(listed, what="the order in the list", until=lambda seen: expected["id"] in seen)


# Each row has the same steps, so `make test` runs one.
@pytest.mark.parametrize(
    "what", ["PostgreSQL", *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name != "PostgreSQL")]
)
async def test_promises_hold_while_a_backend_is_unavailable_and_nothing_is_missing_afterwards(
    outage: Outage, what: str
) -> None:
    row = ROWS[what]
    async with screen_of(outage) as screen, under_load(outage, row.seed) as load:
        for how in ("killed", "frozen"):
            await wait_acknowledged(load, 20)
            async with unavailable(outage, row.targets, how):
                changed = await place_and_change(outage, row.durability, f"while it is {how}")
                mine = {(changed["id"], 1), (changed["id"], changed["version"])}
                await assert_read_and_listed(outage, changed)
                if row.pushed:
                    await screen.shows(mine)
                for kind in ("created", "changed", "paid"):
                    await wait_acknowledged(load, 3, kind=kind)
            await screen.shows(mine)
        await wait_acknowledged(load, 10)
    await screen.shows({(one.order, one.version) for one in load.acknowledged if one.version})
    await wait_and_prove(outage, load)
    assert not screen.wrong
