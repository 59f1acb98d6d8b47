"""The notifier as a process, on a real stream and over real HTTP."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from services.notifier.cursor import cursor_at
from shared.entities.contract import Lane
from shared.entities.order import OrderStatus
from shared.messaging.position import LogPosition, checksum
from shared.security.tokens import Role
from tests.rigs.builders import OTHER_RESTAURANT, RESTAURANT, change, menu_item, message, order
from tests.rigs.http_client import http_client
from tests.rigs.notifier import (
    Notifier,
    NotifierRig,
    flood,
    moved,
    read_to_end,
    resume,
    silent_client,
    token,
)
from tests.rigs.servers import Servers
from tests.rigs.system import eventually


@pytest.fixture
async def rig(servers: Servers, tmp_path: Path) -> AsyncIterator[NotifierRig]:
    rig = NotifierRig(servers, tmp_path)
    await rig.make()
    yield rig
    await rig.clean()


async def test_connected_comes_first_then_each_change_once_and_in_order(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as screen:
        assert screen.response.headers["content-type"].startswith("text/event-stream")
        assert screen.response.headers["cache-control"] == "no-cache"
        assert screen.response.headers["x-accel-buffering"] == "no"
        connected = screen.events[0]
        assert connected.name == "connected"
        assert connected.data["restaurantId"] == RESTAURANT
        assert connected.data["cursor"] == connected.id
        placed = [order(order_number=f"{number:04}") for number in range(60)]
        created = [change(state) for state in placed]
        await rig.send(message(*created[:50]), *(message(one) for one in created[50:]))
        first, state = created[0], placed[0]
        received, state = moved(first, state, OrderStatus.RECEIVED)
        noted = change(state, base=received)
        deleted = change(state, event="deleted", base=noted)
        restored = change(state, event="restored", base=deleted)
        await rig.publish_each(received, noted, deleted, restored)
        events = await screen.first(64)
        assert [event.data["orderID"] for event in events[:60]] == [state.id for state in placed]
        assert {event.name for event in events[:60]} == {"order_created"}
        assert screen.names[60:] == ["stage_change", "status_update", "order_deleted", "status_update"]
        assert [event.data["version"] for event in events[60:]] == [2, 3, 4, 5]
        stage = events[60].data
        assert (stage["data"]["previousStage"], stage["data"]["newStage"]) == ("pending", "received")
        assert events[0].data["eventType"] == "order_created"
        assert events[0].data["data"]["items"][0]["name"] == "Masala Dosa"
        assert events[0].data["data"]["order_number"] == "0000"
        assert events[0].data["timestamp"].startswith(f"{created[0].time:%Y-%m-%dT%H:%M:%S}")
        assert "request_hash" not in events[0].data["data"]
        assert len({event.id for event in screen.events}) == 65


async def test_change_that_is_recorded_twice_is_pushed_once(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as screen:
        one, other = change(order()), change(order())
        await rig.publish_each(one, one, other, one)
        await rig.publish_each(last := change(order()))
        events = await screen.first(3)
        assert [event.data["orderID"] for event in events] == [one.entity_id, other.entity_id, last.entity_id]


async def test_tenant_sees_only_its_own_changes_even_if_events_name_foreign_orders(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    theirs = order(restaurant_id=OTHER_RESTAURANT)
    async with (
        notifier.screen() as screen,
        notifier.screen(by=token(restaurant=OTHER_RESTAURANT)) as other,
        notifier.screen(orderID=theirs.id) as curious,
    ):
        forged = change(theirs, restaurantid=RESTAURANT)
        await rig.publish_each(forged, change(theirs), mine := change(order()))
        assert [event.data["orderID"] for event in await screen.first(1)] == [mine.entity_id]
        assert [event.data["orderID"] for event in await other.first(1)] == [theirs.id]
        await rig.publish_each(change(order()), change(order(restaurant_id=OTHER_RESTAURANT)))
        await asyncio.gather(screen.first(2), other.first(2))
        assert len(screen.events) == 3 and len(other.events) == 3 and len(curious.events) == 1
    async with notifier.screen(after=screen.events[0].id, orderID=theirs.id) as curious:
        await rig.publish_each(change(order(id=theirs.id)))
        assert (await curious.first(1))[0].data["data"]["restaurant_id"] == RESTAURANT


async def test_customer_sees_only_orders_of_its_session_live_and_replayed(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    customer = token(Role.CUSTOMER, session="table-7")
    own, others, staff = (order(customer_session_id=session) for session in ("table-7", "table-8", None))
    async with notifier.screen(by=customer) as live, notifier.screen(by=customer, orderID=others.id) as curious:
        await rig.publish_each(change(others), change(staff), change(own))
        assert [event.data["orderID"] for event in await live.first(1)] == [own.id]
        start = live.events[0].id
    async with notifier.screen(by=customer, after=start) as replayed:
        await rig.publish_each(change(last := order(customer_session_id="table-7")))
        assert [event.data["orderID"] for event in await replayed.first(2)] == [own.id, last.id]
    assert len(curious.events) == 1


async def test_subscriber_of_one_order_gets_only_its_events_under_their_order_names(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    followed, other = order(), order()
    async with notifier.screen(orderID=followed.id.upper()) as one, notifier.screen() as every:
        created, noise = change(followed), change(other)
        await rig.publish_each(
            noise,
            created,
            moved(noise, other, OrderStatus.RECEIVED)[0],
            moved(created, followed, OrderStatus.RECEIVED)[0],
        )
        await every.first(4)
        events = await one.first(2)
        assert one.names == ["order_created", "order_stage_change"]
        assert {event.data["orderID"] for event in events} == {followed.id}
        assert events[1].data["eventType"] == "order_stage_change"
        assert every.names == ["order_created", "order_created", "stage_change", "stage_change"]
        assert events[1].id == every.events[4].id
    async with notifier.screen(orderID=followed.id, lastEventId=one.events[0].id) as again:
        await again.first(2)
        assert again.names == one.names and [event.id for event in again.events[1:]] == [event.id for event in events]


async def test_event_types_filter_the_stream(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    state = order()
    created = change(state)
    received, state = moved(created, state, OrderStatus.RECEIVED)
    noted = change(state, base=received)
    async with (
        notifier.screen(eventTypes="stage_change,order_deleted") as stages,
        notifier.screen(eventTypes="order_created") as births,
        notifier.screen(eventTypes="validated", orderID="") as nothing,
    ):
        await rig.publish_each(created, received, noted, change(state, event="deleted", base=noted))
        await stages.first(2)
        await births.first(1)
        assert stages.names == ["stage_change", "order_deleted"]
        assert births.names == ["order_created"]
        assert nothing.names == []
    async with notifier.screen(eventTypes="status_update", after=stages.events[0].id) as replayed:
        await replayed.first(1)
        assert replayed.names == ["status_update"]


async def test_cursor_is_valid_after_a_restart_and_on_a_second_instance(rig: NotifierRig) -> None:
    first = await rig.notifier()
    changes = [change(order()) for _ in range(10)]
    async with first.screen() as screen:
        await rig.send(message(*changes[:4]), message(*changes[4:8]))
        seen = await screen.first(8)
    cursor = seen[2].id  # a cursor inside a message
    await asyncio.to_thread(first.child.terminate, 10)
    second, third = await asyncio.gather(rig.notifier(), rig.notifier(instance=2))
    for notifier in (second, third):
        # A browser that reconnects repeats the query of its first request, so the header takes precedence.
        async with notifier.screen(lastEventId=seen[0].id, after=cursor) as screen:
            assert screen.events[0].data["cursor"] == cursor
            events = await screen.first(5)
            assert [event.data["orderID"] for event in events] == [change.entity_id for change in changes[3:8]]
            assert [event.id for event in events] == [event.id for event in seen[3:]]
    async with second.screen(after=cursor) as on_second, third.screen(after=seen[-1].id) as on_third:
        await rig.publish_each(*changes[8:])
        assert [event.id for event in (await on_second.first(7))[5:]] == [event.id for event in await on_third.first(2)]
        assert "resync" not in on_second.names + on_third.names


async def test_cursor_of_connected_resumes_before_any_event_has_come(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    await rig.publish_each(change(order()))
    await eventually(notifier.health, until=lambda health: health[1]["window"] == 1)
    async with notifier.screen() as screen:
        cursor = screen.last_event_id
    await rig.publish_each(missed := change(order()))
    async with notifier.screen(after=cursor) as screen:
        assert [event.data["orderID"] for event in await screen.first(1)] == [missed.entity_id]


async def test_replay_continues_live_without_a_gap_or_a_repetition(rig: NotifierRig) -> None:
    notifier = await rig.notifier(client_buffer_events=100_000, client_buffer_bytes=1 << 30)
    await rig.publish_each(change(order()))
    async with notifier.screen() as screen:
        start = screen.events[0].id
    # The replay takes more than one step, so that the test reaches the switch to live events.
    changes = [change(order(items=1)) for _ in range(3_000)]
    saying = asyncio.create_task(rig.send(*(message(*changes[at : at + 3]) for at in range(0, 3_000, 3))))

    coming: list[Any] = []
    while not saying.done() and len(coming) < 12:
        coming.append(asyncio.create_task(resume(notifier, start, 3_000)))
        await asyncio.wait((saying,), timeout=0.05)
    await saying
    for seen in await asyncio.gather(*coming):
        assert seen[1:] == [change.entity_id for change in changes]


async def test_cursor_older_than_the_window_gets_a_resync_and_continues_live(rig: NotifierRig) -> None:
    notifier = await rig.notifier(replay_window_changes=5)
    async with notifier.screen() as screen:
        await rig.publish_each(*(change(order()) for _ in range(10)))
        seen = await screen.first(10)
    async with notifier.screen(after=seen[3].id) as late:
        resync = (await late.first(1))[0]
        assert resync.name == "resync"
        assert resync.data == {"reason": "too_old", "cursor": resync.id}
        await rig.publish_each(fresh := change(order()))
        assert (await late.first(2))[1].data["orderID"] == fresh.entity_id
    async with notifier.screen(after=seen[5].id) as in_time:
        await in_time.first(5)
        assert "resync" not in in_time.names
    async with notifier.screen(after=resync.id) as resumed:
        assert [event.data["orderID"] for event in await resumed.first(1)] == [fresh.entity_id]


async def test_cursor_beyond_the_log_gets_a_resync(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen(after="999999-0123abcd-0") as screen:
        assert (await screen.first(1))[0].data["reason"] == "truncated"


async def test_cursor_ahead_of_an_instance_waits_until_the_instance_reaches_it(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as screen, rig.publishing() as publish:
        await publish(message(change(order())))
        for count in (1, 3, 5):
            offset = int((await screen.first(count))[-1].id.partition("-")[0])
            ahead, message_id = message(change(order())), uuid4().hex
            cursor = cursor_at(LogPosition(offset + 1, checksum(ahead, message_id)))
            asked = asyncio.Event()
            coming = asyncio.create_task(resume(notifier, str(cursor), 1, asked=asked, within=45))
            await asyncio.wait_for(asked.wait(), 60)
            await publish(ahead, message_id=message_id)
            await publish(message(last := change(order())))
            seen = await coming
            # A resync may only mean that the machine stalled for two seconds, the time that the notifier waits. Then
            # the test tries again.
            if "resync" not in seen:
                break
    assert seen == ["connected", last.entity_id]


@pytest.mark.parametrize(
    ("params", "headers", "field"),
    [
        ({"orderID": "7"}, {}, "orderID"),
        ({"eventTypes": "order_created,dessert"}, {}, "eventTypes"),
        ({"eventTypes": ["order_created", "dessert"]}, {}, "eventTypes"),
        ({"foo": "1"}, {}, "foo"),
        ({"orderId": str(uuid4())}, {}, "orderId"),
        ({"orderID": [str(uuid4()), str(uuid4())]}, {}, "orderID"),
    ],
)
async def test_garbage_parameter_is_refused_by_name(
    one_notifier: Notifier, params: dict[str, Any], headers: dict[str, str], field: str
) -> None:
    answer = await one_notifier.get(params=params, headers=headers)
    assert answer.status_code == 422
    assert answer.json()["error"]["details"]["field"] == field


@pytest.mark.parametrize(
    "cursor",
    ["event_123456", "garbage", "1-0123abcd", "1-0123abcd-x", f"{'9' * 30}-0123abcd-0", "-1--2", "null", "undefined"],
)
async def test_unreadable_cursor_gets_a_resync_and_continues_live(rig: NotifierRig, cursor: str) -> None:
    """Any status but 200 would end the EventSource of a browser for good."""
    notifier = await rig.notifier()
    async with notifier.screen(after=cursor) as header, notifier.screen(lastEventId=cursor) as query:
        one = change(order())
        await rig.publish_each(one)
        for screen in (header, query):
            await screen.first(2)
            assert screen.names == ["resync", "order_created"]
            assert screen.events[1].data["reason"] == "unreadable"
            assert screen.events[2].data["orderID"] == one.entity_id
    async with notifier.screen(lastEventId=f"{cursor}\0") as query:  # no header can have this character
        await query.first(1)
        assert query.names == ["resync"]


async def test_event_types_may_be_repeated(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    created = change(order())
    async with notifier.screen(eventTypes=["order_deleted", "order_created"]) as screen:  # type: ignore[arg-type]
        await rig.publish_each(created)
        (event,) = await screen.first(1)
        assert (event.name, event.data["orderID"]) == ("order_created", created.entity_id)


async def test_head_request_for_the_stream_ends_at_once_and_leaves_no_subscriber(one_notifier: Notifier) -> None:
    async with http_client(headers={"Authorization": f"Bearer {token()}"}) as client:
        reply = await client.head(f"{one_notifier.base}/api/v1/sync/events")
    assert (reply.status_code, reply.content) == (200, b"")
    assert reply.headers["content-type"].startswith("text/event-stream")
    await eventually(one_notifier.subscribers, what="no subscriber", until=lambda count: count == 0)


async def test_stream_needs_a_token_and_a_restaurant(one_notifier: Notifier) -> None:
    assert (await one_notifier.get(headers={"Authorization": ""})).status_code == 401
    assert (await one_notifier.get(by=token(Role.OPERATOR, restaurant=""))).status_code == 403
    assert (await one_notifier.get("/api/v1/sync/nothing")).status_code == 404


@pytest.fixture(scope="module")
async def one_notifier(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Notifier]:
    rig = NotifierRig(servers, tmp_path_factory.mktemp("notifier"))
    await rig.make()
    yield await rig.notifier()
    await rig.clean()


async def test_recreated_log_resyncs_connected_clients_and_clients_with_an_old_cursor(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as screen:
        await rig.publish_each(change(order()), change(order()))
        old = (await screen.first(2))[1]
        await rig.recreate_log()
        await rig.publish_each(fresh := change(order()))
        # The resync comes after the first messages of the new log, because its cursor must name one of them.
        found = sorted((await screen.first(4))[2:], key=lambda event: event.name)
        assert [event.name for event in found] == ["order_created", "resync"]
        event, resync = found
        assert resync.data["reason"] == "truncated"
        assert event.data["orderID"] == fresh.entity_id
        for back in (notifier, await rig.notifier()):
            async with back.screen(after=old.id) as late:
                assert (await late.first(1))[0].data["reason"] == "truncated"
            await rig.publish_each(after := change(order()))
            async with back.screen(after=resync.id) as resumed:
                await resumed.until(lambda: resumed.events[-1].data.get("orderID") == after.entity_id)
                assert "resync" not in resumed.names


async def test_poison_in_the_log_is_skipped_and_stops_nothing(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as screen:
        good = [change(order()) for _ in range(3)]
        await rig.send(
            b"\xff not even JSON",
            b"{}",
            message(good[0], b'{"type":"ticketrail.order.created.v1"}', good[1]),
            message(change(order(), type="ticketrail.order.created.v9")),
            message(change(order(), type="ticketrail.unicorn.seen.v1")),
            message(change(order(), subject="order/7")),
            b"[]",
            lane=Lane.CRITICAL,
        )
        await rig.send(message(change(menu_item())), lane=Lane.NORMAL)
        await rig.publish_each(good[2])
        assert [event.data["orderID"] for event in await screen.first(3)] == [one.entity_id for one in good]
        assert len(screen.events) == 4
        assert screen.events[2].id.endswith("-2"), "the poison change lost its position in the message"


async def test_slow_client_gets_a_resync_and_is_disconnected_while_others_continue(rig: NotifierRig) -> None:
    notifier = await rig.notifier(client_buffer_events=30)
    async with notifier.screen() as quick:
        sent = 0
        # If the machine stalls for two seconds, the notifier cuts a client that would have read in time.
        for _ in range(3):
            async with silent_client(notifier) as reader:
                sent += await flood(rig, notifier)
                if received := await read_to_end(reader):
                    break
        assert b'event: resync\ndata: {"reason":"slow","cursor":"' in received
        await quick.first(sent)
        await rig.publish_each(change(order()))
        await quick.first(sent + 1)
        assert set(quick.names) == {"order_created"}


async def test_slow_client_that_never_reads_again_is_cut(rig: NotifierRig) -> None:
    notifier = await rig.notifier(client_buffer_bytes=1_000_000)
    async with silent_client(notifier) as reader:
        await flood(rig, notifier)
        await eventually(notifier.has_cut_client)
        received = b""
        async with asyncio.timeout(20):
            while data := await reader.read(1 << 20):
                received = (received + data)[-1_000:]
        assert b"resync" not in received


async def test_client_that_leaves_is_removed(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen(), notifier.screen(orderID=str(uuid4())):
        assert await notifier.subscribers() == 2
    await eventually(notifier.subscribers, until=lambda count: count == 0)


async def test_keep_alives_carry_a_cursor_inside_the_window(rig: NotifierRig) -> None:
    notifier = await rig.notifier(push_keepalive_seconds=0.2, replay_window_changes=2)
    async with notifier.screen(eventTypes="order_deleted") as screen:
        await rig.publish_each(*(change(order()) for _ in range(5)))
        await eventually(notifier.health, until=lambda health: health[1]["window"] == 2)
        keep_alives = screen.comments
        await screen.until(lambda: screen.comments >= keep_alives + 2)
        assert screen.names == []
        assert screen.last_event_id != screen.events[0].id
    async with notifier.screen(eventTypes="order_deleted", after=screen.last_event_id) as back:
        keep_alives = back.comments
        await back.until(lambda: back.comments > keep_alives)
        assert back.names == []


async def test_sigterm_ends_open_streams_and_the_process(rig: NotifierRig) -> None:
    notifier = await rig.notifier()
    async with notifier.screen() as one, notifier.screen(orderID=str(uuid4())) as other:
        assert await asyncio.to_thread(notifier.child.terminate, 15.0), notifier.child.tail()
        await one.until(lambda: one.ended)
        await other.until(lambda: other.ended)
        assert "broken" not in one.names + other.names
    assert notifier.child.returncode == 0


async def test_client_that_does_not_read_does_not_block_the_shutdown(rig: NotifierRig) -> None:
    notifier = await rig.notifier(client_buffer_events=1_000_000, client_buffer_bytes=1 << 30)
    async with silent_client(notifier), notifier.screen() as other:
        await rig.publish_each(*(change(order(items=400)) for _ in range(150)))
        await other.first(150)
        assert await asyncio.to_thread(notifier.child.terminate, 20.0), notifier.child.tail()


async def test_notifier_is_not_ready_before_its_window_is_filled(rig: NotifierRig, servers: Servers) -> None:
    await asyncio.to_thread(servers.rabbitmq.freeze)
    try:
        notifier = await rig.notifier(wait=False)
        status, details = await eventually(notifier.health, what="a reply")
        assert (status, details["caught_up"], details["broker"]) == (503, False, False)
        answer = await notifier.get()
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "not_caught_up"
    finally:
        await asyncio.to_thread(servers.rabbitmq.thaw)
    await notifier.ready()


async def test_start_on_a_long_log_is_ready_only_after_all_of_it_is_read(rig: NotifierRig) -> None:
    await rig.send(*(message(*(change(order(items=1)) for _ in range(250))) for _ in range(20)))
    notifier = await rig.notifier(wait=False)
    seen: list[tuple[int, int]] = []

    async def look() -> int:
        status, details = await notifier.health()
        seen.append((status, details["window"]))
        return status

    await eventually(look, within=30, until=lambda status: status == 200)
    assert {window for status, window in seen if status == 200} == {5_000}


async def test_notifier_without_heartbeats_pushes_and_reports_them_as_stale(rig: NotifierRig) -> None:
    notifier = await rig.notifier(heartbeat_interval_seconds=0.1)
    status, details = await eventually(notifier.health, until=lambda health: health[1]["heartbeats"] == "stale")
    assert (status, details["caught_up"]) == (200, True)
    async with notifier.screen() as screen:
        await rig.publish_each(change(order()))
        await screen.first(1)

    async def after_a_heartbeat() -> dict[str, Any]:
        await rig.heartbeat()
        return (await notifier.health())[1]

    # The test sends a heartbeat before each look, because a heartbeat is fresh for only two seconds.
    await eventually(after_a_heartbeat, what="a fresh heartbeat", until=lambda seen: seen["heartbeats"] == "fresh")


async def test_start_without_the_log_is_refused_and_names_the_command(servers: Servers, tmp_path: Path) -> None:
    rig = NotifierRig(servers, tmp_path)
    await rig.make(with_log=False)
    notifier = await rig.notifier(wait=False)
    assert await asyncio.to_thread(notifier.child.wait, 20) not in (None, 0)
    assert "changes.log.v1" in notifier.child.tail(50) and "ticketrail migrate" in notifier.child.tail(50)
    await rig.clean()
