"""The keeper: drains every dead queue into `dead_letters`, where operators find what could not be written.

Guarantee: a message leaves its dead queue when its letter is committed, and not before; one that comes twice changes
nothing. Whatever it is made of is kept: what PostgreSQL refuses of it is left out, the body never is.

While PostgreSQL is away letters wait in RabbitMQ: the keeper lets go of what it holds, and does not consume again
before PostgreSQL has answered, so that an outage costs each letter one delivery, not one for every try. RabbitMQ away,
or a queue that was deleted and made anew: it connects again, with jittered back-off. Several keepers share the queues.
At shutdown what is not committed goes back.
"""

import asyncio
import contextlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

import structlog
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aiormq.exceptions import ChannelInvalidStateError
from msgspec import Struct, structs

from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.store import NewDeadLetter
from services.sync.failures import retry_store
from services.sync.failures.classification import FailureKind, classify, describe
from services.sync.failures.parsing import parse_dead_letters
from shared.backoff import backoff
from shared.entities.contract import Lane, now
from shared.lifecycle import BackgroundLoop
from shared.messaging import topology
from shared.messaging.hosts import Hosts
from shared.messaging.publisher import BROKEN_LINK
from shared.observability.metrics import WriterMetrics
from shared.postgres.pool import Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

# Of each queue. A letter may be of 16 MB, which RabbitMQ and this process hold until PostgreSQL has it.
_PREFETCH = 16
_BATCH_BYTES = 16_000_000
_OPEN_WITHIN = 10.0
_CLOSE_WITHIN = 1.0
# After so much silence it looks whether its consumers are still there: one whose queue was deleted ends without a word.
_LOOK_AFTER = 10.0
# One whose queue was deleted and made anew at once is counted and is sent letters, but never gets them (RabbitMQ 3.10):
# they come to the next connection.
_RENEW_AFTER = 300.0
_TRIES = 5
_STOCK_EVERY = 10.0


class PostgresNotReady(Exception):
    """It does not take letters now."""


class _Arrived(Struct, frozen=True):
    queue: str
    lane: Lane | None
    message: AbstractIncomingMessage

    def letters(self) -> list[NewDeadLetter]:
        return parse_dead_letters(self.queue, self.lane, self.message.body, self.message.headers, now())


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
        """Ends when it is time for a new connection, in a silence. Raises PostgresGone, or one of BROKEN_LINK."""
        arrived: asyncio.Queue[_Arrived | None] = asyncio.Queue()
        async with asyncio.timeout(_OPEN_WITHIN):
            connection = await self._hosts.connect()
        try:
            async with asyncio.timeout(_OPEN_WITHIN):
                await self._attach(connection, arrived)
            self.attached, until = True, time.monotonic() + self._renew_after
            while True:
                try:
                    async with asyncio.timeout(self._look_after):
                        first = await arrived.get()
                except TimeoutError:
                    if time.monotonic() > until:
                        return
                    await self._look(connection)
                    continue
                await self._settle(_batch(first, arrived))
                self.loop.turned()
        finally:
            self.attached = False
            with contextlib.suppress(*BROKEN_LINK):
                async with asyncio.timeout(_CLOSE_WITHIN):
                    await connection.close()

    async def _attach(self, connection: AbstractConnection, arrived: "asyncio.Queue[_Arrived | None]") -> None:
        # Plain, not robust: a loss must end the loop above. Each queue on a channel of its own, so that what closes one
        # (a delivery that took too long, a queue that is gone) is seen as the loss of that one.
        for name, lane in topology.dead_queues():
            channel = await connection.channel(publisher_confirms=False)
            channel.close_callbacks.add(lambda *_: arrived.put_nowait(None))
            await channel.set_qos(prefetch_count=_PREFETCH)
            queue = await channel.get_queue(name, ensure=False)
            await queue.consume(partial(_enqueue, arrived, name, lane))
        connection.close_callbacks.add(lambda *_: arrived.put_nowait(None))

    async def _look(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(_OPEN_WITHIN):
            channel = await connection.channel(publisher_confirms=False)
            for name, _ in topology.dead_queues():
                declared = (await channel.declare_queue(name, passive=True)).declaration_result
                if not declared.consumer_count:
                    raise ConnectionError(f"nobody consumes {name} any more")
            await channel.close()

    async def _settle(self, batch: "list[_Arrived]") -> None:
        letters = [letter for one in batch for letter in one.letters()]
        if reasons := Counter(letter.reason for letter in await self._keep(letters)):
            for reason, count in reasons.items():
                self._metrics.letters.inc(reason, count)
            log.warning("dead_letters_kept", letters=reasons.total(), reasons=dict(reasons))
        for one in batch:
            await one.message.ack()

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


async def _enqueue(
    arrived: "asyncio.Queue[_Arrived | None]", queue: str, lane: Lane | None, message: AbstractIncomingMessage
) -> None:
    arrived.put_nowait(_Arrived(queue, lane, message))


def _batch(first: _Arrived | None, arrived: "asyncio.Queue[_Arrived | None]") -> list[_Arrived]:
    """With what else is here, as far as it fits into one transaction. Raises ConnectionError: a channel is gone."""
    batch: list[_Arrived] = []
    size = 0
    while True:
        if first is None:
            raise ConnectionError("a channel was closed")
        batch.append(first)
        size += len(first.message.body)
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
