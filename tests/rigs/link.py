"""A TCP proxy between one process and a server. A test can cut or freeze it, while other processes keep using the
server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

from deploy.local.port_check import HOST, find_free


class Link:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._target = (parts.hostname, parts.port)
        (self._port,) = find_free(1)
        login = parts.netloc.rpartition("@")[0]
        self.url = urlunsplit(
            parts._replace(netloc=f"{login}@{HOST}:{self._port}" if login else f"{HOST}:{self._port}")
        )
        self.carried = 0
        """Bytes that the client has sent."""
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def restore(self) -> None:
        self._flows.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, HOST, self._port)

    async def cut(self) -> None:
        """Resets open connections and refuses new ones."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for writer in list(self._open):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def freeze(self) -> None:
        """Passes no bytes and closes no connection until `restore` or `cut`."""
        self._flows.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.transport.abort()  # the link was cut after the connection was accepted
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._open.add(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
            self._open.add(far_writer)
            try:
                await asyncio.gather(self._carry(reader, far_writer, counted=True), self._carry(far_reader, writer))
            finally:
                self._open.discard(far_writer)
                far_writer.close()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._open.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, counted: bool = False
    ) -> None:
        while data := await reader.read(65_536):
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
            self.carried += len(data) if counted else 0
        with contextlib.suppress(OSError):
            writer.write_eof()


@asynccontextmanager
async def link_to(url: str) -> AsyncIterator[Link]:
    link = Link(url)
    await link.restore()
    try:
        yield link
    finally:
        await link.cut()
