"""What must be true when every fault is mended and everything has come to rest.

- Every acknowledged change is once in PostgreSQL, and at least once in the log; what was refused is nowhere.
- PostgreSQL holds what the mirror holds; nothing is pending, on the ladder or dead.
- The versions of an order have no gap, one change each (a fork is kept on both sides, and a conflict is open for it).
- No number is given twice, no tenant sees another's, and the ledger explains every change.
"""

import asyncio
import json
import sqlite3
from collections import Counter, defaultdict
from typing import Any
from uuid import uuid4

import aio_pika
import httpx
import msgspec
import redis.asyncio
from msgspec import Struct, field

from shared.entities.contract import now
from shared.entities.signal import MARK, Signal, encode_signal
from shared.messaging import topology
from tests.chaos.load import Load
from tests.chaos.rig import Rig
from tests.system import eventually

_QUIET = 120.0
_CHANGES = (
    "select change_id::text, entity_id::text, version, type, accepted_at, data->'after'->>'notes' as notes, data::text"
    " from changes"
)


class Proof(Struct):
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Whatever else must not be."""
    forks: int = 0
    unexplained: int = 0
    seconds_to_rest: float = 0.0

    @property
    def holds(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.unexplained)


async def rest(rig: Rig) -> None:
    """Waits until nothing is on its way any more. Raises AssertionError with what still is."""

    async def restless() -> dict[str, int]:
        found: dict[str, int] = {}
        async with redis.asyncio.from_url(rig.servers.redis.url) as mirror:
            found["claims"] = int(await mirror.zcard("ticketrail:claims"))
            pending = [key async for key in mirror.scan_iter("*:pending:*")]
            found["pending"] = sum([int(await mirror.zcard(key)) for key in pending])
        for name in ("orders", "second-orders"):
            async with httpx.AsyncClient() as client:
                ready = (await client.get(f"{rig.system.urls[name]}/health/ready")).json()
            found[f"journal of {name}"] = int(ready["journal"]["depth"])
        found |= await _depths(rig)
        return {name: count for name, count in found.items() if count}

    await eventually(restless, within=_QUIET, what="rest", until=lambda found: not found)


async def _depths(rig: Rig) -> dict[str, int]:
    found: dict[str, int] = {}
    async with await aio_pika.connect(rig.system.rabbitmq_url) as connection:
        channel = await connection.channel()
        for lane in topology.Lane:
            for queue in (topology.lane_queue(lane), *(topology.retry_queue(lane, step) for step in (50, 100, 200))):
                declared = await channel.declare_queue(queue, passive=True)
                found[queue] = declared.declaration_result.message_count or 0
    return found


async def prove(rig: Rig, load: Load) -> Proof:
    proof = Proof(acknowledged=len(load.acknowledged), wrong=list(load.wrong))
    async with rig.system.database() as connection:
        rows = await connection.fetch(f"{_CHANGES} where entity = 'order'")
        payments = Counter(row[0] for row in await connection.fetch("select id::text from payments"))
        forked = {tuple(row) for row in await connection.fetch("select entity_id::text, version from conflicts")}
        numbers = await connection.fetch(
            "select order_number, count(*) from orders group by restaurant_id, business_day, 1 having count(*) > 1"
        )
        dead = await _dead(connection)
    by_mark: dict[str, list[Any]] = defaultdict(list)
    by_version: dict[tuple[str, int], list[str]] = defaultdict(list)
    for row in rows:
        before = json.loads(row["data"])["before"]
        if row["type"].endswith(".created.v1") or "notes" in before:
            by_mark[row["notes"]].append(row)
        by_version[row["entity_id"], row["version"]].append(row["change_id"])

    logged = await _logged(rig)
    for one in load.acknowledged:
        if one.what == "paid":
            if payments[one.mark] != 1:
                (proof.lost if not payments[one.mark] else proof.doubled).append(f"payment {one.mark} of {one.order}")
            continue
        found = [row for row in by_mark[one.mark] if row["entity_id"] == one.order]
        if not found:
            proof.lost.append(f"{one.what} {one.order} version {one.version} ({one.mark})")
        elif len(by_mark[one.mark]) > len(found) or (one.what == "changed" and len(found) > 1):
            proof.doubled.append(f"{one.what} {one.order} ({one.mark}): {len(by_mark[one.mark])} times")
        elif found[0]["change_id"] not in logged:
            proof.lost.append(f"{one.what} {one.order}: not in the log")
    for mark, said in load.refused.items():
        for row in by_mark.get(mark, ()):
            proof.wrong.append(
                f"refused, and there all the same: {row['type']} {row['entity_id']} version {row['version']},"
                f" accepted {row['accepted_at']} ({said})"
            )
        if payments[mark]:
            proof.wrong.append(f"refused, and there all the same: payment {mark} ({said})")

    versions: dict[str, set[int]] = defaultdict(set)
    for (order, version), changes in by_version.items():
        versions[order].add(version)
        if len(changes) > 1:
            proof.forks += 1
            if (order, version) not in forked:
                proof.doubled.append(f"version {version} of {order} {len(changes)} times, and no conflict")
    for order, seen in versions.items():
        if seen != set(range(1, max(seen) + 1)):
            proof.wrong.append(f"versions of {order} have a gap: {sorted(seen)}")
    proof.wrong += [f"order number {row[0]} given {row[1]} times" for row in numbers]
    proof.wrong += [f"dead: {one}" for one in dead]
    proof.wrong += await _mirror_differs(rig)
    proof.unexplained = await _unexplained(rig)
    return proof


async def _dead(connection: Any) -> list[str]:
    rows = await connection.fetch(
        "select queue, fingerprint, error from dead_letters where status <> 'resolved' limit 10"
    )
    return [f"{row['queue']}: {row['error']}" for row in rows]


async def _logged(rig: Rig) -> set[str]:
    """Ids of all changes in the log."""
    found: set[str] = set()
    end = asyncio.Event()
    async with await aio_pika.connect(rig.system.rabbitmq_url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=500)
        stream = await channel.get_queue(topology.LOG, ensure=False)
        # As a reader of the log puts it in: whoever follows the log passes over it.
        mark = encode_signal(Signal(id=str(uuid4()), type=MARK, time=now(), source="proof"))

        async def take(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            if message.body == mark:
                end.set()
                return
            found.update(one["id"] for one in msgspec.json.decode(message.body) if "entityversion" in one)
            await message.ack()

        await channel.default_exchange.publish(aio_pika.Message(mark, delivery_mode=2), topology.LOG)
        await stream.consume(take, arguments={"x-stream-offset": "first"})
        await asyncio.wait_for(end.wait(), 60)
    return found


async def _mirror_differs(rig: Rig) -> list[str]:
    said = json.loads(await rig.system.cli("full-sync", "--verify", "--json", check=False))
    return [f"mirror: {one['what']} {one['entity']} {one['id']}" for one in said["differences"][:10]]


async def _unexplained(rig: Rig) -> int:
    said = json.loads(await rig.system.cli("ledger", "--all", "--json", check=False))
    return int(said["unexplained"])


def journal_of(rig: Rig, instance: int) -> int:
    """Entries in a journal file, for a service that does not live."""
    with sqlite3.connect(rig.system.directory / "journal" / f"orders-{instance}.sqlite") as db:
        return int(db.execute("select count(*) from entries").fetchone()[0])
