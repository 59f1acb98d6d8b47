"""The hub and its window, without a network: every subscriber receives the events it asked for, in order and once."""

import asyncio
from collections.abc import Iterable
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.notifier.cursor import Cursor
from services.notifier.events import PushEvent, PushKind
from services.notifier.hub import Form, Hub, Subscriber
from services.notifier.interest import Interest
from services.notifier.window import Window
from shared.messaging.position import LogPosition

FORM = Form(
    event=lambda event, interest: f"{'one ' if interest.order_id else ''}{event.change_id} ".encode(),
    resync=lambda reason, cursor: f"resync:{reason}:{cursor} ".encode(),
    keep_alive=lambda cursor: f"keep-alive:{cursor} ".encode(),
    closing=lambda reason, retry_after: f"closing:{reason} ".encode(),
)


def position(offset: int, log: str = "") -> LogPosition:
    """The position of the message at `offset`. In another log, another message stands there."""
    return LogPosition(offset, crc32(f"{log}{offset}".encode()))


def cursor(offset: int, place: int = 0, log: str = "") -> Cursor:
    return Cursor(*position(offset, log), place)


def event(offset: int, place: int = 0, log: str = "", **fields: object) -> PushEvent:
    values: dict[str, Any] = {
        "change_id": f"{log}c{offset}.{place}",
        "tenant": "a",
        "order_id": "o",
        "session_id": None,
        "kind": PushKind.STATUS_UPDATE,
        "_name": "status_update",
        "_rest": b"x" * 100,
        **fields,
    }
    return PushEvent(cursor=cursor(offset, place, log), **values)


def hub(
    *, seconds: float = 600, changes: int = 1_000, size: int = 1 << 20, events: int = 100, buffer: int = 1 << 20
) -> Hub:
    made = Hub(Window(seconds=seconds, changes=changes, size=size), buffer_events=events, buffer_bytes=buffer)
    made.begin(position(0))
    signal(made, 0)
    return made


def publish(to: Hub, *events: PushEvent, at: float = 0.0) -> None:
    positions = list(dict.fromkeys(LogPosition(one.cursor.offset, one.cursor.crc) for one in events))
    to.publish(events, positions, events[-1].cursor, at)


def signal(to: Hub, offset: int, log: str = "") -> None:
    """The reader gets a message without a change."""
    to.publish([], [position(offset, log)], cursor(offset, log=log), 0.0)


def taken(subscriber: Subscriber) -> list[str]:
    return subscriber.take().decode().split()


def replayed(from_: Hub, subscriber: Subscriber) -> list[str]:
    found = []
    while (chunk := from_.resume(subscriber)) is not None:
        found += chunk.decode().split()
    return found


def test_a_subscriber_receives_only_events_of_its_tenant() -> None:
    rail = hub()
    mine, theirs = (rail.subscribe(Interest(tenant), FORM, None) for tenant in "ab")
    publish(rail, event(1), event(2, tenant="b"), event(3, tenant="c"), event(4))
    assert (taken(mine), taken(theirs)) == (["c1.0", "c4.0"], ["c2.0"])


def test_a_narrow_interest_receives_only_the_events_that_it_names() -> None:
    rail = hub()
    one = rail.subscribe(Interest("a", order_id="o1"), FORM, None)
    session = rail.subscribe(Interest("a", session_id="s1"), FORM, None)
    both = rail.subscribe(Interest("a", order_id="o1", session_id="s1"), FORM, None)
    kinds = rail.subscribe(Interest("a", kinds=PushKind.ORDER_CREATED | PushKind.ORDER_DELETED), FORM, None)
    publish(
        rail,
        event(1, order_id="o1", session_id="s1"),
        event(2, order_id="o1", session_id="s2"),
        event(3, order_id="o2", session_id="s1", kind=PushKind.ORDER_CREATED),
        event(4, order_id="s1", session_id="o1", kind=PushKind.ORDER_DELETED),
    )
    assert taken(one) == ["one", "c1.0", "one", "c2.0"]
    assert taken(session) == ["c1.0", "c3.0"]
    assert taken(both) == ["one", "c1.0"]
    assert taken(kinds) == ["c3.0", "c4.0"]


def test_subscribers_with_the_same_interest_share_the_bytes() -> None:
    rail = hub()
    some = [rail.subscribe(Interest("a"), FORM, None) for _ in range(3)]
    publish(rail, event(1), event(2))
    chunks = [subscriber.take() for subscriber in some]
    assert chunks[0] == b"c1.0 c2.0 " and all(chunk is chunks[0] for chunk in chunks)


