"""Dead letters as operators read them and act on them: pages, groups, tenants, revisions, audit, retention."""

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

WHO: dict[str, Any] = {"actor": "nadia", "role": "operator"}


@pytest.fixture
async def store(make_rig: MakeRig) -> Rig:
    rig: Rig = await make_rig()
    return rig


@pytest.fixture
async def ops(store: Rig) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(store.settings.database_ops_url)
    yield connection
    await connection.close()


def letter(
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


async def keep(rig: Rig, *letters: NewDeadLetter) -> None:
    assert len(await keep_all(rig.database, letters)) == len(letters)


async def found(rig: Rig, **wanted: Any) -> set[bytes]:
    page = await dead_letter_store.page(rig.database, DeadLetterQuery(**wanted), limit=100)
    assert len(page) == await dead_letter_store.count(rig.database, DeadLetterQuery(**wanted))
    whole = [await dead_letter_store.one(rig.database, one.id) for one in page]
    return {one.body for one in whole if one}


async def test_pages_come_newest_first_and_hold_everything_once(store: Rig) -> None:
    at = datetime(2026, 3, 14, tzinfo=UTC)
    # Several at the same moment: the cursor must tell them apart.
    made = [letter(at=at + timedelta(seconds=number // 4)) for number in range(10)]
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


async def test_each_filter_narrows_to_what_it_says(store: Rig) -> None:
    at = datetime(2026, 3, 14, tzinfo=UTC)
    ours = letter(at=at, customer_name="100% _Özgür_")
    theirs = letter(
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
    assert await found(store, text="100% _Özgür") == mine, "in the body, with what `like` would take for its own"
    assert await found(store, text="100%Ö") == set()
    assert await found(store, text=str(ours.entity_id)) == mine
    page = await dead_letter_store.page(store.database, DeadLetterQuery(restaurant_id=RESTAURANT))
    assert await found(store, ids=(page[0].id,)) == mine
    assert await found(store, ids=(str(uuid4()),)) == set()


async def test_groups_count_and_tell_first_last_sample_and_trend(store: Rig) -> None:
    at = now()
    early, late = letter(at=at - timedelta(hours=30)), letter(at=at - timedelta(hours=2, minutes=1))
    newest = letter(at=at, error="BrokenContract: the newest")
    other = letter(reason="too_large", restaurant_id=OTHER_RESTAURANT, lane=Lane.NORMAL)
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


async def test_a_restaurant_sees_its_own_letters_alone_and_none_that_names_another(store: Rig) -> None:
    ours, theirs = letter(), letter(restaurant_id=OTHER_RESTAURANT)
    mixed = letter(body=message(change(order(restaurant_id=OTHER_RESTAURANT), restaurantid=RESTAURANT)))
    nobodys = letter(body=b"garbage")
    await keep(store, ours, theirs, mixed, nobodys)
    api = await asyncpg.connect(store.settings.database_api_url)
    for tenant, expected in ((RESTAURANT, {ours.change_id}), (OTHER_RESTAURANT, {theirs.change_id}), ("", set())):
        async with api.transaction():
            await api.execute("select set_config('app.tenant', $1, true)", tenant)
            page = await dead_letter_store.page(api, DeadLetterQuery())  # type: ignore[arg-type]
            assert {one.change_id for one in page} == expected
            assert sum(group.count for group in await dead_letter_store.groups(api, DeadLetterQuery())) == len(expected)  # type: ignore[arg-type,misc]
    for table in ("dead_letter_edits", "replay_jobs", "replay_job_items"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await api.execute(f"select * from {table}")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await api.execute("update dead_letters set status = 'discarded'")
    await api.close()


async def test_of_two_operators_the_second_is_told(store: Rig, ops: Any) -> None:
    await keep(store, letter())
    [seen] = await dead_letter_store.page(ops, DeadLetterQuery())
    async with ops.transaction():
        done = await actions.discard(ops, seen.id, revision=seen.revision, why="a test", **WHO)
    assert (done.status, done.why, done.revision) == ("discarded", "a test", 2)
    assert done.closed_at is not None
    with pytest.raises(Conflict) as told:
        await actions.discard(ops, seen.id, revision=seen.revision, why="me too", **WHO)
    assert told.value.error_code == "dead_letter_changed"
    assert told.value.details["revision"] == 2
    with pytest.raises(Conflict) as told:
        await actions.discard(ops, seen.id, revision=2, why="again", **WHO)
    assert told.value.error_code == "dead_letter_not_open"
    with pytest.raises(NotFound):
        await actions.discard(ops, str(uuid4()), revision=1, why="?", **WHO)
    async with ops.transaction():
        back = await actions.restore(ops, seen.id, revision=2, why=None, **WHO)
    assert (back.status, back.why, back.closed_at, back.revision) == ("open", None, None, 3)


async def test_an_edit_is_kept_beside_its_letter_and_every_act_is_audited(store: Rig, ops: Any) -> None:
    await keep(store, letter())
    [seen] = await dead_letter_store.page(ops, DeadLetterQuery())
    change_id = str(uuid4())
    difference = [{"path": "total", "before": -1, "after": 1}]
    async with ops.transaction():
        taken = await actions.take(ops, seen.id, revision=1)
        assert taken.body
        done = await actions.replace(
            ops, seen.id, revision=1, event={"total": 1}, difference=difference, change_id=change_id, why="typo", **WHO
        )
    assert (done.status, done.replaced_by) == ("resolved", change_id)
    [edit] = await dead_letter_store.edits(ops, seen.id)
    assert (edit.actor, edit.why, edit.event, edit.difference) == ("nadia", "typo", {"total": 1}, difference)
    [act] = await audit.actions_on(ops, f"dead_letter/{seen.id}")
    assert (act.actor, act.role, act.action, act.why) == ("nadia", "operator", "dead_letter.edit", "typo")
    assert (act.restaurant_id, act.details["change_id"]) == (RESTAURANT, change_id)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await ops.execute("delete from audit")


async def test_a_death_moves_the_revision_under_an_operators_hands(store: Rig, ops: Any) -> None:
    first = letter()
    await keep(store, first)
    await keep(store, structs.replace(first, attempts=(Attempt(now(), "too_large", "?", "a:b"),)))
    with pytest.raises(Conflict):
        await actions.discard(
            ops, (await dead_letter_store.page(ops, DeadLetterQuery()))[0].id, revision=1, why="late", **WHO
        )


async def test_attempts_stay_bounded_and_the_first_one_is_not_forgotten(store: Rig) -> None:
    first = letter(at=datetime(2026, 1, 1, tzinfo=UTC))
    await keep(store, first)
    for number in range(1, 120):
        at = first.attempts[0].at + timedelta(minutes=number)
        await keep(store, structs.replace(first, attempts=(Attempt(at, f"r{number}", "?", "a:b"),)))
    [one] = await store.letters(1)
    assert one.deaths == 120
    assert [attempt.reason for attempt in one.attempts] == ["negative_amount", *(f"r{n}" for n in range(21, 120))]


async def test_only_what_was_closed_long_ago_is_taken_away(store: Rig, ops: Any) -> None:
    stays, fresh, old = letter(), letter(), letter()
    await keep(store, stays, fresh, old)
    close = "update dead_letters set status = 'discarded', closed_at = now() - $2::interval where digest = $1"
    await store.database.execute(close, fresh.digest, timedelta(days=29))
    await store.database.execute(close, old.digest, timedelta(days=31))
    await store.database.execute("update dead_letters set last_failed_at = now() - interval '1 year'")
    assert await retention.remove_closed_dead_letters(store.database, 30) == 1
    assert {one.change_id for one in await store.letters(2)} == {stays.change_id, fresh.change_id}


async def test_a_plan_counts_what_is_open_by_where_it_would_go(store: Rig, ops: Any) -> None:
    closed = letter()
    [mirrored] = parse_dead_letters(topology.MIRROR_DEAD, None, message(change(order())), {}, now())
    await keep(store, letter(), letter(lane=Lane.NORMAL, reason="too_large"), closed, mirrored)
    await store.database.execute("update dead_letters set status = 'discarded' where digest = $1", closed.digest)
    plan = await replay_jobs.plan(ops, DeadLetterQuery())
    assert plan.total == 3
    assert plan.queues == {"sync.postgres.critical.v1": 1, "sync.postgres.normal.v1": 1, "mirror": 1}
    assert sum(plan.fingerprints.values()) == 3
    assert (await replay_jobs.plan(ops, DeadLetterQuery(reason="too_large"))).total == 1


async def test_a_job_is_about_what_was_open_when_it_was_made(store: Rig, ops: Any) -> None:
    at = datetime(2026, 3, 14, tzinfo=UTC)
    older, newer = letter(at=at), letter(at=at + timedelta(hours=1))
    await keep(store, newer, older)
    wanted = DeadLetterQuery(reason="negative_amount")
    job = await replay_jobs.make(ops, wanted, kind="replay", why="fixed", per_second=5.0, canary=False, **WHO)
    await keep(store, letter())
    assert (job.kind, job.state, job.total, job.outcomes, job.ended) == ("replay", "waiting", 2, {"waiting": 2}, False)
    assert (job.wanted, job.per_second, job.canary) == ({"reason": "negative_amount"}, 5.0, False)
    parts = await replay_jobs.items(ops, job.id)
    assert [part.position for part in parts] == [1, 2]
    whole = [await dead_letter_store.one(ops, part.dead_letter_id) for part in parts]
    assert [one.change_id for one in whole if one] == [older.change_id, newer.change_id], "the oldest first"
    [(known, part)] = await replay_jobs.of_dead_letter(ops, parts[1].dead_letter_id)
    assert (known.id, part.position) == (job.id, 2)
    [act] = await audit.actions_on(ops, f"job/{job.id}")
    assert (act.action, act.why, act.details["dead_letters"]) == ("dead_letters.replay", "fixed", 2)

    cancelled = await replay_jobs.cancel(ops, job.id, **WHO)
    assert (cancelled.state, cancelled.ended) == ("cancelled", True)
    with pytest.raises(Conflict) as told:
        await replay_jobs.cancel(ops, job.id, **WHO)
    assert told.value.error_code == "job_ended"
    with pytest.raises(NotFound):
        await replay_jobs.cancel(ops, str(uuid4()), **WHO)

    nothing = await replay_jobs.make(ops, DeadLetterQuery(reason="no such"), kind="dry_run", **WHO)
    assert (nothing.state, nothing.total) == ("done", 0)
    jobs = await replay_jobs.recent(ops, limit=1)
    assert [one.id for one in jobs] == [nothing.id]
    before = (jobs[0].created_at, jobs[0].id)
    assert [one.id for one in await replay_jobs.recent(ops, before=before)] == [job.id]
    assert encode(jobs)
