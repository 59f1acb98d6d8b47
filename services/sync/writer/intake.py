"""Taking messages from a lane: one FastStream subscriber on a connection and a channel of its own.

Guarantee: every message that the broker delivers is handed out by `take`, and leaves its queue by `settle` alone. A
lost connection is renewed by itself, to the next node of the cluster where there are several; what was taken over it
can no longer be settled, is forgotten, and comes again. `close` gives everything back that was not settled.

Traps that shaped it: each delivery is a task of its own, so that the handler does nothing but enqueue, and "all up to
this one" may be acknowledged only when all up to this one were written (`Tags`). FastStream drops deliveries, and
leaves them unsettled for ever, that arrive before it marks its subscriber as running, which it does after subscribing.
A second subscriber of a queue on the same broker object silently shares the first one's channel: each has its own. The
connection that FastStream makes renews itself to the same node alone: so a loss is answered with a new broker object.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from aiormq.abc import AbstractChannel
from aiormq.exceptions import ChannelInvalidStateError
from faststream import AckPolicy
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

from services.sync.failures.classification import describe
from services.sync.heartbeat import HeartbeatMonitor
from services.sync.writer.batches import estimate_changes
from shared.backoff import backoff
from shared.entities.contract import BrokenContract, Lane
from shared.entities.signal import HEARTBEAT, signal_in
from shared.lifecycle import vital_task
from shared.messaging.hosts import Hosts
from shared.messaging.publisher import BROKEN_LINK
from shared.messaging.topology import lane_queue
from shared.settings import Settings

log = structlog.get_logger(__name__)

_OPEN_WITHIN = 10.0
_CLOSE_WITHIN = 1.0
_LONGEST_SIGNAL = 1_000


class Tags:
    """The delivery tags of one channel: which acknowledgements say that exactly the settled messages are settled."""

    def __init__(self) -> None:
        self._all_up_to = 0
        self._beyond: set[int] = set()

    def settle(self, tags: Sequence[int]) -> tuple[int | None, list[int]]:
        """(a tag to acknowledge with all before it, tags to acknowledge one by one)"""
        self._beyond.update(tags)
        while self._all_up_to + 1 in self._beyond:
            self._all_up_to += 1
            self._beyond.discard(self._all_up_to)
        # Never one that was acknowledged before: the broker answers an unknown tag by closing the channel.
        multiple = max((tag for tag in tags if tag <= self._all_up_to), default=None)
        return multiple, sorted(tag for tag in tags if tag > self._all_up_to)


class Delivery:
    def __init__(self, message: RabbitMessage) -> None:
        raw = message.raw_message
        self.body: bytes = raw.body
        self.headers: Mapping[str, Any] = raw.headers
        self.channel: AbstractChannel = raw.channel
        assert raw.delivery_tag is not None
        self.tag: int = raw.delivery_tag

    @property
    def ours(self) -> bool:
        """False when its channel is gone: the broker gives it to somebody again."""
        return not self.channel.is_closed


class _Raw:
    """Hands the message through as it is. Without a codec, FastStream decodes by content type, and a message that it
    cannot decode stays unsettled for ever."""

    async def decode(self, message: Any) -> Any:
        return message

    async def encode(self, message: Any, serializer: Any = None) -> tuple[Any, str | None]:
        return message, None


class _LaneConnection:
    """One connection. Each broker object has its own: a late callback tells of its own alone."""

    def __init__(self) -> None:
        self.up = True


class Intake:
    def __init__(self, settings: Settings, lane: Lane, watch: HeartbeatMonitor) -> None:
        self.lane = lane
        self._settings = settings
        self._watch = watch
        self._arrived: asyncio.Queue[Delivery | None] = asyncio.Queue()
        self._tags: dict[AbstractChannel, Tags] = {}
        self._broker: RabbitBroker | None = None
        self._hosts = Hosts(settings.rabbitmq_url)
        self._link = _LaneConnection()
        self._reopening: asyncio.Task[None] | None = None
        self._ending = False
        self._held: set[Delivery] = set()

    @property
    def active(self) -> bool:
        return self._broker is not None and self._link.up

    @property
    def held(self) -> int:
        """Messages that were delivered and are not settled."""
        return len(self._held)

    async def open(self) -> None:
        """Subscribes. While the broker is away it waits and tries again, with jittered back-off."""
        attempt = 0
        while not self._ending:
            broker = self._make()
            try:
                async with asyncio.timeout(_OPEN_WITHIN):
                    await broker.start()
                if not self._link.up:
                    raise ConnectionError("lost as soon as it stood")
                self._broker = broker
                if self._ending:
                    await self.end()
                return
            except Exception as error:  # noqa: BLE001  (whatever a broken peer makes of the client: it is tried again)
                attempt += 1
                log.warning("lane_unavailable", lane=self.lane, error=describe(error), attempt=attempt)
                await self._stop(broker)
            except asyncio.CancelledError:
                await self._stop(broker)
                raise
            self._hosts.turn()
            await asyncio.sleep(backoff(attempt))

    async def _reopen(self) -> None:
        broker, self._broker = self._broker, None
        if broker is not None:
            await self._stop(broker)
        self._hosts.turn()
        await self.open()

    async def take(self) -> list[Delivery]:
        """At least one message, then what comes until the batch is large enough or its wait is over. Empty: ended."""
        taken: list[Delivery] = []
        size = 0
        loop = asyncio.get_running_loop()
        until: float | None = None  # the wait begins with the first message
        while size < self._settings.batch_max_changes:
            try:
                if not self._arrived.empty():
                    delivery = self._arrived.get_nowait()
                else:
                    async with asyncio.timeout_at(until):
                        delivery = await self._arrived.get()
            except TimeoutError:
                break
            if delivery is None:
                self._arrived.put_nowait(None)  # for the next call, which finds nothing before it
                break
            if delivery.ours:
                taken.append(delivery)
                size += estimate_changes(delivery.body)
            until = until if until is not None or not taken else loop.time() + self._settings.batch_wait_ms / 1000
        return taken

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledges. What cannot be acknowledged any more comes again, which changes nothing."""
        by_channel: dict[AbstractChannel, list[int]] = {}
        for delivery in deliveries:
            by_channel.setdefault(delivery.channel, []).append(delivery.tag)
        self._tags = {channel: tags for channel, tags in self._tags.items() if not channel.is_closed}
        for channel, tags in by_channel.items():
            multiple, single = self._tags.setdefault(channel, Tags()).settle(tags)
            try:
                if multiple is not None:
                    await channel.basic_ack(multiple, multiple=True)
                for tag in single:
                    await channel.basic_ack(tag)
            except (ChannelInvalidStateError, *BROKEN_LINK) as error:
                log.warning("not_acknowledged", lane=self.lane, messages=len(tags), error=describe(error))
        self._held.difference_update(deliveries)

    async def end(self) -> None:
        """No more deliveries; `take` hands out what is here, then nothing. May be called twice, or before `open`."""
        self._ending = True
        if self._broker is not None:
            for subscriber in self._broker.subscribers:
                with contextlib.suppress(*BROKEN_LINK):
                    async with asyncio.timeout(_CLOSE_WITHIN):
                        await subscriber.stop()
        self._arrived.put_nowait(None)

    async def close(self) -> None:
        """Lets go of everything that is not settled. `open` may follow. May be called twice, or before `open`."""
        reopening, self._reopening = self._reopening, None
        if reopening is not None:
            reopening.cancel()
            # Bounded: a handshake that is cancelled half-way may wait for a peer that is frozen.
            await asyncio.wait([reopening], timeout=_CLOSE_WITHIN)
        broker, self._broker = self._broker, None
        if broker is not None:
            await self._stop(broker)
        while not self._arrived.empty():
            self._arrived.get_nowait()
        if self._ending:
            self._arrived.put_nowait(None)
        self._tags.clear()
        self._held.clear()

    def _make(self) -> RabbitBroker:
        link = self._link = _LaneConnection()
        broker = RabbitBroker(
            self._hosts.url,
            default_channel=Channel(prefetch_count=1),
            apply_types=False,
            logger=None,
            graceful_timeout=_CLOSE_WITHIN,
            timeout=5.0,
            on_close=(lambda *_: self._lost(link),),
        )
        subscriber = broker.subscriber(
            RabbitQueue(lane_queue(self.lane), declare=False, durable=True),
            channel=Channel(prefetch_count=self._settings.lane_prefetch),
            ack_policy=AckPolicy.MANUAL,
            codec=_Raw(),
            no_reply=True,
            include_in_schema=False,
        )
        subscriber(self._arrive)
        # Deliveries can come before FastStream has set this, and would be dropped without being settled.
        subscriber.running = True
        return broker

    async def _arrive(self, message: RabbitMessage) -> None:
        delivery = Delivery(message)
        self._held.add(delivery)
        self._arrived.put_nowait(delivery)
        self._watch.active(self.lane)
        if len(delivery.body) < _LONGEST_SIGNAL:
            with contextlib.suppress(BrokenContract):  # found again, and sent on, when the batch is taken apart
                signal = signal_in(delivery.body[1:-1])
                if signal is not None and signal.type == HEARTBEAT and signal.lane == self.lane:
                    self._watch.arrived(self.lane, signal.time)

    def _lost(self, link: "_LaneConnection") -> None:
        if not link.up:
            return
        link.up = False
        self._held = {delivery for delivery in self._held if delivery.ours}
        if link is self._link and self._broker is not None and not self._ending:
            log.info("lane_lost", lane=self.lane)
            self._reopening = vital_task(self._reopen(), name=f"lane-{self.lane}-reopen")

    async def _stop(self, broker: RabbitBroker) -> None:
        try:
            async with asyncio.timeout(_CLOSE_WITHIN):
                await broker.stop()
        except BROKEN_LINK as error:
            log.debug("lane_close", lane=self.lane, error=describe(error))