def test_waiting_events_are_taken_in_one_chunk() -> None:
    rail = hub()
    subscriber = rail.subscribe(Interest("a"), FORM, None)
    for offset in range(1, 4):
        publish(rail, event(offset))
    assert subscriber.take() == b"c1.0 c2.0 c3.0 "
    assert subscriber.take() == b""


def test_a_repeated_change_is_not_pushed_again_but_moves_the_cursor() -> None:
    rail = hub()
    subscriber = rail.subscribe(Interest("a"), FORM, None)
    publish(rail, event(1))
    publish(rail, event(2, change_id="c1.0"))
    assert taken(subscriber) == ["c1.0"]
    assert rail.window.present == cursor(2)


def test_a_replay_starts_after_the_cursor_even_inside_a_message() -> None:
    rail = hub()
    publish(rail, *(event(1, place) for place in range(4)), event(2))
    subscriber = rail.subscribe(Interest("a"), FORM, cursor(1, 1))
    assert replayed(rail, subscriber) == ["c1.2", "c1.3", "c2.0"]
    publish(rail, event(3))
    assert taken(subscriber) == ["c3.0"]


def test_events_published_during_a_replay_arrive_once_and_in_order() -> None:
    rail = hub()
    publish(rail, *(event(offset) for offset in range(1, 600)))
    subscriber = rail.subscribe(Interest("a"), FORM, cursor(0))
    found = []
    offset = 600
    while (chunk := rail.resume(subscriber)) is not None:
        found += chunk.decode().split()
        if offset < 605:
            publish(rail, event(offset))
            offset += 1
    publish(rail, event(offset))
    assert found + taken(subscriber) == [f"c{number}.0" for number in range(1, offset + 1)]


@pytest.mark.parametrize(
    ("given_", "reason"),
    [
        (cursor(2), "too_old"),
        (cursor(0), "too_old"),
        (cursor(5, log="old"), "truncated"),
        (cursor(99), "truncated"),
        (cursor(9, 1), "truncated"),
    ],
)
def test_a_cursor_that_cannot_be_resumed_gets_one_resync_and_then_live_events(given_: Cursor, reason: str) -> None:
    rail = hub(changes=5)
    publish(rail, *(event(offset) for offset in range(1, 10)))
    subscriber = rail.subscribe(Interest("a"), FORM, given_)
    assert replayed(rail, subscriber) == [f"resync:{reason}:{cursor(9)}"]
    publish(rail, event(10))
    assert taken(subscriber) == ["c10.0"]


def test_the_last_position_that_left_the_window_can_still_be_resumed() -> None:
    rail = hub(changes=5)
    publish(rail, *(event(offset) for offset in range(1, 10)))
    assert replayed(rail, rail.subscribe(Interest("a"), FORM, cursor(4))) == [f"c{number}.0" for number in range(5, 10)]


def test_a_replay_that_the_window_overtakes_gets_a_resync() -> None:
    rail = hub(changes=400)
    publish(rail, *(event(offset) for offset in range(1, 401)))
    subscriber = rail.subscribe(Interest("a"), FORM, cursor(0))
    assert rail.resume(subscriber)
    publish(rail, *(event(offset) for offset in range(401, 801)))
    assert replayed(rail, subscriber) == [f"resync:too_old:{cursor(800)}"]


def test_the_window_drops_events_by_age_and_by_size() -> None:
    old = hub(seconds=10)
    publish(old, event(1), at=0)
    publish(old, event(2), at=5)
    publish(old, event(3), at=12)
    assert len(old.window) == 2 and old.window.floor == cursor(1)
    old.window.forget(100)
    assert len(old.window) == 0 and old.window.floor == cursor(3)
    large = hub(size=250)
    publish(large, event(1), event(2), event(3))
    assert len(large.window) == 2 and large.window.holds_all_after(cursor(1))
    publish(large, event(4, change_id="c1.0"))
    assert large.window.after("a", cursor(3), 9), "a change that left the window was not pushed again"


def test_only_a_slow_subscriber_gets_a_resync_and_is_disconnected() -> None:
    async def scene() -> None:
        rail = hub(events=3)
        slow, quick = rail.subscribe(Interest("a"), FORM, None), rail.subscribe(Interest("a"), FORM, None)
        for offset in range(1, 6):
            publish(rail, event(offset))
            assert taken(quick) == [f"c{offset}.0"]
        assert taken(slow) == [f"resync:slow:{cursor(4)}", "closing:slow"]
        assert slow.ended and not quick.ended
        assert len(rail) == 1

    asyncio.run(scene())


