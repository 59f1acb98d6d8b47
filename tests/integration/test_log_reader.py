"""The log reader on a real stream: entries in order and once, even after faults of the connection or the stream."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from uuid import uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage

from shared.entities.contract import Lane, now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import declare
from shared.messaging.log import (
    MAX_BATCH_BYTES,
    PREFETCH_MESSAGES,
    BrokenPosition,
    LogBatch,
    LogReader,
    Start,
)
from shared.messaging.position import LogPosition
from shared.messaging.topology import CHANGES, LOG
from shared.settings import Settings
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

SETTINGS = Settings(change_log_segment_bytes=1_000_000)


class Broker:
    """The vhost of one test with the topology, and the operations of a worker and a publisher on it."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.name = f"log-{uuid4().hex[:8]}"
        self.url = ""

    async def make(self, *, with_log: bool = True) -> None:
        self.url = await asyncio.to_thread(self.servers.rabbitmq.make_vhost, self.name)
        async with await declare.connect(self.url) as connection:
            await declare.declare(connection, SETTINGS)
            if with_log:
                await declare.declare_logs(connection, SETTINGS)

    async def publish(self, *bodies: bytes, lane: Lane = Lane.CRITICAL, to_log_alone: bool = False) -> None:
        async with await declare.connect(self.url) as connection:
            channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            exchange = await channel.get_exchange("" if to_log_alone else CHANGES, ensure=False)
            key = LOG if to_log_alone else lane.value
            for begin in range(0, len(bodies), 200):
                await asyncio.gather(
                    *(
                        exchange.publish(aio_pika.Message(body, message_id=uuid4().hex), key, timeout=10)
                        for body in bodies[begin : begin + 200]
                    )
                )

    async def heartbeat(self, *, sent_at: datetime | None = None) -> Signal:
        signal = Signal(id=str(uuid4()), type=HEARTBEAT, time=sent_at or now(), lane="critical")
        await self.publish(encode_signal(signal))
        return signal

    async def delete_log(self) -> None:
        async with await declare.connect(self.url) as connection:
            await (await connection.channel()).queue_delete(LOG)

    async def make_log(self) -> None:
        async with await declare.connect(self.url) as connection:
            await declare.declare_logs(connection, SETTINGS)


@pytest.fixture
async def broker(servers: Servers) -> AsyncIterator[Broker]:
    broker = Broker(servers)
    await broker.make()
    yield broker
    await asyncio.to_thread(servers.rabbitmq.delete_vhost, broker.name)


class BatchCollector:
    """Collects the batches of a reader."""

    def __init__(self, reader: LogReader) -> None:
        self.reader = reader
        self.batches: list[LogBatch] = []
        self._more = asyncio.Event()

    async def run(self, start: Start, fallbacks: Sequence[Start]) -> None:
        async def older() -> Sequence[Start]:
            return fallbacks

        async for batch in self.reader.read(start, fallbacks=older):
            self.batches.append(batch)
            self._more.set()

    @property
    def bodies(self) -> list[bytes]:
        return [entry.body for batch in self.batches for entry in batch.entries]

    @property
    def positions(self) -> list[LogPosition]:
        """The positions of the entries, without those of signals."""
        return [entry.position for batch in self.batches for entry in batch.entries]

    @property
    def offsets(self) -> list[int]:
        return [position.offset for position in self.positions]

    @property
    def broken(self) -> list[BrokenPosition]:
        return [batch.broken for batch in self.batches if batch.broken is not None]

    async def is_cut_off(self) -> bool:
        return not self.reader.connected

    def has(self, count: int) -> bool:
        """Returns whether at least `count` messages have arrived."""
        return len(self.bodies) >= count

    async def until(self, seen: Callable[[], bool], within: float = 20.0) -> None:
        try:
            async with asyncio.timeout(within):
                while not seen():
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"not seen; last bodies {self.bodies[-5:]}, batches {self.batches[-3:]}") from None


@asynccontextmanager
async def reading(
    url: str,
    start: Start = "first",
    *,
    fallbacks: Sequence[Start] = (),
    idle: float = 5.0,
    prefetch: int = PREFETCH_MESSAGES,
) -> AsyncIterator[BatchCollector]:
    read = BatchCollector(LogReader(url, name="test", idle_seconds=idle, prefetch=prefetch))
    task = asyncio.create_task(read.run(start, fallbacks))
    try:
        yield read
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def numbered(begin: int, end: int) -> list[bytes]:
    return [b"[%d]" % number for number in range(begin, end)]


