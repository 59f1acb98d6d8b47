"""The dead-letter collector moves messages from every dead-letter queue into the table `dead_letters`, where operators
find the changes that could not be written. The PostgreSQL writer stores its dead letters itself. These queues hold
those that PostgreSQL refused there, those of the mirror writer, and messages that the broker dead-lettered.

Guarantee: a message leaves its dead-letter queue only after its dead letter is committed, and storing a dead letter
twice is idempotent. Every message can be stored: a field that PostgreSQL refuses is left out, but the body is always
kept. Order does not matter. Several collectors may share the queues.

Backend unavailable: while PostgreSQL is unavailable, dead letters wait in RabbitMQ. The collector releases its messages
and consumes again only after PostgreSQL has answered, so that an outage costs each message one delivery instead of one
per try. While RabbitMQ is unavailable, or after a queue was deleted and created again, the collector reconnects with
jittered backoff.

Shutdown: it may be stopped at any time; uncommitted messages return to their queue.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Sequence

import structlog
from aiormq.exceptions import ChannelInvalidStateError
from msgspec import structs

from services.sync.dead_letters import store as dead_letter_store
from services.sync.failures import retry_store
from services.sync.failures.classification import FailureKind, classify, describe
from services.sync.failures.dead_letter_store import NewDeadLetter, keep
from services.sync.failures.parsing import parse_dead_letters
from shared.backoff import backoff
from shared.entities.contract import now
from shared.lifecycle import BackgroundLoop
from shared.messaging import topology
from shared.messaging.hosts import Hosts
from shared.messaging.publisher import BROKEN_LINK
from shared.messaging.subscription import Delivery, Subscription
from shared.observability.metrics import WriterMetrics
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

_LANES = dict(topology.dead_queues())
# Messages of each of the four queues. A dead letter may have 16 MB, and RabbitMQ and this process hold it until it is
# stored.
_PREFETCH = 4
_BATCH_BYTES = 16_000_000
_CHECK_CONSUMERS_DELAY_SECONDS = 10.0
"""After this time without a message the consumers are checked, because a deleted queue ends its consumer silently."""
_RENEW_DELAY_SECONDS = 300.0
"""An idle connection is renewed after this time. If a queue is deleted and created again at once, RabbitMQ 3.10 still
counts the old consumer and assigns messages to it, but delivers them only to a new connection."""
_MAX_ATTEMPTS = 5
_COUNT_INTERVAL_SECONDS = 10.0


class PostgresNotReady(Exception):
    """PostgreSQL accepts no dead letters now."""


class DeadLetterCollector:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        metrics: WriterMetrics,
        *,
        check_consumers_delay_seconds: float = _CHECK_CONSUMERS_DELAY_SECONDS,
        renew_delay_seconds: float = _RENEW_DELAY_SECONDS,
    ) -> None:
        """`postgres`: a pool of the writer role."""
        self._hosts = Hosts(settings.rabbitmq_url)
        self._postgres = postgres
        self._metrics = metrics
        self._check_consumers_delay_seconds = check_consumers_delay_seconds
        self._renew_delay_seconds = renew_delay_seconds
        self.loop = BackgroundLoop("dead-letter-collector", self._run)
        self.count_loop = BackgroundLoop("dead-letter-count", self._count)
        self.open_dead_letters = math.nan
        """The number of open dead letters at the last count; NaN while it is unknown."""
        self.attached = False

    def start(self) -> None:
        self.loop.start()
        self.count_loop.start()

    async def stop(self) -> None:
        await asyncio.gather(self.loop.stop(), self.count_loop.stop())

    async def _run(self) -> None:
        attempt = 0
        while True:
            await self._wait_for_postgres()
            try:
                await self._drain()
                attempt = 0
                continue
            except PostgresNotReady as error:
                log.warning("dead_letters_wait_for_postgres", error=str(error))
                attempt = 0  # the broker did not fail, so its backoff starts again
            except (ChannelInvalidStateError, *BROKEN_LINK) as error:
                attempt += 1
                self._hosts.turn()
                log.warning("collector_lost_broker", error=describe(error), attempt=attempt)
            except Exception:
                attempt += 1  # a bug of ours: the messages are still in their queues
                log.exception("collector_failed")
            await asyncio.sleep(backoff(attempt))

    async def _wait_for_postgres(self) -> None:
        attempt = 0
        while True:
            try:
                async with self._postgres.connection() as connection:
                    await dead_letter_store.count_open(connection)
                return
            except Exception as error:  # noqa: BLE001  (any error means that PostgreSQL is not ready)
                attempt += 1
                log.debug("postgres_not_ready", error=describe(error))
            await asyncio.sleep(backoff(attempt))

    # -- draining ----------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Stores dead letters until the connection is due for renewal and no message is in flight. Raises
        PostgresNotReady, or one of BROKEN_LINK."""
        arrived: asyncio.Queue[Delivery | None] = asyncio.Queue()
        subscription = Subscription(
            self._hosts.url,
            list(_LANES),
            prefetch=_PREFETCH,
            on_message=arrived.put_nowait,
            on_lost=lambda: arrived.put_nowait(None),
        )
        try:
            await subscription.open()
            self.attached, renew_at = True, time.monotonic() + self._renew_delay_seconds
            while True:
                try:
                    async with asyncio.timeout(self._check_consumers_delay_seconds):
                        first = await arrived.get()
                except TimeoutError:
                    if time.monotonic() > renew_at:
                        return
                    await self._check_consumers(subscription)
                    continue
                await self._settle(_batch(first, arrived))
                self.loop.turned()
        finally:
            self.attached = False
            await subscription.close()

    async def _check_consumers(self, subscription: Subscription) -> None:
        for queue in _LANES:
            if not await subscription.consumers(queue):
                raise ConnectionError(f"queue {queue} has no consumer any more")

    async def _settle(self, batch: list[Delivery]) -> None:
        dead_letters = [
            dead_letter
            for message in batch
            for dead_letter in parse_dead_letters(
                message.queue, _LANES[message.queue], message.body, message.headers, now()
            )
        ]
        if reasons := Counter(dead_letter.reason for dead_letter in await self._store(dead_letters)):
            for reason, count in reasons.items():
                self._metrics.dead_letters.inc(reason, count)
            log.warning("dead_letters_stored", dead_letters=reasons.total(), reasons=dict(reasons))
        for message in batch:
            await message.ack()

    async def _store(self, dead_letters: Sequence[NewDeadLetter], attempts: int = 0) -> list[NewDeadLetter]:
        """Stores dead letters and returns those whose death was not stored yet. Raises PostgresNotReady."""
        try:
            async with self._postgres.connection() as connection:
                return await keep(connection, dead_letters)
        except Exception as error:  # noqa: BLE001  (classified below)
            failure = classify(error)
        if failure.kind is FailureKind.UNAVAILABLE:
            raise PostgresNotReady(failure.error)
        if len(dead_letters) > 1:
            return [new for dead_letter in dead_letters for new in await self._store([dead_letter])]
        if attempts == _MAX_ATTEMPTS:
            log.error("dead_letter_not_stored", error=failure.error, queue=dead_letters[0].queue)
            raise PostgresNotReady(failure.error)
        await asyncio.sleep(backoff(attempts))
        # The last attempt leaves out every field that PostgreSQL could refuse.
        return await self._store(
            [_minimal(dead_letters[0]) if attempts == _MAX_ATTEMPTS - 1 else dead_letters[0]], attempts + 1
        )

    async def _count(self) -> None:
        while True:
            try:
                async with self._postgres.connection() as connection:
                    self.open_dead_letters = await dead_letter_store.count_open(connection)
                    await retry_store.sweep(connection)
            except Exception as error:  # noqa: BLE001  (the count is unknown then)
                self.open_dead_letters = math.nan
                log.debug("dead_letters_not_counted", error=describe(error))
            self.count_loop.turned()
            await asyncio.sleep(_COUNT_INTERVAL_SECONDS)


def _batch(first: Delivery | None, arrived: "asyncio.Queue[Delivery | None]") -> list[Delivery]:
    """Returns `first` and the messages that have already arrived after it, up to the size of one transaction. Raises
    ConnectionError if the connection is lost."""
    batch: list[Delivery] = []
    size = 0
    while True:
        if first is None:
            raise ConnectionError("the connection was lost")
        batch.append(first)
        size += len(first.body)
        if size >= _BATCH_BYTES or arrived.empty():
            return batch
        first = arrived.get_nowait()


def _minimal(dead_letter: NewDeadLetter) -> NewDeadLetter:
    """Returns the dead letter with only its body and the fields that our own code computes."""
    return structs.replace(
        dead_letter,
        entity=None,
        entity_id=None,
        version=None,
        type=None,
        source=None,
        terminal_id=None,
        trace_id=None,
        error="",
        headers={},
    )