def test_a_single_large_batch_makes_no_subscriber_slow() -> None:
    rail = hub(events=3)
    subscriber = rail.subscribe(Interest("a"), FORM, None)
    publish(rail, *(event(offset) for offset in range(1, 50)))
    assert len(taken(subscriber)) == 49 and not subscriber.ended


def test_too_many_waiting_bytes_make_a_subscriber_slow() -> None:
    async def scene() -> None:
        rail = hub(buffer=8)
        subscriber = rail.subscribe(Interest("a"), FORM, None)
        publish(rail, event(1))
        publish(rail, event(2))
        assert taken(subscriber) == [f"resync:slow:{cursor(2)}", "closing:slow"]

    asyncio.run(scene())


def test_a_new_log_resyncs_all_subscribers_and_empties_the_window() -> None:
    rail = hub()
    live = rail.subscribe(Interest("a"), FORM, None)
    publish(rail, *(event(offset) for offset in range(1, 600)))
    replaying = rail.subscribe(Interest("a"), FORM, cursor(0))
    assert rail.resume(replaying)
    live.take()
    rail.begin(position(0, "new"))
    publish(rail, event(0, log="new"))
    rail.resync("truncated")
    assert taken(live) == ["newc0.0", f"resync:truncated:{cursor(0, log='new')}"]
    assert replayed(rail, replaying) == [f"resync:truncated:{cursor(0, log='new')}"]
    publish(rail, event(1, log="new"))
    assert taken(live) == taken(replaying) == ["newc1.0"]


def test_a_log_that_lost_its_end_continues_for_live_subscribers_and_resyncs_lost_cursors() -> None:
    rail = hub()
    live = rail.subscribe(Interest("a"), FORM, None)
    publish(rail, *(event(offset) for offset in range(1, 10)))
    live.take()
    # The reader goes back to 4. The log has lost 7 to 9 and has other messages there.
    publish(rail, event(5), event(6))
    assert taken(live) == [], "a change that the window has was pushed again"
    publish(rail, event(6, change_id="c0.0"))
    assert taken(live) == [], "a change that was too old for the window when it was read again was pushed again"
    signal(rail, 7, log="new")
    assert rail.window.present == cursor(7, log="new") and len(rail.window) == 6
    publish(rail, event(8, log="new"), event(9, change_id="c9.0"))
    assert taken(live) == ["newc8.0", "c9.0"]
    for lost in (cursor(7), cursor(8), cursor(8, 1)):
        back = rail.subscribe(Interest("a"), FORM, lost)
        assert replayed(rail, back) == [f"resync:truncated:{rail.window.present}"]
    for kept, missed in ((cursor(6), ["newc8.0", "c9.0"]), (cursor(7, log="new"), ["newc8.0", "c9.0"])):
        assert replayed(rail, rail.subscribe(Interest("a"), FORM, kept)) == missed


def test_a_replay_whose_last_message_is_lost_meanwhile_gets_a_resync() -> None:
    rail = hub()
    publish(rail, *(event(offset) for offset in range(1, 600)))
    subscriber = rail.subscribe(Interest("a"), FORM, cursor(300))
    assert rail.resume(subscriber)
    signal(rail, 400, log="new")
    assert replayed(rail, subscriber) == [f"resync:truncated:{cursor(400, log='new')}"]


def test_a_reader_can_go_back_to_some_older_positions_and_at_last_to_the_oldest() -> None:
    rail = hub()
    for offset in range(1, 10):
        signal(rail, offset)
    assert rail.window.older_positions() == [position(8), position(6), position(2), position(0)]
    signal(rail, 1, log="new")
    assert rail.window.present == cursor(1, log="new")
    signal(rail, 0, log="new")
    assert rail.window.floor.offset == rail.window.present.offset == 0


def test_an_idle_log_does_not_grow_the_window() -> None:
    rail = hub(changes=10)
    for offset in range(1, 1_000):
        signal(rail, offset)
    assert replayed(rail, rail.subscribe(Interest("a"), FORM, cursor(995))) == []
    assert replayed(rail, rail.subscribe(Interest("a"), FORM, cursor(900)))[0].startswith("resync:too_old")


def test_a_keep_alive_goes_only_to_idle_subscribers_and_carries_the_cursor() -> None:
    rail = hub()
    idle, busy = rail.subscribe(Interest("b"), FORM, None), rail.subscribe(Interest("a"), FORM, None)
    publish(rail, event(7))
    rail.keep_alive()
    assert (taken(idle), taken(busy)) == ([f"keep-alive:{cursor(7)}"], ["c7.0"])


