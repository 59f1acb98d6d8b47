"""Dry runs on real servers: they report the outcome of a replay and change nothing."""

from typing import Any

import msgspec

from services.sync.dead_letters import store as dead_letter_store
from shared.entities.contract import Change, Lane
from shared.entities.order import OrderStatus
from shared.messaging import topology
from tests.rigs.builders import change, menu_item, message, order
from tests.rigs.postgres_writer import Rig
from tests.rigs.replays import create_job, read_items, wait_ended


async def test_dry_run_reports_outcomes_and_leaves_no_trace(refusing_rig: Rig) -> None:
    first = change(order(items=1))
    newer = change(
        order(id=first.entity_id, items=1, status=OrderStatus.RECEIVED), entityversion=3, basechangeid=first.id
    )
    await refusing_rig.publish(first)
    await refusing_rig.written(first)
    await refusing_rig.publish(newer)
    await refusing_rig.written(newer)
    would_write, refused = change(order(items=2)), change(order(items=1, notes="forbidden"))
    mirrored = change(order(items=1))
    superseded = change(order(id=first.entity_id, items=4), entityversion=2, basechangeid=first.id)
    forked = change(order(id=first.entity_id, items=5, notes="fork"), entityversion=4, basechangeid=first.id)
    broken = msgspec.json.encode(change(menu_item())).replace(b'"price":', b'"price":-')
    changes = {"would_write": would_write, "refused": refused, "superseded": superseded, "fork": forked}
    bodies: list[Change | bytes] = [*changes.values(), broken, first]
    for one in bodies:
        await refusing_rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), message(one))
    await refusing_rig.publisher.publish_to_queue(topology.MIRROR_DEAD, message(mirrored))
    await refusing_rig.publisher.publish_to_queue(topology.dead_queue(Lane.CRITICAL), b"garbage")
    await refusing_rig.dead_letters(8)
    before = await tables(refusing_rig)
    refusing_rig.replays.start()
    job = await wait_ended(refusing_rig, await create_job(refusing_rig, "dry_run", canary=True))
    assert (job.state, job.outcomes) == ("done", {"would_write": 3, "superseded": 2, "would_fail": 3})
    assert await tables(refusing_rig) == before
    results: dict[tuple[str | None, str | None], tuple[str | None, str | None]] = {}
    for part in await read_items(refusing_rig, job):
        dead_letter = await dead_letter_store.one(refusing_rig.database, part.dead_letter_id)
        assert dead_letter is not None
        assert (dead_letter.status, dead_letter.revision) == ("open", 1)
        results[dead_letter.change_id, dead_letter.lane] = (part.outcome, part.detail)
    assert results[would_write.id, "critical"] == ("would_write", "version 1")
    assert results[mirrored.id, None] == ("would_write", "version 1, into the mirror")
    assert results[superseded.id, "critical"][0] == "superseded"
    assert "the head is version 3" in str(results[superseded.id, "critical"][1])
    assert results[forked.id, "critical"] == ("would_write", "version 4, and opens a conflict")
    assert results[first.id, "critical"] == ("superseded", "the change is already written")
    assert "no_forbidden" in str(results[refused.id, "critical"][1])
    assert "negative_amount" in str([detail for _, detail in results.values()])
    assert str(results[None, "critical"][1]).startswith("undecodable")


async def tables(rig: Rig) -> list[Any]:
    names = ("orders", "order_items", "payments", "menu_items", "changes", "conflicts", "retries")
    return [await rig.database.fetch(f"select * from {name} order by 1, 2, 3") for name in names]
