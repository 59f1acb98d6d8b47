"""The way in which everything here connects to RabbitMQ: one broker, or several nodes of one cluster.

A connection is made to the first node that answers, beginning with the one that answered last. Whoever loses one says
`turn`, so that the next attempt begins elsewhere: a node that is frozen takes connections and never speaks.

Heartbeats are frequent: a link that died without a word, which only waits, is noticed by nothing else.
"""

import asyncio

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection
from yarl import URL

from shared.host_urls import host_urls

log = structlog.get_logger(__name__)

_HEARTBEAT = 10  # seconds; three are missed before a link is given up


class Hosts:
    def __init__(self, setting: str) -> None:
        """`setting`: a URL, or several with commas between; `heartbeat` in its query overrides ours."""
        urls = [URL(url) for url in host_urls(setting)]
        self._urls = [url if "heartbeat" in url.query else url.update_query(heartbeat=_HEARTBEAT) for url in urls]
        self._present = 0

    @property
    def url(self) -> str:
        """Of the node whose turn it is."""
        return str(self._urls[self._present])

    def turn(self) -> None:
        self._present = (self._present + 1) % len(self._urls)

    async def connect(self, *, timeout: float = 5.0) -> AbstractConnection:
        """A plain connection: robust ones hide losses that our loops must see. `timeout`: of all nodes together, when
        only one of them can be slow. Raises what the last of them raised."""
        one = timeout if len(self._urls) == 1 else timeout / 2
        for left in reversed(range(len(self._urls))):
            url = self._urls[self._present]
            try:
                return await _whole(asyncio.create_task(aio_pika.connect(url, timeout=one), name="connect"))
            except Exception as error:  # whatever a broken node makes of the client: the next may answer
                self.turn()
                if not left:
                    raise
                log.info(
                    "broker_node_unavailable", node=f"{url.host}:{url.port}", error=str(error) or type(error).__name__
                )
        raise AssertionError("there is at least one node")


async def _whole(connecting: "asyncio.Task[AbstractConnection]") -> AbstractConnection:
    """A handshake that is cancelled half-way waits for its peer, and then raises something else: whoever stops a loop
    that connects would wait for ever. So it is left to end by itself, and closed if it comes to stand."""
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close)
        raise


_closing: set[asyncio.Task[None]] = set()


def _close(connecting: "asyncio.Task[AbstractConnection]") -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        task = asyncio.ensure_future(connecting.result().close())
        _closing.add(task)  # or it may be collected before it has run
        task.add_done_callback(_closing.discard)
