"""Operators read dead letters and act on them: pages, groups, tenants, revisions, audit, retention."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from msgspec import structs

from services.sync import audit
from services.sync.dead_letters import actions, replay_jobs, retention
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.store import DeadLetterQuery
from services.sync.failures.classification import fingerprint
from services.sync.failures.dead_letter_store import Attempt, NewDeadLetter
from services.sync.failures.dead_letter_store import keep as keep_all
from services.sync.failures.parsing import parse_dead_letters
from shared.entities.contract import Lane, encode, now
from shared.errors import Conflict, NotFound
from shared.messaging import topology
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, message, order
from tests.rigs.postgres_writer import MakeRig, Rig

OPERATOR: dict[str, Any] = {"actor": "nadia", "role": "operator"}


@pytest.fixture
async def store(make_rig: MakeRig) -> Rig:
    rig: Rig = await make_rig()
    return rig


@pytest.fixture
async def ops(store: Rig) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(store.settings.database_ops_url)
    yield connection
    await connection.close()


def new_dead_letter(
    *,
    reason: str = "negative_amount",
    at: datetime | None = None,
    lane: Lane = Lane.CRITICAL,
    body: bytes | None = None,
    error: str = "BrokenContract: no",
    **fields: Any,
) -> NewDeadLetter:
    made = body or message(change(order(**fields)))
    [read] = parse_dead_letters(topology.dead_queue(lane), lane, made, {}, now())
    place = "shared.entities.entity:decode"
    return structs.replace(
        read,
        reason=reason,
        error=error,
        place=place,
        fingerprint=fingerprint(reason, error, place),
        attempts=(Attempt(at or now(), reason, error, place),),
    )


async def keep(rig: Rig, *dead_letters: NewDeadLetter) -> None:
    assert len(await keep_all(rig.database, dead_letters)) == len(dead_letters)


async def found(rig: Rig, **filters: Any) -> set[bytes]:
    page = await dead_letter_store.page(rig.database, DeadLetterQuery(**filters), limit=100)
    assert len(page) == await dead_letter_store.count(rig.database, DeadLetterQuery(**filters))
    whole = [await dead_letter_store.one(rig.database, one.id) for one in page]
    return {one.body for one in whole if one}


async def test_pages_list_newest_first_and_contain_each_dead_letter_once(store: Rig) -> None:
    at = datetime(2026, 3, 14, tzinfo=UTC)
    # Several fail at the same moment, so the cursor needs the id as well as the time.
    made = [new_dead_letter(at=at + timedelta(seconds=number // 4)) for number in range(10)]
    await keep(store, *made)
    seen: list[dead_letter_store.DeadLetter] = []
    while True:
        before = (seen[-1].last_failed_at, seen[-1].id) if seen else None
        page = await dead_letter_store.page(store.database, DeadLetterQuery(), before=before, limit=3)
        if not page:
            break
        seen += page
    assert len({one.id for one in seen}) == 10
    assert [one.last_failed_at for one in seen] == sorted((one.last_failed_at for one in seen), reverse=True)
    assert seen[0].body_bytes > 100


async def test_each_filter_selects_the_matching_dead_letters(store: Rig) -> None:
    at = datetime(2026, 3, 14, tzinfo=UTC)
    ours = new_dead_letter(at=at, customer_name="100% _Özgür_")
    theirs = new_dead_letter(
        at=at + timedelta(hours=1), restaurant_id=OTHER_RESTAURANT, lane=Lane.NORMAL, reason="too_large",
        error="BrokenContract: 9 of 8 bytes",
    )  # fmt: skip
    await keep(store, ours, theirs)
    mine, other = {ours.body}, {theirs.body}
    assert await found(store) == mine | other
    assert await found(store, queue=theirs.queue) == other
    assert await found(store, fingerprint=ours.fingerprint) == mine
    assert await found(store, reason="too_large") == other
    assert await found(store, restaurant_id=RESTAURANT) == mine
    assert await found(store, change_id=theirs.change_id) == other
    assert await found(store, entity="order", entity_id=ours.entity_id) == mine
    assert await found(store, entity="menu_item") == set()
    assert await found(store, failed_from=at + timedelta(minutes=1)) == other
    assert await found(store, failed_to=at + timedelta(minutes=1)) == mine
    assert await found(store, statuses=("discarded",)) == set()
    assert await found(store, statuses=("open", "discarded")) == mine | other
    assert await found(store, text="9 OF 8") == other
    assert await found(store, text="100% _Özgür") == mine, (
        "the text in the body is not found, or a wildcard of `like` matched other text"
    )
    assert await found(store, text="100%Ö") == set()
    assert await found(store, text=str(ours.entity_id)) == mine
    page = await dead_letter_store.page(store.database, DeadLetterQuery(restaurant_id=RESTAURANT))
    assert await found(store, ids=(page[0].id,)) == mine
    assert await found(store, ids=(str(uuid4()),)) == set()


async def test_groups_show_count_first_and_last_failure_sample_and_trend(store: Rig) -> None:
    at = now()
    early, late = new_dead_letter(at=at - timedelta(hours=30)), new_dead_letter(at=at - timedelta(hours=2, minutes=1))
    newest = new_dead_letter(at=at, error="BrokenContract: the newest")
    other = new_dead_letter(reason="too_large", restaurant_id=OTHER_RESTAURANT, lane=Lane.NORMAL)
    await keep(store, early, late, newest, other)
    await store.database.execute("update dead_letters set status = 'discarded' where digest = $1", late.digest)
    first, second = await dead_letter_store.groups(store.database, DeadLetterQuery())
    assert (first.fingerprint, first.reason, first.place) == (newest.fingerprint, newest.reason, newest.place)
    assert (first.count, first.open, first.queues) == (3, 2, (newest.queue,))
    assert (first.first_failed_at, first.last_failed_at) == (early.attempts[0].at, newest.attempts[0].at)
    assert first.sample_error == "BrokenContract: the newest"
    assert first.trend == (*[0] * 21, 1, 0, 1)
    assert (second.count, second.queues, sum(second.trend)) == (1, (other.queue,), 1)
    [only] = await dead_letter_store.groups(store.database, DeadLetterQuery(restaurant_id=OTHER_RESTAURANT))
    assert only.fingerprint == other.fingerprint


async def test_tenant_sees_only_its_own_dead_letters_and_none_that_names_another_tenant(store: Rig) -> None:
    ours, theirs = new_dead_letter(), new_dead_letter(restaurant_id=OTHER_RESTAURANT)
    mixed = new_dead_letter(body=message(change(order(restaurant_id=OTHER_RESTAURANT), restaurantid=RESTAURANT)))
    without_tenant = new_dead_letter(body=b"garbage")
    await keep(store, ours, theirs, mixed, without_tenant)
    api = await asyncpg.connect(store.settings.database_api_url)
    for tenant, expected in ((RESTAURANT, {ours.change_id}), (OTHER_RESTAURANT, {theirs.change_id}), ("", set())):
        async with api.transaction():
            await api.execute("select set_config('app.tenant', $1, true)", tenant)
            page = await dead_letter_store.page(api, DeadLetterQuery())
            assert {one.change_id for one in page} == expected
            groups = await dead_letter_store.groups(api, DeadLetterQuery())
            assert sum(group.count for group in groups) == len(expected)
    for table in ("dead_letter_edits", "replay_jobs", "replay_job_items"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await api.execute(f"select * from {table}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await api.execute("update dead_letters set status = 'discarded'")
    await api.close()


async def test_second_of_two_operators_gets_a_conflict(store: Rig, ops: Any) -> None:
    await keep(store, new_dead_letter())
    [seen] = await dead_letter_store.page(ops, DeadLetterQuery())
    async with ops.transaction():
        done = await actions.discard(ops, seen.id, revision=seen.revision, why="a test", **OPERATOR)
    assert (done.status, done.why, done.revision) == ("discarded", "a test", 2)
    assert done.closed_at is not None
    with pytest.raises(Conflict) as raised:
        await actions.discard(ops, seen.id, revision=seen.revision, why="me too", **OPERATOR)
    assert raised.value.error_code == "dead_letter_changed"
    assert raised.value.details["revision"] == 2
    with pytest.raises(Conflict) as raised:
        await actions.discard(ops, seen.id, revision=2, why="again", **OPERATOR)
    assert raised.value.error_code == "dead_letter_not_open"
    with pytest.raises(NotFound):
        await actions.discard(ops, str(uuid4()), revision=1, why="?", **OPERATOR)
    async with ops.transaction():
        back = await actions.restore(ops, seen.id, revision=2, why=None, **OPERATOR)
    assert (back.status, back.why, back.closed_at, back.revision) == ("open", None, None, 3)


async def test_edit_is_stored_with_its_dead_letter_and_every_action_is_audited(store: Rig, ops: Any) -> None:
    await keep(store, new_dead_letter())
    [seen] = await dead_letter_store.page(ops, DeadLetterQuery())
    change_id = str(uuid4())
    difference = [{"path": "total", "before": -1, "after": 1}]
    async with ops.transaction():
        taken = await actions.take(ops, seen.id, revision=1)
        assert taken.body
        done = await actions.replace(
            ops,
            seen.id,
            revision=1,
            event={"total": 1},
            difference=difference,
            change_id=change_id,
            why="typo",
            **OPERATOR,
        )
    assert (done.status, done.replaced_by) == ("resolved", change_id)
    [edit] = await dead_letter_store.edits(ops, seen.id)
    assert (edit.actor, edit.why, edit.event, edit.difference) == ("nadia", "typo", {"total": 1}, difference)
    [act] = await audit.actions_on(ops, f"dead_letter/{seen.id}")
    assert (act.actor, act.role, act.action, act.why) == ("nadia", "operator", "dead_letter.edit", "typo")
    assert (act.restaurant_id, act.details["change_id"]) == (RESTAURANT, change_id)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ops.execute("delete from audit")


async def test_another_death_invalidates_the_revision_that_an_operator_read(store: Rig, ops: Any) -> None:
    first = new_dead_letter()
    await keep(store, first)
    await keep(store, structs.replace(first, attempts=(Attempt(now(), "too_large", "?", "a:b"),)))
    with pytest.raises(Conflict):
        await actions.discard(
            ops, (await dead_letter_store.page(ops, DeadLetterQuery()))[0].id, revision=1, why="late", **OPERATOR
        )


async def test_attempts_stay_bounded_and_keep_the_first_one(store: Rig) -> None:
    first = new_dead_letter(at=datetime(2026, 1, 1, tzinfo=UTC))
    await keep(store, first)
    for number in range(1, 120):
        at = first.attempts[0].at + timedelta(minutes=number)
        await keep(store, structs.replace(first, attempts=(Attempt(at, f"r{number}", "?", "a:b"),)))
    [one] = await store.dead_letters(1)
    assert one.deaths == 120
    assert [attempt.reason for attempt in one.attempts] == ["negative_amount", *(f"r{n}" for n in range(21, 120))]


async def test_only_dead_letters_closed_before_the_retention_are_removed(store: Rig, ops: Any) -> None:
    stays, fresh, old = new_dead_letter(), new_dead_letter(), new_dead_letter()
    await keep(store, stays, fresh, old)
    close = "update dead_letters set status = 'discarded', closed_at = now() - $2::interval where digest = $1"
    await store.database.execute(close, fresh.digest, timedelta(days=29))
    await store.database.execute(close, old.digest, timedelta(days=31))
    await store.database.execute("update dead_letters set last_failed_at = now() - interval '1 year'")
    assert await retention.remove_closed_dead_letters(store.database, 30) == 1
    assert {one.change_id for one in await store.dead_letters(2)} == {stays.change_id, fresh.change_id}


async def test_plan_counts_open_dead_letters_by_target_queue(store: Rig, ops: Any) -> None:
    closed = new_dead_letter()
    [mirrored] = parse_dead_letters(topology.MIRROR_DEAD, None, message(change(order())), {}, now())
    await keep(store, new_dead_letter(), new_dead_letter(lane=Lane.NORMAL, reason="too_large"), closed, mirrored)
    await store.database.execute("update dead_letters set status = 'discarded' where digest = $1", closed.digest)
    plan = await replay_jobs.plan(ops, DeadLetterQuery())
    assert plan.total == 3
    assert plan.queues == {"sync.postgres.critical.v1": 1, "sync.postgres.normal.v1": 1, "mirror": 1}
    assert sum(plan.fingerprints.values()) == 3
    assert (await replay_jobs.plan(ops, DeadLetterQuery(reason="too_large"))).total == 1


async def test_job_covers_the_dead_letters_that_were_open_at_its_creation(store: Rig, ops: Any) -> None:
    at = datetime(2026, 3, 14, tzinfo=UTC)
    older, newer = new_dead_letter(at=at), new_dead_letter(at=at + timedelta(hours=1))
    await keep(store, newer, older)
    query = DeadLetterQuery(reason="negative_amount")
    job = await replay_jobs.make(ops, query, kind="replay", why="fixed", per_second=5.0, canary=False, **OPERATOR)
    await keep(store, new_dead_letter())
    assert (job.kind, job.state, job.total, job.outcomes, job.ended) == ("replay", "waiting", 2, {"waiting": 2}, False)
    assert (job.selection, job.per_second, job.canary) == ({"reason": "negative_amount"}, 5.0, False)
    parts = await replay_jobs.items(ops, job.id)
    assert [part.position for part in parts] == [1, 2]
    whole = [await dead_letter_store.one(ops, part.dead_letter_id) for part in parts]
    assert [one.change_id for one in whole if one] == [older.change_id, newer.change_id], (
        "the job did not take the oldest first"
    )
    [(known, part)] = await replay_jobs.of_dead_letter(ops, parts[1].dead_letter_id)
    assert (known.id, part.position) == (job.id, 2)
    [act] = await audit.actions_on(ops, f"job/{job.id}")
    assert (act.action, act.why, act.details["dead_letters"]) == ("dead_letters.replay", "fixed", 2)

    cancelled = await replay_jobs.cancel(ops, job.id, **OPERATOR)
    assert (cancelled.state, cancelled.ended) == ("cancelled", True)
    with pytest.raises(Conflict) as raised:
        await replay_jobs.cancel(ops, job.id, **OPERATOR)
    assert raised.value.error_code == "job_ended"
    with pytest.raises(NotFound):
        await replay_jobs.cancel(ops, str(uuid4()), **OPERATOR)

    nothing = await replay_jobs.make(ops, DeadLetterQuery(reason="no such"), kind="dry_run", **OPERATOR)
    assert (nothing.state, nothing.total) == ("done", 0)
    jobs = await replay_jobs.recent(ops, limit=1)
    assert [one.id for one in jobs] == [nothing.id]
    before = (jobs[0].created_at, jobs[0].id)
    assert [one.id for one in await replay_jobs.recent(ops, before=before)] == [job.id]
    assert encode(jobs)