async def test_entries_come_in_order_without_the_signals_between_them(broker: Broker) -> None:
    await broker.publish(*numbered(0, 300))
    signal = await broker.heartbeat()
    await broker.publish(*numbered(300, 600), lane=Lane.BACKGROUND)
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 600)
        assert read.bodies == numbered(0, 600)
        assert read.offsets == sorted(set(read.offsets))
        heartbeats = [heartbeat for batch in read.batches for heartbeat in batch.heartbeats]
        assert [(one.id, one.lane, one.sent_at) for one in heartbeats] == [(signal.id, "critical", signal.time)]
        assert read.offsets[299] < heartbeats[0].offset < read.offsets[300]
        lanes = [entry.lane for batch in read.batches for entry in batch.entries]
        assert lanes == ["critical"] * 300 + ["background"] * 300
        await broker.publish(*numbered(600, 610))
        await read.until(lambda: len(read.bodies) == 610)


async def test_caught_up_comes_with_or_after_the_last_entry_that_was_in_the_log(broker: Broker) -> None:
    async with reading(broker.url) as other:
        # This reader writes a mark. The second reader must not take the mark for its own.
        await other.until(lambda: bool(other.batches))
    await broker.publish(*numbered(0, 2_000), to_log_alone=True)
    async with reading(broker.url, prefetch=50) as read:
        await read.until(lambda: read.batches[-1].caught_up if read.batches else False)
        assert read.bodies == numbered(0, 2_000)
        assert sum(batch.caught_up for batch in read.batches) == 1
        await broker.publish(b"[2000]")
        await read.until(lambda: read.bodies[-1] == b"[2000]")
        assert read.reader.caught_up and read.reader.connected


async def test_start_at_a_position_continues_with_the_next_entry(broker: Broker) -> None:
    await broker.publish(*numbered(0, 20))
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 20)
        position, last = read.positions[12], read.batches[-1].last
    async with reading(broker.url, position) as read:
        await read.until(lambda: read.bodies[-1:] == [b"[19]"])
        assert read.bodies == numbered(13, 20)
        assert read.broken == []
    # The last message is a mark, which is a position too.
    async with reading(broker.url, last) as read:
        await broker.publish(b"[20]")
        await read.until(lambda: bool(read.bodies))
        assert read.bodies == [b"[20]"] and read.broken == []


async def test_start_at_a_time_misses_nothing_younger(broker: Broker) -> None:
    await broker.publish(*numbered(0, 5))
    async with reading(broker.url, now() + timedelta(seconds=60)) as read:
        await read.until(lambda: bool(read.batches))
        await broker.publish(b"[5]")
        await read.until(lambda: read.bodies[-1:] == [b"[5]"])
    async with reading(broker.url, now() - timedelta(seconds=600)) as read:
        await read.until(lambda: len(read.bodies) == 6)


async def test_start_at_next_reads_only_later_entries(broker: Broker) -> None:
    await broker.publish(*numbered(0, 5))
    async with reading(broker.url, "next") as read:
        await read.until(lambda: bool(read.batches))
        await broker.publish(b"[5]")
        await read.until(lambda: bool(read.bodies))
        assert read.bodies == [b"[5]"]


