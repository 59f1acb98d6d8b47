"""Declares the topology for `ticketrail migrate`, and checks when a service starts that the topology exists."""

import aio_pika
import structlog
from aio_pika.abc import AbstractChannel, AbstractConnection
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed

from shared.messaging import topology
from shared.messaging.hosts import Hosts
from shared.messaging.recovery import START_WAIT_SECONDS, BrokerNotReady, is_missing, when_ready
from shared.messaging.topology import QueueSpec
from shared.settings import Settings

log = structlog.get_logger(__name__)


class TopologyError(Exception):
    """The broker lacks a queue or exchange, or has it with other arguments. The message says what to do."""


async def connect(url: str, *, timeout: float = 5.0) -> AbstractConnection:
    """Returns a connection to the first node that answers. It does not reconnect, so use it for one task."""
    return await Hosts(url).connect(timeout=timeout)


async def _exists(connection: AbstractConnection, queue: str) -> bool:
    """Returns whether the broker has the queue. It opens its own channel, because the broker closes the channel if the
    queue is missing.

    Raises one of BROKEN_LINK if the broker has not recovered the queue yet, such as a stream shortly after the broker's
    start.
    """
    channel = await connection.channel()
    try:
        await channel.declare_queue(queue, passive=True)
    except ChannelNotFoundEntity as error:
        if not is_missing(error):
            raise
        return False
    await channel.close()
    return True


async def _has_older_arguments(connection: AbstractConnection, queue: QueueSpec) -> bool:
    """Returns whether the queue exists with the arguments of an earlier release. It opens a channel for each attempt,
    because the broker closes the channel if the arguments differ."""
    for arguments in (queue.arguments, queue.older):
        channel = await connection.channel()
        try:
            await channel.declare_queue(queue.name, durable=True, arguments=arguments)
        except ChannelPreconditionFailed:
            continue
        await channel.close()
        return arguments is queue.older
    # No release declared the queue with these arguments. `_declare` therefore raises TopologyError.
    return False


async def _declare(channel: AbstractChannel, queue: QueueSpec) -> None:
    try:
        await channel.declare_queue(queue.name, durable=True, arguments=queue.arguments)
    except ChannelPreconditionFailed as error:
        raise TopologyError(
            f"queue {queue.name!r} exists with other arguments ({error}): drain and delete it, or restore its settings"
        ) from error


async def log_exists(connection: AbstractConnection) -> bool:
    return await _exists(connection, topology.LOG)


async def declare(connection: AbstractConnection, settings: Settings) -> None:
    """Declares everything except the logs. A repeated call changes nothing. Raises TopologyError."""
    async with connection.channel() as channel:
        exchange = await channel.declare_exchange(topology.CHANGES, aio_pika.ExchangeType.DIRECT, durable=True)
        for queue in topology.queues(settings):
            if queue.older is not None and await _has_older_arguments(connection, queue):
                log.warning(
                    "queue_keeps_older_arguments",
                    queue=queue.name,
                    has=queue.older,
                    expected=queue.arguments,
                    hint="the queue works with its old arguments. To get the new ones, drain it, delete it and run "
                    "`ticketrail migrate`",
                )
                continue
            await _declare(channel, queue)
            for lane in queue.bound_to:
                await (await channel.get_queue(queue.name, ensure=False)).bind(exchange, lane.value)


async def declare_logs(connection: AbstractConnection, settings: Settings) -> None:
    """Declares the streams. A repeated call changes nothing. Raises TopologyError."""
    async with connection.channel() as channel:
        exchange = await channel.get_exchange(topology.CHANGES, ensure=False)
        for queue in topology.logs(settings):
            await _declare(channel, queue)
            for lane in queue.bound_to:
                await (await channel.get_queue(queue.name, ensure=False)).bind(exchange, lane.value)


async def check(connection: AbstractConnection, settings: Settings) -> None:
    """Checks that the broker has every queue. AMQP cannot list bindings, but heartbeats prove them. Raises
    TopologyError."""
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
    """Waits until the broker is ready and runs `check`. `within`: a limit in seconds, or None for no limit.

    If the broker is not ready in time, logs that and returns False; the service then starts without the broker. Raises
    TopologyError.
    """
    try:
        await when_ready(settings.rabbitmq_url, lambda connection: check(connection, settings), within=within)
    except BrokerNotReady as error:
        log.warning("starting_without_broker", error=str(error))
        return False
    return True


async def check_log_at_start(settings: Settings) -> None:
    """Does the same as `check_at_start`, but checks only the change log, for a service that needs nothing else."""
    try:
        exists = await when_ready(settings.rabbitmq_url, log_exists, within=START_WAIT_SECONDS)
    except BrokerNotReady as error:
        log.warning("starting_without_broker", error=str(error))
        return
    if not exists:
        raise TopologyError(f"stream {topology.LOG!r} is missing: run `ticketrail migrate`")
