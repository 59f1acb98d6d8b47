"""Waiting for a broker that is not ready yet: answers that are retried, and answers that are final."""

from email.message import Message
from urllib.error import HTTPError

import pytest
from aiormq.exceptions import (
    ChannelInvalidStateError,
    ChannelNotFoundEntity,
    ConnectionInternalError,
    ConnectionNotAllowed,
    ProbableAuthenticationError,
)

from shared.messaging.declare import TopologyError
from shared.messaging.recovery import BrokerNotReady, until_ready

HOUR = 3_600.0  # longer than the timeout of a test, so that a test which waits for this deadline fails


def http(code: int) -> HTTPError:
    return HTTPError("http://127.0.0.1/api/users/x", code, "", Message(), None)


def at_once(failures: int) -> float:
    return 0.0


class Broker:
    """Raises an error `times` times and then answers that it is ready."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.left, self.questions = error, times, 0

    async def __call__(self) -> str:
        self.questions += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "ready"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(111, "Connect call failed"),
        ConnectionNotAllowed("NOT_ALLOWED - vhost '/' is down"),
        ChannelNotFoundEntity("NOT_FOUND - home node 'a@b' of durable queue 'changes.log.v1' is down or inaccessible"),
        ConnectionInternalError("INTERNAL_ERROR"),
        ChannelInvalidStateError("writer is None"),
        TimeoutError(),
        EOFError(),
        StopAsyncIteration(),
        Exception(),  # aiormq raises this error in callers whose channel is closed while they wait
        http(503),
        http(404),
    ],
    ids=str,
)
async def test_call_is_retried_while_the_broker_recovers(error: Exception) -> None:
    broker = Broker(error, 3)
    assert await until_ready(broker, within=HOUR, pause_after=at_once) == "ready"
    assert broker.questions == 4


@pytest.mark.parametrize(
    "error",
    [
        ChannelNotFoundEntity("NOT_FOUND - no queue 'changes.log.v1' in vhost '/'"),
        ChannelNotFoundEntity("NOT_FOUND - no exchange 'ticketrail.changes' in vhost '/'"),
        TopologyError("queue is missing"),
    ],
    ids=str,
)
@pytest.mark.parametrize("within", [HOUR, None])
async def test_a_missing_queue_or_exchange_is_refused_at_once(error: Exception, within: float | None) -> None:
    broker = Broker(error, 3)
    with pytest.raises(type(error)):
        await until_ready(broker, within=within, pause_after=at_once)
    assert broker.questions == 1


@pytest.mark.parametrize("error", [ProbableAuthenticationError("ACCESS_REFUSED"), http(401)], ids=str)
async def test_refused_credentials_end_only_a_wait_with_a_deadline(error: Exception) -> None:
    broker = Broker(error, 3)
    with pytest.raises(BrokerNotReady):
        await until_ready(broker, within=HOUR, pause_after=at_once)
    assert broker.questions == 1
    assert await until_ready(broker, within=None, pause_after=at_once) == "ready"


async def test_the_deadline_ends_the_wait_with_the_last_answer() -> None:
    broker = Broker(ConnectionRefusedError(111, "Connect call failed"), 10**9)
    with pytest.raises(BrokerNotReady, match="Connect call failed"):
        await until_ready(broker, within=0.5)
    assert broker.questions > 1
