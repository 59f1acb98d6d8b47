"""The recorder publishes a change, or writes it to the journal. Publisher and journal are fakes."""

import asyncio
from typing import Any, cast

import pytest

from shared.entities.contract import Lane, encode_batch, split_batch
from shared.messaging.publisher import NotSent, Publisher
from shared.rail.journal import Journal, JournalFull, JournalInDoubt
from shared.rail.record import MAX_MESSAGE_BYTES, Durability, Recorder, Unrecorded

LANE = Lane.CRITICAL
LARGE = b'"' + b"x" * MAX_MESSAGE_BYTES + b'"'


class NotingPublisher:
    """Confirms each message at once, or holds it back until `release`."""

    connected = True

    def __init__(self, *, holds: bool = False) -> None:
        self.messages: list[list[bytes]] = []
        self._may_confirm = asyncio.Event()
        if not holds:
            self._may_confirm.set()

    async def publish(self, routing_key: str, body: bytes) -> None:
        self.messages.append(split_batch(body))
        await self._may_confirm.wait()

    def release(self) -> None:
        self._may_confirm.set()


class NotingJournal:
    def __init__(self, *, refuses: Exception | None = None) -> None:
        self.entries: list[tuple[Lane, bytes]] = []
        self._refuses = refuses

    async def append(self, entries: Any) -> None:
        if self._refuses is not None:
            raise self._refuses
        self.entries += entries


def recorder(notes: Any, journal: Any = None, **options: Any) -> Recorder:
    chosen: dict[str, Any] = {"max_publishes": 1, "max_wait_seconds": 0.05, **options}
    return Recorder(cast(Publisher, notes), cast(Journal, journal), **chosen)


async def within_time(task: "asyncio.Future[Durability] | asyncio.Task[Durability]") -> Durability:
    async with asyncio.timeout(5):
        return await task


async def test_a_single_change_is_published_at_once_and_close_followers_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes = NotingPublisher()
    made = recorder(notes, publish_interval_ms=50)
    loop = asyncio.get_running_loop()
    at = loop.time()
    with monkeypatch.context() as stopped:
        # The stopped clock keeps the changes close together even on a slow machine.
        stopped.setattr(loop, "time", lambda: at)
        assert await made.record(LANE, b"1") is Durability.BROKER
        following = [asyncio.create_task(made.record(LANE, body)) for body in (b"2", b"3")]
        await asyncio.sleep(0)
        assert notes.messages == [[b"1"]]
    assert await asyncio.gather(*following) == [Durability.BROKER] * 2
    assert notes.messages == [[b"1"], [b"2", b"3"]]


async def test_lanes_do_not_wait_for_one_another() -> None:
    notes = NotingPublisher()
    made = recorder(notes, publish_interval_ms=60_000)
    async with asyncio.timeout(5):
        for lane in Lane:
            await made.record(lane, b"1")
    assert len(notes.messages) == 3


async def test_a_stop_does_not_wait_for_the_next_publish() -> None:
    notes = NotingPublisher()
    made = recorder(notes, publish_interval_ms=60_000)
    await made.record(LANE, b"1")
    waiting = asyncio.create_task(made.record(LANE, b"2"))
    await asyncio.sleep(0)
    assert len(notes.messages) == 1
    async with asyncio.timeout(5):
        await made.drain()
        assert await waiting is Durability.BROKER
    assert notes.messages == [[b"1"], [b"2"]]


async def test_changes_that_wait_together_share_messages_of_at_most_128_kib() -> None:
    notes = NotingPublisher()
    made = recorder(notes, NotingJournal(), max_wait_seconds=60)
    bodies = [b'"%d%s"' % (number, b"x" * 40_000) for number in range(20)]
    assert await asyncio.gather(*(made.record(LANE, body) for body in bodies)) == [Durability.BROKER] * 20
    assert [body for message in notes.messages for body in message] == bodies
    assert len(notes.messages) > 5
    assert all(len(encode_batch(message)) <= 128 << 10 for message in notes.messages)


# -- a slow broker -------------------------------------------------------------------------------------------------


