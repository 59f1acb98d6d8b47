"""Waits for a broker that is not ready yet. The start-up checks of all services and `migrate` use this module.

A RabbitMQ node that is starting refuses connections, closes them, says that its vhost is down, and answers NOT_FOUND
"home node … is down or inaccessible" for each queue that it has not recovered. A stream without a leader answers
INTERNAL_ERROR or nothing at all. Streams recover seconds after everything else. All of these answers mean "not ready":
`until_ready` tries again, with jittered backoff, until a deadline, and then raises BrokerNotReady with the last answer.

Two answers are final, because waiting does not change them. One is NOT_FOUND "no queue" or "no exchange": RabbitMQ
lists durable queues before it accepts connections, so a queue that it does not know is missing. The other is an error
of the attempt itself, such as TopologyError.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.error import HTTPError

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import AuthenticationError, ChannelNotFoundEntity, ProbableAuthenticationError

from shared.backoff import backoff
from shared.messaging.hosts import Hosts
from shared.messaging.publisher import BROKEN_LINK, closed_channel_as_connection_error

log = structlog.get_logger(__name__)

T = TypeVar("T")

START_WAIT_SECONDS = 3.0
"""The time for which a service that can start without the broker waits for it."""
_MISSING = ("no queue", "no exchange")
_REFUSED_STATUS = (400, 401, 403, 405)


class BrokerNotReady(ConnectionError):
    """The broker did not become ready before the deadline, or it refuses the credentials."""


def is_missing(error: BaseException) -> bool:
    """Returns True if the broker does not know the queue or exchange, and False if it has not recovered it yet."""
    return isinstance(error, ChannelNotFoundEntity) and any(answer in str(error) for answer in _MISSING)


def _refuses_credentials(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in _REFUSED_STATUS
    return isinstance(error, AuthenticationError | ProbableAuthenticationError)


async def until_ready(
    attempt: Callable[[], Awaitable[T]],
    *,
    within: float | None,
    what: str = "RabbitMQ",
    pause_after: Callable[[int], float] = backoff,
) -> T:
    """Repeats `attempt` until the broker is ready, and returns its result. `attempt` must be idempotent.

    `within`: the limit in seconds for all attempts together, or None for no limit. With a limit, raises BrokerNotReady
    when the time is over, and at once if the broker refuses the credentials. Other errors of `attempt` pass through.
    `pause_after`: returns the seconds to wait after a number of failed attempts.
    """
    deadline = None if within is None else time.monotonic() + within
    attempts = 0
    while True:
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                with closed_channel_as_connection_error():
                    return await attempt()
        except BROKEN_LINK as error:
            if is_missing(error):
                raise
            answer = str(error) or type(error).__name__
            pause = pause_after(attempts)
            out_of_time = deadline is not None and time.monotonic() + pause > deadline
            if deadline is not None and (out_of_time or _refuses_credentials(error)):
                raise BrokerNotReady(f"{what} is not ready: {answer}") from error
            attempts += 1
            log.warning("waiting_for_broker", server=what, answer=answer, attempt=attempts)
            await asyncio.sleep(pause)


async def when_ready(url: str, work: Callable[[AbstractConnection], Awaitable[T]], *, within: float | None) -> T:
    """Runs `work` with a connection to the broker, and repeats it like `until_ready`. Each attempt opens a new
    connection, because a broker that is recovering closes channels and sometimes the connection."""
    hosts = Hosts(url)

    async def attempt() -> T:
        try:
            async with await hosts.connect() as connection:
                return await work(connection)
        except BROKEN_LINK:
            hosts.turn()
            raise

    return await until_ready(attempt, within=within)