class Proxy:
    """A proxy between a reader and the broker. It can cut the connection after any byte."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self.accepted = 0
        self._server: asyncio.Server

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def url(self, behind: str) -> str:
        return behind.replace(f":{self._port}/", f":{self._server.sockets[0].getsockname()[1]}/")

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


async def test_cut_connections_lose_and_repeat_nothing(broker: Broker) -> None:
    total, cuts = 6_000, 12
    async with Proxy(broker.servers.rabbitmq.port) as proxy, reading(proxy.url(broker.url), prefetch=100) as read:
        publishing = asyncio.create_task(broker.publish(*numbered(0, total), to_log_alone=True))
        for cut in range(1, cuts + 1):
            await read.until(partial(read.has, cut * total // (cuts + 1)))
            proxy.cut()
        await publishing
        await read.until(lambda: len(read.bodies) >= total, within=60)
        assert read.bodies == numbered(0, total)
        assert read.broken == []
        assert proxy.accepted > cuts


async def test_recreated_stream_is_read_from_its_first_entry_and_reported_once(broker: Broker) -> None:
    await broker.publish(*numbered(0, 50))
    async with reading(broker.url, idle=60.0) as read:
        await read.until(lambda: read.batches[-1].caught_up if read.batches else False)
        last = read.batches[-1].last
        await broker.delete_log()
        await broker.make_log()
        await broker.publish(*numbered(100, 103))
        await read.until(lambda: len(read.bodies) == 53)
        assert read.broken == [BrokenPosition("truncated", last, "first")]
        assert read.bodies[50:] == numbered(100, 103)


async def test_longer_stream_of_the_same_name_is_not_confused_with_the_old_one(broker: Broker) -> None:
    """The remembered offset exists in the new stream too, so only the CRC shows the difference."""
    await broker.publish(*numbered(0, 3))
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 3)
        position = read.positions[-1]
    await broker.delete_log()
    await broker.make_log()
    await broker.publish(*numbered(100, 150))
    async with reading(broker.url, position) as read:
        await read.until(lambda: len(read.bodies) >= 50)
        assert read.bodies == numbered(100, 150)
        assert read.batches[0].broken == BrokenPosition("truncated", position, "first")


async def test_same_body_at_the_same_offset_is_not_taken_for_the_message_that_was_lost(broker: Broker) -> None:
    """After a crash, a publisher without a confirm sends the same body again, behind entries that a reader lacks."""
    await broker.publish(b"[0]", b"[1]", b"[2]")
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 3)
        position = read.positions[-1]
    await broker.delete_log()
    await broker.make_log()
    for number in range(position.offset):
        await broker.publish(b"[%d]" % (100 + number))
    await broker.publish(b"[2]")
    async with reading(broker.url, position) as read:
        await read.until(lambda: read.bodies[-1:] == [b"[2]"])
        assert read.bodies == [*numbered(100, 100 + position.offset), b"[2]"]
        assert read.positions[-1].offset == position.offset


async def test_position_behind_the_end_of_the_log_is_broken_although_rabbitmq_accepts_it(broker: Broker) -> None:
    await broker.publish(*numbered(0, 3))
    async with reading(broker.url, LogPosition(5_000, 1)) as read:
        await read.until(lambda: len(read.bodies) == 3)
        assert read.batches[0].broken == BrokenPosition("truncated", LogPosition(5_000, 1), "first")
        await broker.publish(b"[3]")
        await read.until(lambda: read.bodies[-1] == b"[3]")
        assert read.bodies == numbered(0, 4)
        assert len(read.broken) == 1


async def test_reader_goes_back_to_the_newest_older_position_that_the_log_proves(broker: Broker) -> None:
    await broker.publish(*numbered(0, 20))
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 20)
        known = read.positions
    lost = LogPosition(known[19].offset, known[19].crc ^ 1)
    also_lost = LogPosition(known[15].offset, known[15].crc ^ 1)
    async with reading(broker.url, lost, fallbacks=[also_lost, known[11], known[3]]) as read:
        await read.until(lambda: read.bodies[-1:] == [b"[19]"])
        assert read.bodies == numbered(12, 20)
        assert read.batches[0].broken == BrokenPosition("truncated", lost, known[11])
        assert len(read.broken) == 1


async def test_reader_goes_back_to_a_time_and_otherwise_to_the_first_entry(broker: Broker) -> None:
    await broker.publish(*numbered(0, 5))
    lost, since = LogPosition(2, 1), now() - timedelta(seconds=600)
    async with reading(broker.url, lost, fallbacks=[LogPosition(1, 1), since]) as read:
        await read.until(lambda: len(read.bodies) == 5)
        assert read.batches[0].broken == BrokenPosition("truncated", lost, since)
    async with reading(broker.url, lost, fallbacks=[LogPosition(1, 1)]) as read:
        await read.until(lambda: len(read.bodies) == 5)
        assert read.batches[0].broken == BrokenPosition("truncated", lost, "first")


async def test_position_that_the_retention_has_passed_is_expired(servers: Servers) -> None:
    broker = Broker(servers)
    await broker.make(with_log=False)
    small = {"x-max-length-bytes": 2_000_000, "x-stream-max-segment-size-bytes": 500_000}
    async with await declare.connect(broker.url) as connection:
        channel = await connection.channel()
        await channel.declare_queue(LOG, durable=True, arguments={"x-queue-type": "stream", **small})
    await broker.publish(b"[0]", to_log_alone=True)
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 1)
        position = read.positions[0]
    filler = b"[%s]" % (b"1" * 50_000)

    async def first_offset() -> int:
        await broker.publish(*[filler] * 20, to_log_alone=True)
        async with reading(broker.url) as read:
            await read.until(lambda: bool(read.batches))
            return read.batches[0].positions[0].offset

    await eventually(first_offset, within=60, what="a first entry that is gone", until=lambda offset: offset > 0)
    async with reading(broker.url, position) as read:
        await read.until(lambda: bool(read.batches))
        assert read.broken == [BrokenPosition("expired", position, "first")]
    await asyncio.to_thread(servers.rabbitmq.delete_vhost, broker.name)


async def test_newest_heartbeat_is_the_last_one_in_the_log_whatever_its_clock_says(broker: Broker) -> None:
    async with reading(broker.url) as read:
        await broker.heartbeat(sent_at=now() + timedelta(hours=5))
        last = await broker.heartbeat()
        await broker.publish(b"[0]")
        await read.until(lambda: bool(read.bodies))
        assert read.reader.heartbeat_at == last.time


async def test_large_messages_wait_in_a_few_megabytes_and_arrive_in_order(broker: Broker) -> None:
    """A slow caller gets 120 messages of 1 MiB: it holds one batch of at most 4 MiB, and few wait behind it."""
    bodies = [b"[%d]" % number + b" " * (1 << 20) for number in range(120)]
    publishing = asyncio.create_task(broker.publish(*bodies, to_log_alone=True))
    reader = LogReader(broker.url, name="test", idle_seconds=5.0)
    found: list[bytes] = []
    async with aclosing(reader.read("first")) as batches:
        async for batch in batches:
            size = sum(len(entry.body) for entry in batch.entries)
            assert size <= MAX_BATCH_BYTES or len(batch.entries) == 1
            found += [entry.body.rstrip() for entry in batch.entries]
            if len(found) == len(bodies):
                break
            waiting = [message for message in gc.get_objects() if isinstance(message, AbstractIncomingMessage)]
            assert sum(len(message.body) for message in waiting) < 32 << 20, "the reader keeps what it cannot hand out"
            del waiting
            await asyncio.sleep(0.02)  # the work of a slow caller, while the broker sends more
    await publishing
    assert found == numbered(0, 120)


async def test_message_larger_than_a_batch_comes_alone(broker: Broker) -> None:
    large = b"[%s]" % (b"1" * (MAX_BATCH_BYTES + 1))
    await broker.publish(b"[0]", large, b"[1]", large, large, b"[2]", to_log_alone=True)
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 6)
        assert sorted(map(len, read.bodies)) == sorted([3, 3, 3, *[len(large)] * 3])
        assert all(len(batch.entries) == 1 for batch in read.batches if large in [one.body for one in batch.entries])


async def test_idle_reader_checks_its_connection_and_stays_connected(broker: Broker) -> None:
    async with reading(broker.url, idle=0.3) as read:
        await read.until(lambda: read.batches[-1].caught_up if read.batches else False)
        # The reader sends a mark of its own in each idle period; at least three have arrived by then.
        await read.until(lambda: len(read.batches) >= 5)
        assert sum(batch.caught_up for batch in read.batches) == 1, "the reader connected again"
        await broker.publish(b"[0]")
        await read.until(lambda: read.bodies == [b"[0]"])


async def test_frozen_broker_is_noticed_and_nothing_is_lost_when_it_thaws(broker: Broker) -> None:
    await broker.publish(*numbered(0, 10))
    async with reading(broker.url, idle=0.5) as read:
        await read.until(lambda: len(read.bodies) == 10)
        await asyncio.to_thread(broker.servers.rabbitmq.freeze)
        try:
            await eventually(read.is_cut_off, what="a reader that noticed the frozen broker")
        finally:
            await asyncio.to_thread(broker.servers.rabbitmq.thaw)
        await broker.publish(*numbered(10, 20))
        await read.until(lambda: len(read.bodies) >= 20, within=40)
        assert read.bodies == numbered(0, 20)


async def test_reader_waits_for_a_missing_stream(servers: Servers) -> None:
    broker = Broker(servers)
    await broker.make(with_log=False)
    async with reading(broker.url) as read:
        assert await read.is_cut_off()
        await broker.make_log()
        await broker.publish(b"[0]")
        await read.until(lambda: read.bodies == [b"[0]"])
    await asyncio.to_thread(servers.rabbitmq.delete_vhost, broker.name)
