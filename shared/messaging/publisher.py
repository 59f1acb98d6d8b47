"""One bounded, confirmed publish after the other, over a connection that is renewed in the background.

`publish` returns when the broker has confirmed: quorum queues have flushed it to a majority. It raises

    NotSent   nothing left this process: there is no connection
    InDoubt   bytes were sent, and a nack, a return, a timeout or a lost channel followed: the message may be there

After an InDoubt the connection is given up and a new one is made, with jittered back-off: a frozen broker costs one
timeout, not one for every message, because until the next connection stands everything else is NotSent at once.

It connects only to a broker that has every queue which its messages go to. One that has just started has its exchanges
and its quorum queues seconds before its streams, routes to those alone, and confirms: what it takes then is in no log.

After a nack the link stays, and its channel is renewed, every two seconds at most: a channel that was opened while a
stream had no leader nacks for ever, long after the stream has one.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from uuid import uuid4

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import AMQPError, DeliveryError
from aiormq.exceptions import AMQPException, PublishError

from shared.backoff import backoff
from shared.entities.contract import CONTENT_TYPE
from shared.lifecycle import BackgroundLoop
from shared.messaging.hosts import Hosts

log = structlog.get_logger(__name__)

# What connecting, publishing and closing raise when the broker is away or the link breaks.
# StopAsyncIteration: a peer that accepts and hangs up without a word, such as a proxy before a broker that starts.
BROKEN_LINK = (OSError, TimeoutError, EOFError, AMQPError, AMQPException, RuntimeError, StopAsyncIteration)


@contextlib.contextmanager
def closed_under_us() -> Iterator[None]:
    """Around what uses a channel: aiormq gives a bare Exception to those whose channel is closed while they wait.
    It becomes a ConnectionError, one of BROKEN_LINK."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ConnectionError("the channel was closed") from error


_RENEW_EVERY = 2.0  # seconds


class NotSent(Exception):
    """There is no connection; nothing was sent."""


class InDoubt(Exception):
    """Sent, and not confirmed: perhaps it is there."""


class Publisher:
    def __init__(self, url: str, exchange: str, *, queues: Sequence[str], timeout: float) -> None:
        """`queues`: what is bound to the exchange."""
        self._hosts = Hosts(url)
        self._exchange_name = exchange
        self._queues = queues
        self._timeout = timeout
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
        """Begins to connect; waits up to `wait` seconds for the first connection and returns either way."""
        self.loop.start()
        if wait:
            with contextlib.suppress(TimeoutError):  # the caller goes on without: the journal is for that
                await asyncio.wait_for(self._connected.wait(), wait)

    async def stop(self) -> None:
        await self.loop.stop()
        await self._drop()

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def publish(self, routing_key: str, body: bytes, *, headers: dict[str, int | str] | None = None) -> None:
        """To the exchange; persistent, mandatory, confirmed within the timeout."""
        await self._publish(self._exchange, routing_key, body, headers)

    async def publish_to_queue(
        self, queue: str, body: bytes, *, headers: dict[str, int | str] | None = None, timeout: float | None = None
    ) -> None:
        """To one queue alone, through the default exchange. `timeout`: of this one, which may be large."""
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
            raise NotSent("no connection to the broker")
        message = aio_pika.Message(
            body,
            content_type=CONTENT_TYPE,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=uuid4().hex,  # returns are matched by it: unique for every publish
            headers=dict(headers or {}),
        )
        try:
            await exchange.publish(message, routing_key, mandatory=True, timeout=timeout or self._timeout)
        except DeliveryError as error:
            # A nack or a return: the link is fine, one of the queues is not. Others may have taken the message.
            if exchange in (self._exchange, self._default) and not isinstance(error, PublishError):
                self._nacked.set()
            raise InDoubt(f"not confirmed: {type(error).__name__}") from error
        except Exception as error:
            # BROKEN_LINK, and a bare Exception: what the client library gives those whose channel is closed under them.
            if exchange in (self._exchange, self._default):
                self._give_up()
            raise InDoubt(f"no confirm: {type(error).__name__}: {error}") from error

    def _give_up(self) -> None:
        self._exchange = self._default = None
        self._connected.clear()
        self._broken.set()
        self._nacked.set()  # whoever waits for either wakes

    async def _keep_connected(self) -> None:
        attempt = 0
        while True:
            try:
                await self._connect()
                attempt = 0
                await self._watch()
                log.warning("publisher_lost_connection")
            except Exception as error:  # noqa: BLE001  (whatever a broken peer makes of the client, the next try may work)
                attempt += 1
                log.warning("publisher_cannot_connect", error=str(error) or type(error).__name__, attempt=attempt)
            self._hosts.turn()
            await self._drop()
            await asyncio.sleep(backoff(attempt))

    async def _watch(self) -> None:
        """Returns when the link is lost."""
        while not self._broken.is_set():
            await self._nacked.wait()
            nacking, connection = self._channel, self._connection
            if self._broken.is_set() or nacking is None or connection is None:
                continue
            log.warning("publisher_renews_channel")
            await self._open(connection)
            with contextlib.suppress(TimeoutError):  # what is still under way on the old one ends meanwhile
                await asyncio.wait_for(self._broken.wait(), _RENEW_EVERY)
            if not nacking.is_closed:
                async with asyncio.timeout(5.0):
                    await nacking.close()

    async def _connect(self) -> None:
        self._broken.clear()
        self._connection = connection = await self._hosts.connect()
        connection.close_callbacks.add(lambda *_: self._lost(connection))
        await self._open(connection)

    async def _open(self, connection: AbstractConnection) -> None:
        """A channel, in place of the one that is there."""
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
        """`channel`: of one alone, which need not be the present one."""
        if connection is self._connection and channel in (None, self._channel):
            self._give_up()

    async def _drop(self) -> None:
        """Close without waiting for a broker that may be frozen."""
        connection, self._connection = self._connection, None
        self._channel = self._exchange = self._default = None
        self._connected.clear()
        if connection is not None:
            try:
                with closed_under_us():
                    async with asyncio.timeout(1.0):
                        await connection.close()
            except BROKEN_LINK as error:
                log.debug("publisher_close", error=str(error) or type(error).__name__)
