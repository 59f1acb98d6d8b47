"""Publishes one message at a time, each with a bounded wait for the publisher confirm, over a connection that is
renewed in the background.

Guarantee: `publish` returns when the broker has confirmed the message. Quorum queues have then flushed it to a
majority. `publish` raises

    NotSent   nothing was sent, because there is no connection
    InDoubt   bytes were sent, but a nack, a return, a timeout or a lost channel followed: the broker may have it

The wait grows with the bytes that are on their way (`patience`), because a slow broker must not look like an
unavailable one: each message would be sent again, over a new connection, and the broker would store another copy of it.

After an InDoubt the publisher drops the connection and makes a new one, with jittered backoff. A frozen broker costs
one timeout, not one per message: until the next connection is ready, every publish raises NotSent at once. After a
timeout the publisher keeps a connection over which the broker replied to another message within that time.

The publisher counts as connected only when the broker has every queue that its messages go to. A broker that has just
started has its exchanges and quorum queues seconds before its streams. In that time it routes a message only to the
queues that exist and still confirms it, so the message would be in no log.

After a nack the publisher keeps the connection and renews the channel, at most every two seconds. A channel that was
opened while a stream had no leader sends nacks forever, even after the stream has a leader.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from uuid import uuid4

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import AMQPError, DeliveryError
from aiormq.exceptions import AMQPException, PublishError

from shared.backoff import backoff
from shared.entities.contract import CONTENT_TYPE
from shared.errors import described
from shared.lifecycle import BackgroundLoop
from shared.messaging.hosts import Connect, Hosts

log = structlog.get_logger(__name__)

# Connecting, publishing and closing raise these errors when the broker is unavailable or the connection breaks. A peer
# that accepts a connection and closes it at once, such as a proxy in front of a broker that is starting, causes
# StopAsyncIteration.
BROKEN_LINK = (OSError, TimeoutError, EOFError, AMQPError, AMQPException, RuntimeError, StopAsyncIteration)


@contextlib.contextmanager
def closed_channel_as_connection_error() -> Iterator[None]:
    """Turns the bare Exception that aiormq raises if a channel is closed during a call into a ConnectionError, which is
    one of BROKEN_LINK. Use this context around every use of a channel."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ConnectionError("the channel was closed") from error


_RENEW_INTERVAL_SECONDS = 2.0
_MIN_BYTES_PER_SECOND = 250_000
"""A broker that takes bytes more slowly than this counts as unavailable."""


def patience(size: int, timeout: float) -> float:
    """Returns how many seconds to wait for a confirm while `size` bytes are on their way. `timeout`: the seconds to
    wait for a message without bytes."""
    return timeout + size / _MIN_BYTES_PER_SECOND


class NotSent(Exception):
    """Nothing was sent: there is no connection."""


class InDoubt(Exception):
    """The message was sent and not confirmed: the broker may have it."""


