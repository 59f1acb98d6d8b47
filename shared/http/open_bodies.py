"""Limits request bodies that have not arrived completely: each has a deadline, and each client address may have few of
them.

The server itself waits for the rest of a body without a deadline. A few thousand connections that stop in the middle of
a body would use up all connections that the server accepts. A body whose first bytes come with the headers is complete
at once, so that such connections never keep an honest client of the same address from sending a request.
"""

import asyncio
import time
from types import TracebackType

from shared.errors import RequestTimeout
from shared.http.limits import counted_as
from shared.settings import Settings

OPEN_BODIES = "ticketrail.open_bodies"
"""The key in the ASGI scope of the OpenBodies of the service."""
_SWEEP_SECONDS = 0.5
_LATE = "the body did not arrive in time"
_TOO_MANY = "too many requests from this address have unfinished bodies"


class OpenBodies:
    """One timer looks for late bodies, because a timer for each request would cost much more than reading its body."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_seconds = settings.body_timeout_seconds
        self._bytes_per_second = settings.body_bytes_per_second
        self._per_address = settings.address_open_bodies
        self._open: dict[str, dict[OpenBody, None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def body_of(self, address: str) -> "OpenBody":
        """Returns a context in which the current task reads the body of a request from this address. At its end the
        context raises RequestTimeout if the body came too slowly, or if the address has begun too many other bodies
        since."""
        return OpenBody(self, counted_as(address), time.monotonic() + self._timeout_seconds)

    def seconds_for(self, size: int) -> float:
        """Returns the seconds by which `size` received bytes extend the deadline."""
        return size / self._bytes_per_second

    def add(self, body: "OpenBody") -> None:
        others = self._open.setdefault(body.address, {})
        if len(others) >= self._per_address:
            # The oldest one has had the most time, so it is the least likely to be honest.
            oldest = next(iter(others))
            del others[oldest]
            oldest.end(_TOO_MANY)
        others[body] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep)

    def remove(self, body: "OpenBody") -> None:
        others = self._open.get(body.address, {})
        others.pop(body, None)
        if not others:
            self._open.pop(body.address, None)

    def _sweep(self) -> None:
        now = time.monotonic()
        for others in self._open.values():
            for body in others:
                if body.deadline <= now:
                    body.end(_LATE)
        self._timer = asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self._sweep) if self._open else None


class OpenBody:
    __slots__ = ("_bodies", "_cancelling", "_reason", "_task", "address", "deadline")

    def __init__(self, bodies: OpenBodies, address: str, deadline: float) -> None:
        self.address = address
        self.deadline = deadline
        """The time by which the body must have arrived, on the monotonic clock."""
        self._bodies = bodies
        self._reason = ""

    def __enter__(self) -> "OpenBody":
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._bodies.add(self)
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bodies.remove(self)
        # Another cancellation, such as that of the shutdown, must continue.
        if self._reason and self._task.uncancel() <= self._cancelling and type_ is asyncio.CancelledError:
            raise RequestTimeout(self._reason) from error

    def received(self, size: int) -> None:
        """Moves the deadline, because a part of the body has arrived."""
        self.deadline += self._bodies.seconds_for(size)

    def end(self, reason: str) -> None:
        """Cancels the task that reads the body. `reason`: the message of its RequestTimeout."""
        if not self._reason:
            self._reason = reason
            self._task.cancel()
