"""Bodies of requests that have not arrived completely: each has a deadline, and each client address has few of them.

The server itself waits for ever for the rest of a body. Some thousand connections that stop in the middle of one would
take every connection that it accepts. A body whose first bytes come with the headers is complete at once, so that such
connections never keep an honest client of the same address from sending a request.
"""

import asyncio
from types import TracebackType

from shared.errors import RequestTimeout
from shared.http.limits import counted_as
from shared.settings import Settings

OPEN_BODIES = "ticketrail.open_bodies"
"""The key in the ASGI scope of the OpenBodies of the service."""


class OpenBodies:
    def __init__(self, settings: Settings) -> None:
        self._timeout_seconds = settings.body_timeout_seconds
        self._bytes_per_second = settings.body_bytes_per_second
        self._per_address = settings.address_open_bodies
        self._open: dict[str, dict[OpenBody, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def body_of(self, address: str) -> "OpenBody":
        """Returns a context in which the body of a request from this address is read. At its end it raises
        RequestTimeout if the body came too slowly, or if the address has begun too many others since."""
        return OpenBody(self, counted_as(address))

    def deadline(self) -> float:
        """Returns the time of the event loop at which a body that begins now must have arrived, in seconds."""
        return asyncio.get_running_loop().time() + self._timeout_seconds

    def seconds_for(self, size: int) -> float:
        """Returns the time that bytes which have arrived add to the deadline."""
        return size / self._bytes_per_second

    def add(self, body: "OpenBody") -> None:
        others = self._open.setdefault(body.address, {})
        if len(others) >= self._per_address:
            # The oldest one has had the most time, so it is the least likely to be honest.
            oldest = next(iter(others))
            del others[oldest]
            oldest.end()
        others[body] = None

    def remove(self, body: "OpenBody") -> None:
        others = self._open.get(body.address, {})
        others.pop(body, None)
        if not others:
            self._open.pop(body.address, None)


class OpenBody:
    __slots__ = ("_bodies", "_deadline", "_ended", "_timeout", "address")

    def __init__(self, bodies: OpenBodies, address: str) -> None:
        self.address = address
        self._bodies = bodies
        self._deadline = bodies.deadline()
        self._timeout = asyncio.timeout_at(self._deadline)
        self._ended = False

    async def __aenter__(self) -> "OpenBody":
        await self._timeout.__aenter__()
        self._bodies.add(self)
        return self

    async def __aexit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bodies.remove(self)
        try:
            await self._timeout.__aexit__(type_, error, traceback)
        except TimeoutError as late:
            if self._ended:
                raise RequestTimeout("too many requests from this address have unfinished bodies") from late
            raise RequestTimeout("the body did not arrive in time") from late

    def received(self, size: int) -> None:
        """Moves the deadline, because a part of the body has arrived."""
        if not self._ended and not self._timeout.expired():
            self._deadline += self._bodies.seconds_for(size)
            self._timeout.reschedule(self._deadline)

    def end(self) -> None:
        """Ends the reading now."""
        if not self._timeout.expired():
            self._ended = True
            self._timeout.reschedule(0.0)
