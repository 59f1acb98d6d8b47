"""Consumes queues through FastStream, for all consumers that do not depend on the order of messages.

Guarantee: each delivery is passed to `on_message` once, as raw bytes, and stays unacknowledged until its consumer
acknowledges it. `close` gives all unacknowledged messages back to the broker.

This module reads messages by iterating over the subscriber. With a handler, FastStream would accept deliveries only
after it has subscribed. It would drop the messages that arrive in between, and they would stay unacknowledged forever.
An iterator has no such gap, starts no task per delivery and decodes nothing.

A subscription lives as long as one connection. When the connection is lost, `on_lost` is called once, and the owner
makes a new subscription, perhaps to another node; FastStream itself would reconnect only to the same node. Pass each
queue only once, because a second subscriber of a queue would share the channel of the first one.

See docs/adr/0014-faststream-consumes-where-order-does-not-matter.md.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from aiormq.abc import AbstractChannel
from faststream import AckPolicy
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

from shared.errors import described

log = structlog.get_logger(__name__)

_OPEN_TIMEOUT_SECONDS = 10.0
_CONNECT_TIMEOUT_SECONDS = 5.0
_CLOSE_TIMEOUT_SECONDS = 1.0
_PAUSE_TIMEOUT_SECONDS = 10.0
_PASS_ON_SECONDS = 0.05  # for messages that have arrived and are not passed on yet


class Delivery:
    """One message of a queue, and the channel on which to acknowledge it."""

    __slots__ = ("body", "channel", "consumer", "headers", "queue", "tag")

    def __init__(self, queue: str, message: RabbitMessage) -> None:
        raw = message.raw_message
        assert raw.delivery_tag is not None and raw.consumer_tag is not None
        self.queue = queue
        self.body: bytes = raw.body
        self.headers: Mapping[str, Any] = raw.headers
        self.channel: AbstractChannel = raw.channel
        self.tag: int = raw.delivery_tag
        self.consumer: str = raw.consumer_tag

    @property
    def deliveries(self) -> int:
        """How often the broker has delivered the message, this time included."""
        before = self.headers.get("x-delivery-count")
        return (before if isinstance(before, int) else 0) + 1

    @property
    def channel_open(self) -> bool:
        """False if the channel is closed. The broker then delivers the message again, to any consumer."""
        return not self.channel.is_closed

    async def ack(self) -> None:
        """Acknowledges the message. Raises ChannelInvalidStateError or one of BROKEN_LINK if the channel is closed."""
        await self.channel.basic_ack(self.tag)


class Subscription:
    def __init__(
        self,
        url: str,
        queues: Sequence[str],
        *,
        prefetch: int,
        on_message: Callable[[Delivery], None],
        on_lost: Callable[[], None],
    ) -> None:
        """`url`: the URL of one node. `prefetch`: the maximum number of unacknowledged messages of each queue. Each
        queue has a separate channel.

        Neither callback may block. `on_lost` is called when the connection or a subscriber ends without `end` or
        `close`.
        """
        self.up = True
        """False once the connection is lost or closed."""
        self._on_message = on_message
        self._on_lost = on_lost
        self._broker = RabbitBroker(
            url,
            default_channel=Channel(prefetch_count=1),
            apply_types=False,
            logger=None,
            graceful_timeout=_CLOSE_TIMEOUT_SECONDS,
            timeout=_CONNECT_TIMEOUT_SECONDS,
            on_close=(lambda *_: self._lost(),),
        )
        self._subscribers = {
            queue: self._broker.subscriber(
                RabbitQueue(queue, declare=False, durable=True),
                channel=Channel(prefetch_count=prefetch),
                ack_policy=AckPolicy.MANUAL,
                no_reply=True,
                include_in_schema=False,
            )
            for queue in queues
        }
        self._consumers: dict[str, tuple[AbstractChannel, str]] = {}
        """Queue -> channel and tag of its consumer, known from its latest delivery."""
        self._opening: asyncio.Task[None] | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._late: asyncio.Task[None] | None = None
        self._ending = False

    async def open(self) -> None:
        """Connects and subscribes. Call it only once. Errors of the client libraries pass through; call `close` after
        an error or a cancellation."""
        self._opening = asyncio.create_task(self._start(), name="subscription-open")
        async with asyncio.timeout(_OPEN_TIMEOUT_SECONDS):
            # The handshake is shielded: if it is cancelled half-way, it waits for a peer that may be frozen.
            await asyncio.shield(self._opening)
        if not self.up:
            raise ConnectionError("the connection was lost as soon as it was open")

    async def consumers(self, queue: str) -> int:
        """Returns how many consumers of a queue the broker counts, over all processes. Raises one of BROKEN_LINK."""
        async with asyncio.timeout(_OPEN_TIMEOUT_SECONDS):
            connection = await self._broker.connect()
            # A channel that has asked before would answer from its cache, so this opens a new one.
            channel = await connection.channel(publisher_confirms=False)
            declared = await channel.declare_queue(queue, passive=True, robust=False)
            await channel.close()
        return declared.declaration_result.consumer_count or 0

    async def pause(self) -> None:
        """Asks the broker to deliver nothing more. Messages on their way still reach `on_message`, except one that a
        quorum queue sends at this moment: it may come after the reply, and aiormq drops it. `end` and `close` give it
        back. None is on its way while the consumer has as many messages as its prefetch allows. Takes at most ten
        seconds. May be called twice."""
        consumers, self._consumers = self._consumers, {}
        # aiormq closes the channel of a cancelled call, and its messages could no longer be acknowledged, so these
        # calls are left to end by themselves.
        calls = {asyncio.ensure_future(channel.basic_cancel(consumer)) for channel, consumer in consumers.values()}
        for call in calls:
            _ending.add(call)
            call.add_done_callback(_ended)
        if calls:
            await asyncio.wait(calls, timeout=_PAUSE_TIMEOUT_SECONDS)
        await asyncio.sleep(_PASS_ON_SECONDS)

    async def end(self) -> None:
        """Stops the deliveries. Messages that were passed on before can still be acknowledged. May be called twice, or
        before `open`. Takes about one second at most."""
        self._ending = True
        readers, self._readers = self._readers, []
        for reader in readers:
            reader.cancel()
        if readers:
            _, unfinished = await asyncio.wait(readers, timeout=_CLOSE_TIMEOUT_SECONDS)
            for reader in unfinished:  # the broker has not confirmed the cancellation of the consumer
                reader.cancel()

    async def close(self) -> None:
        """Closes the connection, which gives the unacknowledged messages back to the broker. May be called twice, or
        before `open`. Takes about three seconds at most."""
        await self.end()
        opening, self._opening = self._opening, None
        if opening is not None and not opening.done():
            opening.cancel()
            await asyncio.wait({opening}, timeout=_CLOSE_TIMEOUT_SECONDS)
            opening.add_done_callback(self._stop_late)
        await self._stop()
        self.up = False

    async def _start(self) -> None:
        await self._broker.start()
        if not self._ending:
            self._readers = [
                asyncio.create_task(self._read(queue, subscriber), name=f"consume-{queue}")
                for queue, subscriber in self._subscribers.items()
            ]

    async def _read(self, queue: str, subscriber: Any) -> None:
        try:
            async for message in subscriber:
                delivery = Delivery(queue, message)
                self._consumers[queue] = delivery.channel, delivery.consumer
                self._on_message(delivery)
        except Exception as error:  # noqa: BLE001  (a broken peer may cause any error; the owner connects again)
            log.warning("subscription_broke", queue=queue, error=described(error))
        self._lost()

    def _lost(self) -> None:
        if self.up:
            self.up = False
            if not self._ending:
                self._on_lost()

    def _stop_late(self, _: "asyncio.Task[None]") -> None:
        self._late = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        """Closes the connection. If that takes longer than a second, it continues in the background: FastStream would
        connect again, and consume, if it were cancelled half-way."""
        stopping = asyncio.create_task(self._broker.stop(), name="subscription-stop")
        _ending.add(stopping)
        stopping.add_done_callback(_ended)
        await asyncio.wait({stopping}, timeout=_CLOSE_TIMEOUT_SECONDS)


_ending: set[asyncio.Task[Any]] = set()
"""Calls that nobody waits for any more."""


def _ended(task: "asyncio.Task[Any]") -> None:
    _ending.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("subscription_close", error=described(error))
