"""A TCP proxy before a server, for what kill and freeze cannot make: a link that is slow, stalls, or is half open."""

import asyncio
import contextlib
from enum import StrEnum

_PIECE = 65_536


class Mode(StrEnum):
    FORWARD = "forward"
    STALL = "stall"
    """Takes connections and bytes, and hands nothing on: it waits. Afterwards all of it arrives."""
    LOSE = "lose"
    """Half open: takes connections and bytes and loses them without a word. Afterwards its old links are dead."""
    REFUSE = "refuse"
    """Hangs up at once, on old connections and new ones."""


class Proxy:
    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        """Of the server behind it."""
        self._host, self._port = host, port
        self._mode = Mode.FORWARD
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self.delay = 0.0
        """Seconds that each piece waits, each way."""
        self.port = 0
        self.accepted = 0

    async def start(self) -> int:
        """The port that it listens on."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        self.set(Mode.REFUSE)  # ends every link; a task that is cancelled would be reported by asyncio's server
        await asyncio.gather(*self._links, return_exceptions=True)

    def set(self, mode: Mode, *, delay: float = 0.0) -> None:
        was, self._mode, self.delay = self._mode, mode, delay
        if mode is Mode.REFUSE or (was is Mode.LOSE and mode is not Mode.LOSE):
            self._hang_up()
        self._changed.set()
        self._changed = asyncio.Event()

    def _hang_up(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self._mode is Mode.REFUSE:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        task.add_done_callback(self._links.discard)
        self._open.add(writer)
        try:
            await self._gate()
            there_reader, there_writer = await asyncio.open_connection(self._host, self._port)
            self._open.add(there_writer)
            try:
                ways = [
                    asyncio.create_task(self._carry(reader, there_writer)),
                    asyncio.create_task(self._carry(there_reader, writer)),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:
                self._open.discard(there_writer)
                there_writer.transport.abort()
        except OSError:
            pass  # the server is not there: its caller sees the link end
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self._mode is Mode.LOSE:
                    continue
                await self._gate()
                writer.write(piece)
                await writer.drain()

    async def _gate(self) -> None:
        while self._mode in (Mode.STALL, Mode.LOSE):
            await self._changed.wait()
