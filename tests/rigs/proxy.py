"""A TCP proxy for faults that `kill` and `freeze` cannot cause: a connection that is slow, stalls, or is half open."""

import asyncio
import contextlib
from enum import StrEnum

_CHUNK_BYTES = 65_536
_NARROW_CHUNK_BYTES = 8_192
"""With a bandwidth, chunks are small, so that connections share it evenly."""
FOUR_MBIT = 500_000
"""A bandwidth of 4 Mbit/s, in bytes per second."""


class Mode(StrEnum):
    FORWARD = "forward"
    STALL = "stall"
    """Accepts connections and bytes but forwards nothing until the mode changes; then everything arrives."""
    LOSE = "lose"
    """Half open: accepts connections and drops their bytes silently. A change of mode closes old connections."""
    REFUSE = "refuse"
    """Closes old and new connections at once."""


class Proxy:
    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        """`port` and `host` are those of the server behind the proxy."""
        self._host, self._port = host, port
        self._mode = Mode.FORWARD
        self._changed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()
        self._narrow = asyncio.Lock(), asyncio.Lock()
        """Held while bytes pass a bandwidth, in each direction."""
        self.delay = 0.0
        """Seconds by which each chunk is delayed, in each direction."""
        self.bandwidth: int | None = None
        """Bytes per second that all connections share, in each direction; None is unlimited."""
        self.port = 0
        self.accepted = 0

    async def start(self) -> int:
        """Starts the proxy; returns the port that it listens on."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        # This closes every connection, which ends its task. asyncio's server would report a cancelled task.
        self.set(Mode.REFUSE)
        await asyncio.gather(*self._links, return_exceptions=True)

    def lead_to(self, port: int) -> None:
        """Closes all connections. New ones lead to the server at this port."""
        self._port = port
        self._hang_up()

    def set(self, mode: Mode, *, delay: float = 0.0, bandwidth: int | None = None) -> None:
        was, self._mode, self.delay, self.bandwidth = self._mode, mode, delay, bandwidth
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
                    asyncio.create_task(self._carry(reader, there_writer, self._narrow[0])),
                    asyncio.create_task(self._carry(there_reader, writer, self._narrow[1])),
                ]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:
                self._open.discard(there_writer)
                there_writer.transport.abort()
        except OSError:
            pass  # the server is unavailable; the client sees its connection close
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, narrow: asyncio.Lock) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(_NARROW_CHUNK_BYTES if self.bandwidth else _CHUNK_BYTES):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if self.bandwidth:
                    async with narrow:  # waiting tasks get a lock in turn
                        await asyncio.sleep(len(chunk) / self.bandwidth)
                if self._mode is Mode.LOSE:
                    continue
                await self._gate()
                writer.write(chunk)
                await writer.drain()

    async def _gate(self) -> None:
        while self._mode in (Mode.STALL, Mode.LOSE):
            await self._changed.wait()