class Publisher:
    def __init__(
        self,
        url: str,
        exchange: str,
        *,
        queues: Sequence[str],
        timeout: float,
        connect: Connect = aio_pika.connect,
    ) -> None:
        """`queues`: all queues that are bound to the exchange. `timeout`: seconds to wait for a confirm, beside the
        time that the bytes take (`patience`). `connect`: opens a connection to one node."""
        self._hosts = Hosts(url, connect=connect)
        self._exchange_name = exchange
        self._queues = queues
        self._timeout = timeout
        self._unanswered_bytes = 0
        self._answered_at = float("-inf")
        """When the broker last answered a publish, on the clock of `time.monotonic`."""
        self._connection: AbstractConnection | None = None
        self._channel: AbstractChannel | None = None
        self._exchange: AbstractExchange | None = None
        self._default: AbstractExchange | None = None
        self._broken = asyncio.Event()
        self._nacked = asyncio.Event()
        self._connected = asyncio.Event()
        self.loop = BackgroundLoop("publisher", self._keep_connected)

    @property
    def connected(self) -> bool:
        return self._exchange is not None

    async def start(self, *, wait: float = 0.0) -> None:
        """Starts to connect, and waits at most `wait` seconds for the first connection. Returns with or without a
        connection."""
        self.loop.start()
        if wait:
            with contextlib.suppress(TimeoutError):  # the caller continues, because the journal takes its changes
                await asyncio.wait_for(self._connected.wait(), wait)

    async def stop(self) -> None:
        await self.loop.stop()
        await self._drop()

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def publish(self, routing_key: str, body: bytes, *, headers: dict[str, int | str] | None = None) -> None:
        """Publishes a message to the exchange and waits for the confirm. The message is persistent and mandatory.
        Raises NotSent and InDoubt."""
        await self._publish(self._exchange, routing_key, body, headers)

    async def publish_to_queue(
        self, queue: str, body: bytes, *, headers: dict[str, int | str] | None = None, timeout: float | None = None
    ) -> None:
        """Publishes to one queue, through the default exchange. `timeout`: replaces that of the publisher. Raises
        NotSent and InDoubt."""
        await self._publish(self._default, queue, body, headers, timeout)

    async def _publish(
        self,
        exchange: AbstractExchange | None,
        routing_key: str,
        body: bytes,
        headers: dict[str, int | str] | None,
        timeout: float | None = None,
    ) -> None:
        if exchange is None:
            raise NotSent("there is no connection to the broker")
        message = aio_pika.Message(
            body,
            content_type=CONTENT_TYPE,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=uuid4().hex,  # unique for every publish, because returned messages are matched by it
            headers=dict(headers or {}),
        )
        timeout = timeout or self._timeout
        # All bytes of a connection share its bandwidth, so the wait covers those of other messages too.
        self._unanswered_bytes += len(body)
        try:
            await exchange.publish(
                message, routing_key, mandatory=True, timeout=patience(self._unanswered_bytes, timeout)
            )
            self._answered_at = time.monotonic()
        except DeliveryError as error:
            # After a nack or a return the connection works, but one of the queues does not. The other queues may have
            # the message.
            self._answered_at = time.monotonic()
            if exchange in (self._exchange, self._default) and not isinstance(error, PublishError):
                self._nacked.set()
            raise InDoubt(f"the message was not confirmed: {type(error).__name__}") from error
        except (Exception, asyncio.CancelledError) as error:
            # The error is one of BROKEN_LINK, or the bare Exception of a channel that was closed during the call.
            # aiormq cancels some futures then, although nobody has cancelled this task.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling()):
                raise
            slow = isinstance(error, TimeoutError) and time.monotonic() - self._answered_at < timeout
            if exchange in (self._exchange, self._default) and not slow:
                self._give_up()
            raise InDoubt(f"the message got no confirm: {described(error)}") from error
        finally:
            self._unanswered_bytes -= len(body)

    def _give_up(self) -> None:
        self._exchange = self._default = None
        self._connected.clear()
        self._broken.set()
        self._nacked.set()  # `_watch` waits for this event

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            try:
                await self._connect()
                attempt = 0
                await self._watch()
                log.warning("publisher_lost_connection")
            except Exception as error:  # noqa: BLE001  (a broken peer may cause any error; try again)
                attempt += 1
                log.warning("publisher_cannot_connect", error=str(error) or type(error).__name__, attempt=attempt)
            self._hosts.turn()
            await self._drop()
            await asyncio.sleep(backoff(attempt))

    async def _watch(self) -> None:
        """Renews the channel after nacks. Returns when the connection is lost."""
        while not self._broken.is_set():
            await self._nacked.wait()
            nacking, connection = self._channel, self._connection
            if self._broken.is_set() or nacking is None or connection is None:
                continue
            log.warning("publisher_renews_channel")
            await self._open(connection)
            with contextlib.suppress(TimeoutError):  # gives the publishes on the old channel time to end
                await asyncio.wait_for(self._broken.wait(), _RENEW_INTERVAL_SECONDS)
            if not nacking.is_closed:
                async with asyncio.timeout(5.0):
                    await nacking.close()

    async def _connect(self) -> None:
        self._broken.clear()
        self._connection = connection = await self._hosts.connect()
        connection.close_callbacks.add(lambda *_: self._lost(connection))
        await self._open(connection)

    async def _open(self, connection: AbstractConnection) -> None:
        """Opens a channel that replaces the current one."""
        async with asyncio.timeout(5.0):
            channel: AbstractChannel = await connection.channel(publisher_confirms=True, on_return_raises=True)
            exchange = await channel.get_exchange(self._exchange_name, ensure=False)
            for queue in self._queues:
                await channel.declare_queue(queue, passive=True)
        self._nacked.clear()
        channel.close_callbacks.add(lambda *_: self._lost(connection, channel))
        self._channel, self._exchange, self._default = channel, exchange, channel.default_exchange
        self._connected.set()

    def _lost(self, connection: AbstractConnection, channel: AbstractChannel | None = None) -> None:
        """Handles the loss of a channel, or of the connection if `channel` is None. Ignores a channel or connection
        that was replaced before."""
        if connection is self._connection and channel in (None, self._channel):
            self._give_up()

    async def _drop(self) -> None:
        """Closes the connection. Waits at most a second, because the broker may be frozen."""
        connection, self._connection = self._connection, None
        self._channel = self._exchange = self._default = None
        self._connected.clear()
        if connection is not None:
            try:
                with closed_channel_as_connection_error():
                    async with asyncio.timeout(1.0):
                        await connection.close()
            except BROKEN_LINK as error:
                log.debug("publisher_close", error=str(error) or type(error).__name__)
