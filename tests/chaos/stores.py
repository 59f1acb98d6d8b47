"""Reads the content of all stores while no change is under way; proof.py checks it."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any
from uuid import uuid4

import aio_pika
import msgspec
from msgspec import Struct, field

from shared.entities.contract import now
from shared.entities.signal import MARK, Signal, encode_signal
from shared.messaging import topology
from shared.mirror.mirror import Mirror
from shared.observability.tracing import trace_id_of
from tests.chaos.rig import ChaosRig

_SELECT_CHANGES = (
    "select restaurant_id::text, change_id::text, entity_id::text, version, type, accepted_at, traceparent, data::text"
    " from changes where entity = 'order'"
)
_SELECT_REPEATED_NUMBERS = (
    "select order_number, count(*) from orders group by restaurant_id, business_day, 1 having count(*) > 1"
)
_SELECT_DEAD = "select queue, error from dead_letters where status <> 'resolved' limit 10"
_BLOCK_SIZE = 200


class OrderChange(Struct, frozen=True):
    """One change of an order."""

    restaurant: str
    change: str
    order: str
    version: int
    type: str
    at: str
    trace: str | None
    notes: str | None
    """The notes in the state after the change; this change or an earlier one wrote them."""
    wrote_notes: bool
    payments: tuple[str, ...]

    def __str__(self) -> str:
        return f"change {self.change} (version {self.version} of {self.order}, accepted {self.at}, trace {self.trace})"


class MirroredOrder(Struct, frozen=True):
    """An order in the mirror."""

    version: int
    change: str
    notes: str | None
    payments: tuple[str, ...]


class StoreContents(Struct, frozen=True, kw_only=True):
    changes: list[OrderChange]
    """The rows of `changes`."""
    payments: Counter[str]
    """Payment -> number of its rows in PostgreSQL."""
    conflicts: set[tuple[str, int]]
    """(order, version) of open conflicts."""
    repeated_numbers: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    logged: list[OrderChange]
    """Every change in the log, including repeats."""
    mirror: dict[str, MirroredOrder]
    differs: list[str] = field(default_factory=list)
    """Differences between PostgreSQL and the mirror, from `full-sync --verify`."""
    unexplained: list[str] = field(default_factory=list)
    """Change ids, from the ledger."""


async def read_stores(rig: ChaosRig) -> StoreContents:
    # The ledger comes first: it reports only changes that have been missing for long, so none arrives during later
    # reads.
    unexplained, differs = await asyncio.gather(_unexplained(rig), _differs(rig))
    async with rig.system.database() as connection:
        changes = [_stored(row) for row in await connection.fetch(_SELECT_CHANGES)]
        payments = Counter(row[0] for row in await connection.fetch("select id::text from payments"))
        conflicts = await connection.fetch("select entity_id::text, version from conflicts where resolved_at is null")
        repeated = await connection.fetch(_SELECT_REPEATED_NUMBERS)
        dead = await connection.fetch(_SELECT_DEAD)
    logged = await read_log(rig)
    return StoreContents(
        changes=changes,
        payments=payments,
        conflicts={(row[0], row[1]) for row in conflicts},
        repeated_numbers=[f"{row[0]} given {row[1]} times" for row in repeated],
        dead=[f"{row['queue']}: {row['error']}" for row in dead],
        logged=logged,
        mirror=await _mirrored(rig, {one.order for one in changes} | {one.order for one in logged}),
        differs=differs,
        unexplained=unexplained,
    )


def _stored(row: Any) -> OrderChange:
    return _order_change(
        json.loads(row["data"]),
        restaurant=row["restaurant_id"],
        change=row["change_id"],
        order=row["entity_id"],
        version=row["version"],
        type=row["type"],
        at=str(row["accepted_at"]),
        trace=trace_id_of(row["traceparent"]),
    )


def _order_change(data: dict[str, Any], *, type: str, **fields: Any) -> OrderChange:
    after = data["after"]
    return OrderChange(
        **fields,
        type=type,
        notes=after.get("notes"),
        wrote_notes=type.endswith(".created.v1") or "notes" in (data["before"] or {}),
        payments=_payments(after),
    )


def _payments(state: dict[str, Any]) -> tuple[str, ...]:
    return tuple(one["id"] for one in state.get("payments") or ())


async def read_log(rig: ChaosRig) -> list[OrderChange]:
    """Returns every change of an order in the change log, including repeats."""
    found: list[OrderChange] = []
    end = asyncio.Event()
    async with await aio_pika.connect(rig.system.rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=500)
        stream = await channel.get_queue(topology.LOG, ensure=False)
        # A log reader ends its reading at such a mark; all other readers skip it.
        mark = encode_signal(Signal(id=str(uuid4()), type=MARK, time=now(), source="proof"))

        async def take(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            if message.body == mark:
                end.set()
                return
            found.extend(_of_orders(msgspec.json.decode(message.body)))
            await message.ack()

        await channel.default_exchange.publish(aio_pika.Message(mark, delivery_mode=2), topology.LOG)
        await stream.consume(take, arguments={"x-stream-offset": "first"})
        await asyncio.wait_for(end.wait(), 60)
    return found


def _of_orders(events: Iterable[dict[str, Any]]) -> Iterable[OrderChange]:
    for event in events:
        entity, _, id_ = event.get("subject", "").partition("/")
        if entity == "order" and "entityversion" in event:
            yield _order_change(
                event["data"],
                restaurant=event["restaurantid"],
                change=event["id"],
                order=id_,
                version=event["entityversion"],
                type=event["type"],
                at=event["time"],
                trace=trace_id_of(event.get("traceparent")),
            )


async def _mirrored(rig: ChaosRig, orders: set[str]) -> dict[str, MirroredOrder]:
    """Reads the given orders and all others that the mirror holds, for both restaurants."""
    found: dict[str, MirroredOrder] = {}
    mirror = Mirror(rig.servers.redis.url, timeout=5.0, stale_seconds=60.0)
    try:
        for restaurant in (rig.system.restaurant_id, rig.other_restaurant["id"]):
            ids = sorted(orders.union(await mirror.live_ids(restaurant, "order")))
            for start in range(0, len(ids), _BLOCK_SIZE):
                block = ids[start : start + _BLOCK_SIZE]
                _, documents = await mirror.read(restaurant, "order", block)
                for id_, document in zip(block, documents, strict=True):
                    if document is not None:
                        state = msgspec.json.decode(document.state)
                        head = document.head
                        found[id_] = MirroredOrder(head.version, head.change_id, state.get("notes"), _payments(state))
    finally:
        await mirror.close()
    return found


async def _differs(rig: ChaosRig) -> list[str]:
    printed = json.loads(await rig.system.cli("full-sync", "--verify", "--json", check=False))
    found = [f"{one['what']} {one['entity']} {one['id']}" for one in printed["differences"]]
    if not printed["compared"]:
        found.append("nothing was compared")
    if printed["pending"]:
        found.append(f"the mirror is ahead in {printed['pending']}")
    return found


async def _unexplained(rig: ChaosRig) -> list[str]:
    printed = json.loads(await rig.system.cli("ledger", "--all", "--json", check=False))
    return [one["change_id"] for one in printed["open"] if one["place"] in ("unexplained", "only_in_postgres")]
