"""The keeper: drains every dead queue into `dead_letters`, where operators find what could not be written.

Guarantee: a message leaves its dead queue when its letter is committed, and not before; one that comes twice changes
nothing. Whatever it is made of is kept: what PostgreSQL refuses of it is left out, the body never is.

While PostgreSQL is away letters wait in RabbitMQ: the keeper lets go of what it holds, and does not consume again
before PostgreSQL has answered, so that an outage costs each letter one delivery, not one for every try. RabbitMQ away,
or a queue that was deleted and made anew: it connects again, with jittered back-off. Several keepers share the queues.
At shutdown what is not committed goes back.
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
from services.sync.dead_letters.store import NewDeadLetter
from services.sync.failures import retry_store
from services.sync.failures.classification import FailureKind, classify, describe
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
# Of each queue. A letter may be of 16 MB, which RabbitMQ and this process hold until PostgreSQL has it.
_PREFETCH = 16
_BATCH_BYTES = 16_000_000
# After so much silence it looks whether its consumers are still there: one whose queue was deleted ends without a word.
_LOOK_AFTER = 10.0
# One whose queue was deleted and made anew at once is counted and is sent letters, but never gets them (RabbitMQ 3.10):
# they come to the next connection.
_RENEW_AFTER = 300.0
_TRIES = 5
_STOCK_EVERY = 10.0


class PostgresNotReady(Exception):
    """It does not take letters now."""


class DeadLetterCollector:
    def __init__(
        self,
        settings: Settings,
        postgres: Postgres,
        metrics: WriterMetrics,
        *,
        look_after: float = _LOOK_AFTER,
        renew_after: float = _RENEW_AFTER,
    ) -> None:
        """`postgres` as the writer role."""
        self._hosts = Hosts(settings.rabbitmq_url)
        self._postgres = postgres
        self._metrics = metrics
        self._look_after = look_after
        self._renew_after = renew_after
        self.loop = BackgroundLoop("dead-letter-collector", self._run)
        self.stock_loop = BackgroundLoop("dead-letter-stock", self._take_stock)
        self.open_letters = math.nan
        """As they were counted last; NaN while nobody knows."""
        self.attached = False

    def start(self) -> None:
        self.loop.start()
        self.stock_loop.start()

    async def stop(self) -> None:
        await asyncio.gather(self.loop.stop(), self.stock_loop.stop())

    async def _run(self) -> None:
        attempt = 0
        while True:
            await self._postgres_answers()
            try:
                await self._drain()
                attempt = 0
                continue
            except PostgresNotReady as error:
                log.warning("letters_wait_for_postgres", error=str(error))
                attempt = 0  # the waiting is for PostgreSQL, not for the broker
            except (ChannelInvalidStateError, *BROKEN_LINK) as error:
                attempt += 1
                self._hosts.turn()
                log.warning("collector_lost_the_broker", error=describe(error), attempt=attempt)
            except Exception:
                attempt += 1  # a bug of ours: the letters are still in their queues
                log.exception("collector_failed")
            await asyncio.sleep(backoff(attempt))

    async def _postgres_answers(self) -> None:
        attempt = 0
        while True:
            try:
                async with self._postgres.connection() as connection:
                    await dead_letter_store.open_letters(connection)
                return
            except Exception as error:  # noqa: BLE001  (any of them means no)
                attempt += 1
                log.debug("postgres_does_not_take_letters", error=describe(error))
            await asyncio.sleep(backoff(attempt))

    # -- draining ----------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Returns when it is time for a new connection, while no message is under way. Raises PostgresNotReady, or one
        of BROKEN_LINK."""
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
            self.attached, until = True, time.monotonic() + self._renew_after
            while True:
                try:
                    async with asyncio.timeout(self._look_after):
                        first = await arrived.get()
                except TimeoutError:
                    if time.monotonic() > until:
                        return
                    await self._look(subscription)
                    continue
                await self._settle(_batch(first, arrived))
                self.loop.turned()
        finally:
            self.attached = False
            await subscription.close()

    async def _look(self, subscription: Subscription) -> None:
        for queue in _LANES:
            if not await subscription.consumers(queue):
                raise ConnectionError(f"queue {queue} has no consumer any more")

    async def _settle(self, batch: list[Delivery]) -> None:
        letters = [
            letter
            for one in batch
            for letter in parse_dead_letters(one.queue, _LANES[one.queue], one.body, one.headers, now())
        ]
        if reasons := Counter(letter.reason for letter in await self._keep(letters)):
            for reason, count in reasons.items():
                self._metrics.letters.inc(reason, count)
            log.warning("dead_letters_kept", letters=reasons.total(), reasons=dict(reasons))
        for one in batch:
            await one.ack()

    async def _keep(self, letters: Sequence[NewDeadLetter], tries: int = 0) -> list[NewDeadLetter]:
        """Those whose death is news. Raises PostgresGone."""
        try:
            async with self._postgres.connection() as connection:
                return await dead_letter_store.keep(connection, letters)
        except Exception as error:  # noqa: BLE001  (classified below)
            failure = classify(error)
        if failure.kind is FailureKind.UNAVAILABLE:
            raise PostgresNotReady(failure.error)
        if len(letters) > 1:
            return [one for letter in letters for one in await self._keep([letter])]
        if tries == _TRIES:
            log.error("letter_not_kept", error=failure.error, queue=letters[0].queue)
            raise PostgresNotReady(failure.error)
        await asyncio.sleep(backoff(tries))
        # At the last try without anything that could be what PostgreSQL does not like.
        return await self._keep([_bare(letters[0]) if tries == _TRIES - 1 else letters[0]], tries + 1)

    async def _take_stock(self) -> None:
        while True:
            try:
                async with self._postgres.connection() as connection:
                    self.open_letters = await dead_letter_store.open_letters(connection)
                    await retry_store.sweep(connection)
            except Exception as error:  # noqa: BLE001  (then nobody knows)
                self.open_letters = math.nan
                log.debug("letters_not_counted", error=describe(error))
            self.stock_loop.turned()
            await asyncio.sleep(_STOCK_EVERY)


def _batch(first: Delivery | None, arrived: "asyncio.Queue[Delivery | None]") -> list[Delivery]:
    """With what else is here, as far as it fits into one transaction. Raises ConnectionError: a channel is gone."""
    batch: list[Delivery] = []
    size = 0
    while True:
        if first is None:
            raise ConnectionError("a channel was closed")
        batch.append(first)
        size += len(first.body)
        if size >= _BATCH_BYTES or arrived.empty():
            return batch
        first = arrived.get_nowait()


def _bare(letter: NewDeadLetter) -> NewDeadLetter:
    """Only what our own code has made of it, and the body."""
    return structs.replace(
        letter,
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