def test_an_unsubscribed_subscriber_leaves_no_state_behind() -> None:
    rail = hub()
    some = [rail.subscribe(Interest("a", order_id=id_), FORM, None) for id_ in ("o", "o", "p", None)]
    assert rail.live_subscribers() == {"a": {"order:o": 2, "order:p": 1, "": 1}}
    for subscriber in [*some, *some]:
        rail.unsubscribe(subscriber)
    assert len(rail) == 0 and rail.live_subscribers() == {}


def test_closing_ends_all_subscribers_including_later_ones() -> None:
    async def scene() -> None:
        rail = hub()
        publish(rail, event(1))
        live, replaying = rail.subscribe(Interest("a"), FORM, None), rail.subscribe(Interest("a"), FORM, cursor(0))
        waiting = asyncio.create_task(live.wait())
        await asyncio.sleep(0)
        rail.close()
        rail.close()
        await asyncio.wait_for(waiting, 1)
        late = rail.subscribe(Interest("a"), FORM, None)
        assert live.ended and replaying.ended and late.ended
        assert rail.resume(replaying) is None
        await asyncio.wait_for(late.wait(), 1)

    asyncio.run(scene())


def test_a_wait_for_a_future_position_ends_when_it_is_reached_or_at_the_deadline() -> None:
    async def scene() -> None:
        rail = hub()
        waiting = asyncio.create_task(rail.reached(cursor(5, 1), within=10))
        await asyncio.sleep(0)
        publish(rail, event(5, 0))
        await asyncio.sleep(0)
        assert not waiting.done()
        publish(rail, event(5, 1))
        await asyncio.wait_for(waiting, 1)
        await rail.reached(cursor(5, 1), within=10)
        await rail.reached(cursor(6), within=0.01)
        publish(rail, event(6))

    asyncio.run(scene())


# -- any sequence of steps -------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.just("publish"), st.sampled_from("ab"), st.integers(1, 4))
    | st.tuples(st.just("come"), st.sampled_from("ab"), st.integers(0, 40))
    | st.tuples(st.sampled_from(["replay", "take", "leave_and_come_back"]), st.just(""), st.integers(0, 9)),
    max_size=60,
)


class Client:
    def __init__(self, rail: Hub, tenant: str, start: Cursor) -> None:
        self.rail, self.tenant, self.start = rail, tenant, start
        self.subscriber = rail.subscribe(Interest(tenant), FORM, start)
        self.got: list[str] = []
        self.visits = 1

    def replay(self) -> None:
        if self.subscriber.position is not None:
            self.got += (self.rail.resume(self.subscriber) or b"").decode().split()

    def take(self) -> None:
        if self.subscriber.position is None:
            self.got += taken(self.subscriber)

    def leave_and_come_back(self) -> None:
        if self.subscriber.position is None:
            self.take()
            self.rail.unsubscribe(self.subscriber)
            self.subscriber = self.rail.subscribe(Interest(self.tenant), FORM, self.rail.window.present)
            self.visits += 1


@settings(max_examples=300)
@given(STEPS)
def test_each_client_receives_its_events_once_and_in_order_or_a_resync(
    steps: Iterable[tuple[str, str, int]],
) -> None:
    rail = hub(changes=12, events=10_000)
    log: list[PushEvent] = []
    clients: list[Client] = []
    offset = 0
    for step, tenant, number in steps:
        if step == "publish":
            offset += 2  # every second offset is missing
            batch = [event(offset, place, tenant=tenant) for place in range(number)]
            log += batch
            publish(rail, *batch)
        elif step == "come":
            clients.append(Client(rail, tenant, log[number % len(log)].cursor if log else cursor(0)))
        elif clients:
            getattr(clients[number % len(clients)], step)()
    for client in clients:
        client.got += replayed(rail, client.subscriber) + taken(client.subscriber)
        expected = [one.change_id for one in log if one.tenant == client.tenant and one.cursor > client.start]
        resyncs = [place for place, name in enumerate(client.got) if name.startswith("resync")]
        if not resyncs:
            assert client.got == expected
        else:
            # No event is missing before the first resync or after the last one.
            before, behind = client.got[: resyncs[0]], client.got[resyncs[-1] + 1 :]
            assert before == expected[: len(before)]
            assert behind == expected[len(expected) - len(behind) :]
            # The window may overtake each visit of a client during its replay; each visit gets one resync at most.
            assert len(resyncs) <= client.visits
