"""Connects to RabbitMQ: to one broker, or to one of several nodes of a cluster. All modules connect in this way.

A connection goes to the first node that answers, starting with the one that answered last. A caller that loses its
connection calls `turn`, so that the next attempt starts with another node: a frozen node accepts connections and never
answers.

AMQP heartbeats are frequent, because nothing else detects a dead connection while a client only waits.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import aio_pika
import structlog
from aio_pika.abc import AbstractConnection
from yarl import URL

from shared.host_urls import host_urls

log = structlog.get_logger(__name__)

_HEARTBEAT_INTERVAL_SECONDS = 10
"""A connection is dropped after three missed heartbeats."""


Connect = Callable[..., Coroutine[Any, Any, AbstractConnection]]
"""Opens a connection to one node, as `aio_pika.connect` does: `connect(url, timeout=seconds)`."""


class Hosts:
    def __init__(self, setting: str, *, connect: Connect = aio_pika.connect) -> None:
        """`setting`: one URL, or several URLs separated by commas. A `heartbeat` in the query of a
        URL overrides ours."""
        self._connect = connect
        urls = [URL(url) for url in host_urls(setting)]
        self._urls = [
            url if "heartbeat" in url.query else url.update_query(heartbeat=_HEARTBEAT_INTERVAL_SECONDS) for url in urls
        ]
        self._present = 0

    @property
    def url(self) -> str:
        """The URL of the node to try next."""
        return str(self._urls[self._present])

    def turn(self) -> None:
        """Makes the next attempt start with the next node."""
        self._present = (self._present + 1) % len(self._urls)

    async def connect(self, *, timeout: float = 5.0) -> AbstractConnection:
        """Returns a plain connection, because a robust one would hide losses that our loops must see. `timeout`:
        seconds. With several nodes, each one gets half of the time, so that the call ends in time if at most one node
        is slow. Raises the error of the last node."""
        one = timeout if len(self._urls) == 1 else timeout / 2
        for left in reversed(range(len(self._urls))):
            url = self._urls[self._present]
            try:
                return await _uncancelled(asyncio.create_task(self._connect(url, timeout=one), name="connect"))
            except Exception as error:  # a broken node may cause any error, and the next node may answer
                self.turn()
                if not left:
                    raise
                log.info(
                    "broker_node_unavailable", node=f"{url.host}:{url.port}", error=str(error) or type(error).__name__
                )
        raise AssertionError("there is at least one node")


async def _uncancelled(connecting: "asyncio.Task[AbstractConnection]") -> AbstractConnection:
    """Shields the handshake from cancellation. A handshake that is cancelled half-way waits for its peer and then
    raises another error, so stopping a loop could take forever. After a cancellation the handshake ends by itself, and
    its connection is closed."""
    try:
        return await asyncio.shield(connecting)
    except asyncio.CancelledError:
        connecting.add_done_callback(_close)
        raise


_closing: set[asyncio.Task[None]] = set()


async def close_connection(connection: AbstractConnection, *, timeout: float) -> None:
    """Closes a connection, and returns after at most `timeout` seconds. The close then continues in the background: to
    end it half-way would leave the connection open, and a broker that has messages under way sends all of them before
    it answers."""
    await asyncio.wait({_begin_to_close(connection)}, timeout=timeout)


def _begin_to_close(connection: AbstractConnection) -> "asyncio.Task[None]":
    task = asyncio.create_task(connection.close(), name="close")
    _closing.add(task)  # without a reference, the task may be garbage-collected before it runs
    task.add_done_callback(_closed)
    return task


def _closed(task: "asyncio.Task[None]") -> None:
    _closing.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("broker_close", error=str(error) or type(error).__name__)  # the connection was lost already


def _close(connecting: "asyncio.Task[AbstractConnection]") -> None:
    if not connecting.cancelled() and connecting.exception() is None:
        _begin_to_close(connecting.result())
