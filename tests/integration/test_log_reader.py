"""The log reader on a real stream: entries in order and once, whatever happens to the connection or the stream."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from uuid import uuid4

import aio_pika
import pytest

from shared.entities.contract import Lane, now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import declare
from shared.messaging.log import LogBatch, LogReader, Start
from shared.messaging.topology import CHANGES, LOG
from shared.settings import Settings
from tests.rigs.servers import Servers
from tests.rigs.system import eventually

EPOCH, OTHER_EPOCH = "aaaaaaaaaaaa", "bbbbbbbbbbbb"
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
                await declare.declare_logs(connection, SETTINGS, EPOCH)

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

    async def heartbeat(self, epoch: str) -> None:
        signal = Signal(id=str(uuid4()), type=HEARTBEAT, time=now(), epoch=epoch, lane="critical")
        await self.publish(encode_signal(signal))

    async def delete_log(self) -> None:
        async with await declare.connect(self.url) as connection:
            await (await connection.channel()).queue_delete(LOG)

    async def make_log(self, epoch: str) -> None:
        async with await declare.connect(self.url) as connection:
            await declare.declare_logs(connection, SETTINGS, epoch)


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

    async def run(self, start: Start, epoch: str | None) -> None:
        async for batch in self.reader.read(start, epoch=epoch):
            self.batches.append(batch)
            self._more.set()

    @property
    def bodies(self) -> list[bytes]:
        return [entry.body for batch in self.batches for entry in batch.entries]

    @property
    def offsets(self) -> list[int]:
        return [entry.offset for batch in self.batches for entry in batch.entries]

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
    url: str, start: Start = "first", *, epoch: str | None = None, idle: float = 5.0, prefetch: int = 1_000
) -> AsyncIterator[BatchCollector]:
    read = BatchCollector(LogReader(url, name="test", idle_seconds=idle, prefetch=prefetch))
    task = asyncio.create_task(read.run(start, epoch))
    try:
        yield read
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def numbered(begin: int, end: int) -> list[bytes]:
    return [b"[%d]" % number for number in range(begin, end)]


async def test_entries_come_in_order_without_the_signals_between_them(broker: Broker) -> None:
    await broker.publish(*numbered(0, 300))
    await broker.heartbeat(EPOCH)
    await broker.publish(*numbered(300, 600), lane=Lane.BACKGROUND)
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 600)
        assert read.bodies == numbered(0, 600)
        assert read.offsets == sorted(set(read.offsets))
        assert {batch.epoch for batch in read.batches} == {EPOCH}
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


async def test_start_at_an_offset_repeats_that_entry_and_then_continues(broker: Broker) -> None:
    await broker.publish(*numbered(0, 20))
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 20)
        offset = read.offsets[12]
    async with reading(broker.url, offset, epoch=EPOCH) as read:
        await read.until(lambda: read.bodies[-1:] == [b"[19]"])
        assert read.bodies == numbered(12, 20)
        assert not any(batch.restarted for batch in read.batches)


async def test_start_at_a_time_misses_nothing_younger_and_knows_the_epoch_at_once(broker: Broker) -> None:
    await broker.publish(*numbered(0, 5))
    async with reading(broker.url, now() + timedelta(seconds=60)) as read:
        await read.until(lambda: bool(read.batches))
        # No heartbeat is younger than the start, so the epoch comes from the first heartbeat in the log.
        assert read.batches[0].epoch == EPOCH
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
        assert not any(batch.restarted for batch in read.batches)
        assert proxy.accepted >= 2 * cuts, (
            "the reader did not verify the log on one connection and read it on another after each cut"
        )


async def test_recreated_stream_is_read_from_its_first_entry_and_reported_as_restarted(broker: Broker) -> None:
    await broker.publish(*numbered(0, 50))
    async with reading(broker.url, idle=60.0) as read:
        await read.until(lambda: read.batches[-1].caught_up if read.batches else False)
        old = len(read.batches)
        await broker.delete_log()
        await broker.make_log(OTHER_EPOCH)
        await broker.publish(*numbered(100, 103))
        await read.until(lambda: len(read.bodies) == 53)
        new = read.batches[old:]
        assert new[0].restarted and sum(batch.restarted for batch in new) == 1
        assert {batch.epoch for batch in new} == {OTHER_EPOCH}
        assert read.bodies[50:] == numbered(100, 103)


async def test_longer_stream_of_the_same_name_is_not_confused_with_the_old_one(broker: Broker) -> None:
    """The remembered offset exists in the new stream too, so only the epoch shows the difference."""
    await broker.publish(*numbered(0, 3))
    async with reading(broker.url) as read:
        await read.until(lambda: len(read.bodies) == 3)
        offset = read.offsets[-1]
    await broker.delete_log()
    await broker.make_log(OTHER_EPOCH)
    await broker.publish(*numbered(100, 150))
    async with reading(broker.url, offset, epoch=EPOCH) as read:
        await read.until(lambda: len(read.bodies) >= 50)
        assert read.bodies == numbered(100, 150)
        assert read.batches[0].restarted and read.batches[0].epoch == OTHER_EPOCH


async def test_log_that_lost_its_end_is_read_from_its_first_entry(broker: Broker) -> None:
    """The epoch is the same, but the remembered offset does not exist any more."""
    await broker.publish(*numbered(0, 3))
    async with reading(broker.url, 5_000, epoch=EPOCH) as read:
        await read.until(lambda: len(read.bodies) == 3)
        assert read.batches[0].restarted
        await broker.publish(b"[3]")
        await read.until(lambda: read.bodies[-1] == b"[3]")
        assert read.bodies == numbered(0, 4)


async def test_late_heartbeat_of_an_old_epoch_changes_nothing(broker: Broker) -> None:
    async with reading(broker.url) as read:
        await broker.publish(b"[0]")
        await broker.heartbeat(OTHER_EPOCH)
        await broker.publish(b"[1]")
        await broker.heartbeat(OTHER_EPOCH)
        await broker.publish(b"[2]")
        await read.until(lambda: read.bodies[-1:] == [b"[2]"])
        assert read.bodies == numbered(0, 3)
        assert {batch.epoch for batch in read.batches} == {EPOCH}
        assert not any(batch.restarted for batch in read.batches)


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
        await broker.make_log(EPOCH)
        await broker.publish(b"[0]")
        await read.until(lambda: read.bodies == [b"[0]"])
    await asyncio.to_thread(servers.rabbitmq.delete_vhost, broker.name)