async def test_a_change_that_waits_too_long_goes_to_the_journal_and_the_sent_one_does_not() -> None:
    notes, journal = NotingPublisher(holds=True), NotingJournal()
    made = recorder(notes, journal)
    sent = asyncio.create_task(made.record(LANE, b"1"))
    await asyncio.sleep(0)
    late = [asyncio.create_task(made.record(LANE, body)) for body in (b"2", b"3")]
    assert [await within_time(task) for task in late] == [Durability.JOURNAL] * 2
    assert journal.entries == [(LANE, b"2"), (LANE, b"3")]
    assert notes.messages == [[b"1"]]
    assert not sent.done()
    notes.release()
    assert await within_time(sent) is Durability.BROKER
    later = asyncio.create_task(made.record(LANE, b"4"))
    assert await within_time(later) is Durability.BROKER


async def test_a_change_larger_than_a_message_goes_to_the_journal_and_delays_no_other() -> None:
    notes, journal = NotingPublisher(), NotingJournal()
    made = recorder(notes, journal)
    large, small = await asyncio.gather(made.record(LANE, LARGE), made.record(LANE, b"1"))
    assert (large, small) == (Durability.JOURNAL, Durability.BROKER)
    assert journal.entries == [(LANE, LARGE)]
    assert notes.messages == [[b"1"]]


async def test_the_broker_takes_a_large_change_while_the_journal_is_full() -> None:
    notes = NotingPublisher()
    made = recorder(notes, NotingJournal(refuses=JournalFull("full")))
    assert await made.record(LANE, LARGE) is Durability.BROKER
    assert notes.messages == [[LARGE]]


@pytest.mark.parametrize(("error", "sent"), [(JournalFull("full"), False), (JournalInDoubt("perhaps"), True)])
@pytest.mark.parametrize("body", [b"2", LARGE])
async def test_a_late_change_that_the_journal_refuses_is_absent_unless_the_journal_may_have_it(
    error: Exception, sent: bool, body: bytes
) -> None:
    notes = NotingPublisher(holds=True)
    made = recorder(notes, NotingJournal(refuses=error))
    first = asyncio.create_task(made.record(LANE, b"1"))
    await asyncio.sleep(0)
    late = asyncio.create_task(made.record(LANE, body))
    with pytest.raises(Unrecorded) as refused:
        await within_time(late)
    assert refused.value.sent is sent
    assert notes.messages == [[b"1"]]
    notes.release()
    assert await within_time(first) is Durability.BROKER


async def test_without_a_journal_large_and_late_changes_take_the_second_connection() -> None:
    notes, second_notes = NotingPublisher(holds=True), NotingPublisher()
    made = recorder(notes, second=recorder(second_notes))
    first = asyncio.create_task(made.record(LANE, b"1"))
    await asyncio.sleep(0)
    assert await within_time(asyncio.create_task(made.record(LANE, LARGE))) is Durability.BROKER
    assert await within_time(asyncio.create_task(made.record(LANE, b"2"))) is Durability.BROKER
    assert (notes.messages, second_notes.messages) == ([[b"1"]], [[LARGE], [b"2"]])
    notes.release()
    assert await within_time(first) is Durability.BROKER


async def test_a_stop_waits_for_changes_that_have_left_their_lane() -> None:
    second_notes = NotingPublisher(holds=True)
    made = recorder(NotingPublisher(), second=recorder(second_notes))
    large = asyncio.create_task(made.record(LANE, LARGE))
    await asyncio.sleep(0)
    stop = asyncio.create_task(made.drain())
    await asyncio.sleep(0)
    assert not stop.done()
    second_notes.release()
    async with asyncio.timeout(5):
        await stop
    assert large.done()


async def test_the_second_connection_is_made_by_the_first_change_that_needs_it() -> None:
    class LazyPublisher(NotingPublisher):
        connected = False

        async def start(self, *, wait: float) -> None:
            self.connected = True

        async def publish(self, routing_key: str, body: bytes) -> None:
            if not self.connected:
                raise NotSent("there is no connection")
            await super().publish(routing_key, body)

    lazy = LazyPublisher()
    made = recorder(NotingPublisher(), second=recorder(lazy, connect_seconds=1.0))
    assert await made.record(LANE, b"1") is Durability.BROKER
    assert not lazy.connected
    assert await made.record(LANE, LARGE) is Durability.BROKER
    assert lazy.messages == [[LARGE]]
