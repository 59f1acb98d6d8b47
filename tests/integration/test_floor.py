"""Tables with their open orders, bays with their queues, and jobs with their positions."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.orders.derived_figures import DerivedFigures
from services.orders.entity_reads import EntityReads, FoundState, Page
from shared.entities import job
from shared.entities.contract import Head, encode
from shared.entities.job import BayJob, JobStage, place_at, place_beside, place_between
from shared.entities.selection import Selection
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.security.tokens import Role
from tests.rigs.builders import CREATED_AT, RESTAURANT, new_id
from tests.rigs.restaurant import RestaurantRig, expect, made, refused, register_restaurant
from tests.rigs.system import System, eventually


@pytest.fixture(scope="module")
async def restaurant(system: System) -> RestaurantRig:
    return await register_restaurant(system)


# -- tables ------------------------------------------------------------------------------------------------------


async def test_table_is_free_occupied_or_reserved(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        table = made(await staff.post("/api/tables", json={"label": "Window 4", "seats": 4}))
        url = f"/api/tables/{table['id']}"
        assert table["state"] == "free"
        for state in ("reserved", "occupied"):
            assert expect(await staff.put(url, json={"state": state}))["state"] == state
            listed = expect(await staff.get("/api/tables", params={"state": state}))
            assert [one["id"] for one in listed] == [table["id"]]
        assert expect(await staff.get("/api/tables", params={"state": "reserved"})) == []
        refused(await staff.put(url, json={"state": "broken"}), 422, "invalid_input", "state")
        refused(await staff.put(url, json={"seats": 0}), 422, "invalid_input", "seats")


async def at_table(client: httpx.AsyncClient, table: str, dish: str) -> dict[str, Any]:
    body = {"items": [{"menu_item_id": dish, "quantity": 1}], "table_id": table}
    order: dict[str, Any] = made(await client.post("/api/orders", json=body))
    return order


async def shown_at(client: httpx.AsyncClient, table: str) -> list[dict[str, Any]]:
    """Returns the current orders of a table, after a check that the list shows the same ones."""
    one = expect(await client.get(f"/api/tables/{table}"))["current_orders"]
    listed = expect(await client.get("/api/tables", params={"limit": 200}))
    assert next(each for each in listed if each["id"] == table)["current_orders"] == one
    found: list[dict[str, Any]] = one
    return found


async def test_table_shows_its_open_orders(restaurant: RestaurantRig) -> None:
    dish = (await restaurant.dish(price=700))["id"]
    async with restaurant.client() as staff:
        table, other = [made(await staff.post("/api/tables", json={"label": x, "seats": 2}))["id"] for x in "AB"]
        assert await shown_at(staff, table) == []
        first, second, third, fourth = [await at_table(staff, table, dish) for _ in range(4)]
        await at_table(staff, other, dish)
        seen = await shown_at(staff, table)
        assert [one["id"] for one in seen] == [fourth["id"], third["id"], second["id"], first["id"]]
        assert seen[0] == {name: fourth[name] for name in ("id", "order_number", "status", "total", "created_at")}
        expect(await staff.put(f"/api/orders/{first['id']}", json={"status": "cancelled"}))
        expect(await staff.delete(f"/api/orders/{second['id']}"))
        expect(await staff.put(f"/api/orders/{third['id']}", json={"table_id": other}))
        for status in ("received", "preparing", "ready"):
            expect(await staff.put(f"/api/orders/{fourth['id']}", json={"status": status}))
            assert [(one["id"], one["status"]) for one in await shown_at(staff, table)] == [(fourth["id"], status)]
        expect(await staff.put(f"/api/orders/{fourth['id']}", json={"status": "completed"}))
        assert await shown_at(staff, table) == []
        assert len(await shown_at(staff, other)) == 2


async def test_guest_sees_only_its_own_orders_at_a_table(restaurant: RestaurantRig) -> None:
    dish = (await restaurant.dish())["id"]
    async with restaurant.client() as staff:
        table = made(await staff.post("/api/tables", json={"label": "Corner", "seats": 6}))["id"]
        await at_table(staff, table, dish)
        tokens = []
        for _ in range(2):
            scanned = {"slug": restaurant.slug, "table_id": table}
            tokens.append(made(await staff.post("/api/auth/table-session", json=scanned))["access_token"])
        async with (
            restaurant.system.client(token=tokens[0]) as guest,
            restaurant.system.client(token=tokens[1]) as stranger,
        ):
            own = await at_table(guest, table, dish)
            assert [one["id"] for one in await shown_at(guest, table)] == [own["id"]]
            assert await shown_at(stranger, table) == []
            listed = expect(await stranger.get("/api/tables", params={"fields": "current_orders"}))
            assert all(one["current_orders"] == [] for one in listed)
        assert len(await shown_at(staff, table)) == 2


# -- bays and jobs -----------------------------------------------------------------------------------------------


async def open_bay(client: httpx.AsyncClient, **fields: Any) -> str:
    return str(made(await client.post("/api/bays", json={"name": "Grill", "kind": "kitchen", **fields}))["id"])


async def queue_up(client: httpx.AsyncClient, bay: str, title: str = "Wash", **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = made(await client.post("/api/jobs", json={"bay_id": bay, "title": title, **fields}))
    return found


async def queue_of(client: httpx.AsyncClient, bay: str) -> list[str]:
    """Returns the titles in the order of the queue, after a check that the positions in the list agree."""
    queue = expect(await client.get(f"/api/bays/{bay}/queue"))
    assert [one["position"] for one in queue] == list(range(1, len(queue) + 1))
    listed = expect(await client.get("/api/jobs", params={"bay_id": bay, "stage": "queued", "limit": 200}))
    assert sorted((one["position"], one["id"]) for one in listed) == [
        (one["position"], one["job"]["id"]) for one in queue
    ]
    return [one["job"]["title"] for one in queue]


async def move(client: httpx.AsyncClient, job: dict[str, Any], **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = expect(await client.put(f"/api/jobs/{job['id']}", json=fields))
    return found


async def test_job_goes_through_its_stages(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        job = await queue_up(staff, bay)
        assert (job["stage"], job["position"], job["started_at"]) == ("queued", 1, None)
        begun = await move(staff, job, stage="in_progress")
        assert begun["started_at"] is not None
        assert (begun["position"], begun["finished_at"]) == (None, None)
        assert (await move(staff, job, stage="in_progress"))["version"] == begun["version"]
        back = await move(staff, job, stage="queued")
        assert (back["started_at"], back["position"]) == (None, 1)
        await move(staff, job, stage="in_progress")
        done = await move(staff, job, stage="done")
        assert done["finished_at"] >= done["started_at"]
        for stage in ("queued", "in_progress", "cancelled"):
            details = refused(await staff.put(f"/api/jobs/{job['id']}", json={"stage": stage}), 409, "illegal_stage")
            assert (details["stage"], details["allowed"]) == ("done", [])
        other = await queue_up(staff, bay)
        details = refused(
            await staff.put(f"/api/jobs/{other['id']}", json={"stage": "done"}), 409, "illegal_stage", "stage"
        )
        assert details["allowed"] == ["in_progress", "cancelled"]
        assert (await move(staff, other, stage="cancelled"))["finished_at"] is not None
        assert await queue_of(staff, bay) == []
        by_stage = {}
        for stage in JobStage:
            listed = expect(await staff.get("/api/jobs", params={"bay_id": bay, "stage": stage.value}))
            by_stage[stage.value] = [one["id"] for one in listed]
        assert by_stage == {"queued": [], "in_progress": [], "done": [job["id"]], "cancelled": [other["id"]]}


async def test_closed_bay_starts_no_job_and_keeps_its_queue(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        bay = await open_bay(staff, is_open=False)
        job = await queue_up(staff, bay, "Dry")
        refused(await staff.put(f"/api/jobs/{job['id']}", json={"stage": "in_progress"}), 409, "bay_closed", "stage")
        assert await queue_of(staff, bay) == ["Dry"]
        assert bay in [one["id"] for one in expect(await staff.get("/api/bays", params={"is_open": "false"}))]
        expect(await staff.put(f"/api/bays/{bay}", json={"is_open": True}))
        assert (await move(staff, job, stage="in_progress"))["stage"] == "in_progress"


async def test_jobs_of_a_deleted_bay_wait_for_another_bay(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        bay, other = await open_bay(staff), await open_bay(staff)
        job = await queue_up(staff, bay, "Dry")
        expect(await staff.delete(f"/api/bays/{bay}"))
        refused(await staff.put(f"/api/jobs/{job['id']}", json={"stage": "in_progress"}), 409, "bay_closed", "stage")
        refused(await staff.post("/api/jobs", json={"bay_id": bay, "title": "x"}), 422, "unknown_bay", "bay_id")
        refused(await staff.put(f"/api/jobs/{job['id']}", json={"bay_id": str(uuid4())}), 422, "unknown_bay", "bay_id")
        assert await queue_of(staff, bay) == ["Dry"]
        assert (await move(staff, job, bay_id=other, stage="in_progress"))["bay_id"] == other


async def test_job_moves_to_the_given_position(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        jobs = {title: await queue_up(staff, bay, title) for title in "ABCDE"}
        assert await queue_of(staff, bay) == list("ABCDE")
        for title, position, expected in (
            ("D", 1, "DABCE"),
            ("D", 3, "ABDCE"),
            ("A", 5, "BDCEA"),
            ("B", 9_999, "DCEAB"),
            ("E", 2, "DECAB"),
            ("E", 2, "DECAB"),
            ("B", 1, "BDECA"),
            ("C", 1, "CBDEA"),
        ):
            moved = await move(staff, jobs[title], position=position)
            assert moved["position"] == min(position, 5), (title, position)
            assert await queue_of(staff, bay) == list(expected)
        refused(await staff.put(f"/api/jobs/{jobs['A']['id']}", json={"position": 0}), 422, "invalid_input", "position")
        await move(staff, jobs["A"], stage="in_progress")
        refused(await staff.put(f"/api/jobs/{jobs['A']['id']}", json={"position": 1}), 409, "not_queued", "position")
        # One call puts the job back into the queue, at its first position.
        assert (await move(staff, jobs["A"], stage="queued", position=1))["position"] == 1
        await queue_up(staff, bay, "F")
        assert await queue_of(staff, bay) == list("ACBDEF")


async def test_job_moves_into_the_queue_of_another_bay(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        one, other = await open_bay(staff), await open_bay(staff)
        jobs = {title: await queue_up(staff, one if title in "ABC" else other, title) for title in "ABCXYZ"}
        assert (await move(staff, jobs["B"], bay_id=other, position=2))["position"] == 2
        await move(staff, jobs["A"], bay_id=other)
        assert await queue_of(staff, one) == ["C"]
        assert await queue_of(staff, other) == list("AXBYZ")


async def test_moves_into_the_same_gap_never_exhaust_it(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        jobs = {title: await queue_up(staff, bay, title) for title in "ABC"}
        for _ in range(20):
            for title in "CB":
                assert (await move(staff, jobs[title], position=2))["position"] == 2
        assert await queue_of(staff, bay) == list("ABC")


async def test_jobs_scheduled_for_one_moment_keep_their_order_of_creation_and_can_be_moved(
    restaurant: RestaurantRig,
) -> None:
    at = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        jobs = {title: await queue_up(staff, bay, title, scheduled_at=at) for title in "ABCD"}
        assert await queue_of(staff, bay) == list("ABCD")
        await move(staff, jobs["D"], position=2)
        assert await queue_of(staff, bay) == list("ADBC")


async def test_concurrent_moves_leave_every_job_at_its_own_position(restaurant: RestaurantRig) -> None:
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        jobs = {title: await queue_up(staff, bay, title) for title in "ABCDEF"}
        for position in (1, 2, 6):
            await asyncio.gather(*(move(staff, jobs[title], position=position) for title in "DEF"))
            queue = await queue_of(staff, bay)
            assert sorted(queue) == list("ABCDEF")
            assert [title for title in queue if title in "ABC"] == list("ABC")
            # Jobs that moved into one gap still differ: another job fits between any two of them.
            for place in range(1, 7):
                assert (await move(staff, jobs["C"], position=place))["position"] == place
            await move(staff, jobs["C"], position=queue.index("C") + 1)
            assert await queue_of(staff, bay) == queue


async def test_scheduled_job_is_queued_at_its_time(restaurant: RestaurantRig) -> None:
    now = datetime.now(UTC)

    def in_minutes(minutes: int) -> str:
        return (now + timedelta(minutes=minutes)).isoformat()

    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        await queue_up(staff, bay, "at once")
        late = await queue_up(staff, bay, "in 60", scheduled_at=in_minutes(60), expected_minutes=20, assigned_to="Kim")
        await queue_up(staff, bay, "in 30", scheduled_at=in_minutes(30))
        assert (late["expected_minutes"], late["assigned_to"]) == (20, "Kim")
        assert await queue_of(staff, bay) == ["at once", "in 30", "in 60"]
        moved = await move(staff, late, scheduled_at=in_minutes(10), title="in 10")
        assert datetime.fromisoformat(moved["scheduled_at"]) == now + timedelta(minutes=10)
        assert await queue_of(staff, bay) == ["at once", "in 10", "in 30"]
        assert (await move(staff, late, scheduled_at=None))["scheduled_at"] is None


@pytest.mark.parametrize(
    "at", ["1969-12-31T23:59:59Z", "2200-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "2026-01-01T00:00:00"]
)
async def test_time_outside_the_calendar_is_refused(restaurant: RestaurantRig, at: str) -> None:
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        job = await queue_up(staff, bay)
        reply = await staff.post("/api/jobs", json={"bay_id": bay, "title": "x", "scheduled_at": at})
        refused(reply, 422, "invalid_input", "scheduled_at")
        reply = await staff.put(f"/api/jobs/{job['id']}", json={"scheduled_at": at})
        refused(reply, 422, "invalid_input", "scheduled_at")


async def test_job_belongs_to_an_order(restaurant: RestaurantRig) -> None:
    dish = (await restaurant.dish())["id"]
    async with restaurant.client() as staff:
        bay = await open_bay(staff)
        body = {"items": [{"menu_item_id": dish, "quantity": 1}]}
        order, deleted = [made(await staff.post("/api/orders", json=body))["id"] for _ in range(2)]
        expect(await staff.delete(f"/api/orders/{deleted}"))
        linked, later = await queue_up(staff, bay, order_id=order), await queue_up(staff, bay)
        assert linked["order_id"] == order
        await move(staff, later, order_id=order)
        listed = expect(await staff.get("/api/jobs", params={"order_id": order}))
        assert [one["id"] for one in listed] == [later["id"], linked["id"]]
        await move(staff, later, order_id=None)
        assert len(expect(await staff.get("/api/jobs", params={"order_id": order}))) == 1
        for wrong in (deleted, str(uuid4())):
            linking = {"bay_id": bay, "title": "x", "order_id": wrong}
            refused(await staff.post("/api/jobs", json=linking), 422, "unknown_order", "order_id")
            reply = await staff.put(f"/api/jobs/{linked['id']}", json={"order_id": wrong})
            refused(reply, 422, "unknown_order", "order_id")

        async def stored() -> Any:
            async with restaurant.system.database() as connection:
                return await connection.fetchrow(
                    "select order_id::text, stage, place from jobs where id = $1", linked["id"]
                )

        row = await eventually(stored, what="the job in PostgreSQL")
    assert tuple(row) == (order, "queued", linked["place"])


async def test_guests_see_neither_bays_nor_jobs(restaurant: RestaurantRig) -> None:
    async with restaurant.client(Role.CUSTOMER, session="guest") as guest:
        for path in ("/api/bays", "/api/jobs", f"/api/bays/{uuid4()}/queue"):
            refused(await guest.get(path), 403, "forbidden")


# -- the rule of places ------------------------------------------------------------------------------------------

MOMENTS = st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2199, 12, 31), timezones=st.just(UTC))


@given(MOMENTS, MOMENTS, MOMENTS, MOMENTS)
def test_places_are_ordered_by_moment_and_then_by_creation(a: datetime, b: datetime, c: datetime, d: datetime) -> None:
    assert (place_at(a, c) < place_at(b, d)) == ((a, c) < (b, d))


@given(st.lists(st.tuples(st.integers(min_value=0, max_value=10_000), st.uuids()), max_size=150))
def test_there_is_always_a_place_between_two_places(moves: list[tuple[int, UUID]]) -> None:
    places = [place_at(CREATED_AT, CREATED_AT), place_at(CREATED_AT, CREATED_AT + timedelta(microseconds=1))]
    for position, share in moves:
        gap = position % (len(places) - 1)
        found = place_between(places[gap], places[gap + 1], tie_breaker=str(share))
        assert places[gap] < found < places[gap + 1]
        assert not found.endswith("0")
        places.insert(gap + 1, found)


def test_narrowest_gap_takes_hundreds_of_moves() -> None:
    low, high = place_at(CREATED_AT, CREATED_AT), place_at(CREATED_AT, CREATED_AT + timedelta(microseconds=1))
    for _ in range(500):
        found = place_between(low, high, tie_breaker=new_id())
        assert low < found < high
        assert len(found) <= 400
        high = found
    assert place_between(low, low, tie_breaker=new_id()) == low


def test_concurrent_places_in_one_gap_differ() -> None:
    low, high = place_at(CREATED_AT, CREATED_AT), place_at(CREATED_AT + timedelta(seconds=1), CREATED_AT)
    found = {place_between(low, high, tie_breaker=new_id()) for _ in range(20)}
    assert len(found) == 20
    ordered = sorted(found)
    assert ordered[0] < place_between(ordered[0], ordered[1], tie_breaker=new_id()) < ordered[1]


@given(st.lists(st.sampled_from((-1, 1)), max_size=50))
def test_there_is_a_place_before_the_first_and_after_the_last(ends: list[int]) -> None:
    places = [place_at(CREATED_AT, CREATED_AT)]
    for end in ends:
        found = place_beside(places[0] if end < 0 else places[-1], end, CREATED_AT)
        places = [found, *places] if end < 0 else [*places, found]
    assert places == sorted(set(places))


async def test_queue_longer_than_a_page_is_complete() -> None:
    bay = new_id()
    jobs = [
        BayJob(
            id=new_id(),
            restaurant_id=RESTAURANT,
            bay_id=bay,
            title=str(n),
            created_at=CREATED_AT + timedelta(seconds=n),
            updated_at=CREATED_AT,
            place=place_at(CREATED_AT, CREATED_AT + timedelta(seconds=n)),
        )
        for n in range(10)
    ]

    class Reads:
        async def page(self, entity: Any, restaurant: str, selection: Selection) -> Page:
            newest = [one for one in reversed(jobs) if selection.match(one)]
            found = [FoundState(job.ENTITY, Head(1, new_id()), encode(one), "postgres") for one in newest]
            return Page(found[: selection.limit], len(found) > selection.limit, True)

    figures = DerivedFigures(cast(EntityReads, Reads()), cast(Postgres, None), cast(Mirror, None), page_entities=3)
    queue = await figures.queue(RESTAURANT, bay)
    assert [one.title for one in queue] == [str(n) for n in range(10)]
