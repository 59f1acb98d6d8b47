"""Declaring the topology (for `ticketrail migrate`) and checking that it is there (for every service's start)."""

from uuid import uuid4

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

from shared.entities.contract import now
from shared.entities.signal import HEARTBEAT, Signal, encode_signal
from shared.messaging import topology
from shared.messaging.hosts import Hosts
from shared.messaging.recovery import START_WAIT_SECONDS, BrokerNotReady, is_missing, when_ready
from shared.messaging.topology import QueueSpec
from shared.settings import Settings

log = structlog.get_logger(__name__)


class TopologyError(Exception):
    """The broker does not hold what this version needs; says which queue and what to do."""


async def connect(url: str, *, timeout: float = 5.0) -> AbstractConnection:
    """To the first node that answers, for whoever asks once."""
    return await Hosts(url).connect(timeout=timeout)


async def _exists(connection: AbstractConnection, queue: str) -> bool:
    """Asked on a channel of its own: the broker closes the channel of a question with the answer no. Raises one of
    BROKEN_LINK for a queue that is there and not recovered yet, such as a stream of a broker that has just started."""
    channel = await connection.channel()
    try:
        await channel.declare_queue(queue, passive=True)
    except ChannelNotFoundEntity as error:
        if not is_missing(error):
            raise
        return False
    await channel.close()
    return True


async def _stands_as_before(connection: AbstractConnection, queue: QueueSpec) -> bool:
    """Whether the queue was declared by an earlier version, with other arguments. Each question on a channel of its
    own: the broker closes it with the answer no."""
    for arguments in (queue.arguments, queue.older):
        channel = await connection.channel()
        try:
            await channel.declare_queue(queue.name, durable=True, arguments=arguments)
        except ChannelPreconditionFailed:
            continue
        await channel.close()
        return arguments is queue.older
    return False  # with arguments that we never gave: declaring it says so


async def _declare(channel: AbstractChannel, queue: QueueSpec) -> None:
    try:
        await channel.declare_queue(queue.name, durable=True, arguments=queue.arguments)
    except ChannelPreconditionFailed as error:
        raise TopologyError(
            f"queue {queue.name!r} exists with other arguments ({error}): drain it and delete it, or keep its settings"
        ) from error


async def log_exists(connection: AbstractConnection) -> bool:
    return await _exists(connection, topology.LOG)


async def declare(connection: AbstractConnection, settings: Settings) -> None:
    """Everything but the logs; repeating it changes nothing."""
    async with connection.channel() as channel:
        exchange = await channel.declare_exchange(topology.CHANGES, aio_pika.ExchangeType.DIRECT, durable=True)
        for queue in topology.queues(settings):
            if queue.older is not None and await _stands_as_before(connection, queue):
                log.warning(
                    "queue_keeps_older_arguments",
                    queue=queue.name,
                    has=queue.older,
                    wanted=queue.arguments,
                    hint="works as before; drain it, delete it and migrate again to give it the new ones",
                )
                continue
            await _declare(channel, queue)
            for lane in queue.bound_to:
                await (await channel.get_queue(queue.name, ensure=False)).bind(exchange, lane.value)


async def declare_logs(connection: AbstractConnection, settings: Settings, epoch: str) -> None:
    """The streams and, before anything can reach a new one through a binding, a heartbeat in each that says its epoch.
    Without the log all of them are made anew: they share its epoch."""
    anew = not await log_exists(connection)
    async with connection.channel() as channel:
        exchange = await channel.get_exchange(topology.CHANGES, ensure=False)
        for queue in topology.logs(settings):
            if anew:
                await channel.queue_delete(queue.name)
            await _declare(channel, queue)
            heartbeat = Signal(id=str(uuid4()), type=HEARTBEAT, time=now(), epoch=epoch, source="migrate")
            message = aio_pika.Message(encode_signal(heartbeat), message_id=heartbeat.id, delivery_mode=2)
            await channel.default_exchange.publish(message, queue.name, mandatory=True, timeout=5.0)
            for lane in queue.bound_to:
                await (await channel.get_queue(queue.name, ensure=False)).bind(exchange, lane.value)


async def check(connection: AbstractConnection, settings: Settings) -> None:
    """Refuse to run on a broker that lacks a queue. Bindings cannot be asked for: the heartbeats prove those."""
    channel = await connection.channel()
    try:
        await channel.declare_exchange(topology.CHANGES, passive=True)
    except ChannelNotFoundEntity as error:
        if not is_missing(error):
            raise
        raise TopologyError(f"exchange {topology.CHANGES!r} is missing: run `ticketrail migrate`") from error
    for queue in [*topology.queues(settings), *topology.logs(settings)]:
        if not await _exists(connection, queue.name):
            raise TopologyError(f"queue {queue.name!r} is missing: run `ticketrail migrate`")
    await channel.close()


async def check_at_start(settings: Settings, *, within: float | None = START_WAIT_SECONDS) -> bool:
    """`check` once the broker is ready. False: it is not ready within so many seconds, which is logged, and the service
    starts without it. None waits for it without a limit. Raises TopologyError."""
    try:
        await when_ready(settings.rabbitmq_url, lambda connection: check(connection, settings), within=within)
    except BrokerNotReady as error:
        log.warning("starting_without_broker", error=str(error))
        return False
    return True


async def check_log_at_start(settings: Settings) -> None:
    """The same for a service that only reads the log."""
    try:
        there = await when_ready(settings.rabbitmq_url, log_exists, within=START_WAIT_SECONDS)
    except BrokerNotReady as error:
        log.warning("starting_without_broker", error=str(error))
        return
    if not there:
        raise TopologyError(f"stream {topology.LOG!r} is missing: run `ticketrail migrate`")
