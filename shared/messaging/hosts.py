"""How every module connects to RabbitMQ: to one broker, or to one of several nodes of a cluster.

A connection goes to the first node that answers, starting with the one that answered last. A caller that loses its
connection calls `turn`, so that the next attempt starts with another node: a frozen node accepts connections and never
answers.

AMQP heartbeats are frequent, because nothing else notices a dead connection on which a client only waits.
"""

import asyncio

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection
from yarl import URL

from shared.host_urls import host_urls

log = structlog.get_logger(__name__)

_HEARTBEAT_SECONDS = 10
"""A connection is dropped after three missed heartbeats."""


class Hosts:
    def __init__(self, setting: str) -> None:
        """`setting`: one URL or several, separated by commas. `heartbeat` in the query of a URL overrides ours."""
        urls = [URL(url) for url in host_urls(setting)]
        self._urls = [
            url if "heartbeat" in url.query else url.update_query(heartbeat=_HEARTBEAT_SECONDS) for url in urls
        ]
        self._present = 0

    @property
    def url(self) -> str:
        """The URL of the node to try next."""
        return str(self._urls[self._present])

    def turn(self) -> None:
        """Starts with the next node from now on."""
        self._present = (self._present + 1) % len(self._urls)

    async def connect(self, *, timeout: float = 5.0) -> AbstractConnection:
        """A plain connection: robust ones hide losses that our loops must see. `timeout`: seconds for all nodes
        together, if at most one of them is slow. Raises what the last node raised."""
        one = timeout if len(self._urls) == 1 else timeout / 2
        for left in reversed(range(len(self._urls))):
            url = self._urls[self._present]
            try:
                return await _uncancelled(asyncio.create_task(aio_pika.connect(url, timeout=one), name="connect"))
            except Exception as error:  # a broken node may cause any error; the next one may answer
                self.turn()
                if not left:
                    raise
                log.info(
                    "broker_node_unavailable", node=f"{url.host}:{url.port}", error=str(error) or type(error).__name__
                )
        raise AssertionError("there is at least one node")


async def _uncancelled(connecting: "asyncio.Task[AbstractConnection]") -> AbstractConnection:
    """Shields the handshake from cancellation: one that is cancelled half-way waits for its peer and then raises
    another error, so that stopping a loop would take for ever. The handshake ends by itself, and its connection is
    closed."""
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close)
        raise


_closing: set[asyncio.Task[None]] = set()


def _close(connecting: "asyncio.Task[AbstractConnection]") -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        task = asyncio.ensure_future(connecting.result().close())
        _closing.add(task)  # or the task may be garbage-collected before it runs
        task.add_done_callback(_closing.discard)
