"""The request log: one line for each request, in the log of its service.

    {"service": "orders", "event": "request", "level": "info", "method": "POST", "route": "/api/orders",
     "status": 201, "ms": 4.2, "user": "…", "restaurant": "…", "request_id": "…", "trace_id": "…", "timestamp": "…"}

The level depends on the status: info below 400, warning below 500, error from 500 on. `request_log_level` is
the lowest level that is logged. Requests for health and metrics are left out. The line of an event stream comes at its
end. `log_level` has no effect on it. A line has no path, query, address or email, because these contain personal data.

Lines are written together, up to 0.1 s after their requests, because a system call for each would cost several percent
of the processor time of an order. If the process is killed, the lines of that time are lost.
"""

import asyncio
import time
from datetime import UTC, datetime
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from shared.security.tokens import Identity

CLIENT_CLOSED_REQUEST = 499
"""The status in the log of a request whose client disconnected before the response. The number is that of nginx."""
_LEFT_OUT = ("/health", "/metrics")
_LEVELS = {"info": 0, "warning": 400, "error": 500}
"""Level -> the lowest status that has it."""
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_DELAY_SECONDS = 0.1
_WRITE_BYTES = 4_096
"""PIPE_BUF of Linux: a write of at most this size into a pipe is never mixed with that of another process."""


class LineOutput(Protocol):
    def write(self, text: str) -> object: ...


class _Line(Struct, frozen=True, kw_only=True):
    """The fields of a line. Each request writes one, so it does not go through the processors of structlog, which would
    cost a fifth of the processor time of an order."""

    service: str
    event: str = "request"
    level: str
    method: str
    route: str | None
    status: int
    ms: float
    user: str | None
    restaurant: str | None
    request_id: str
    trace_id: str
    timestamp: datetime


class RequestLog:
    def __init__(self, level: str, service: str, output: LineOutput) -> None:
        """`level`: the lowest level that is logged: info, warning, error or off. `service`: its name in the log."""
        self._lowest_status = _LEVELS.get(level, 1_000)
        self._service = service
        self._output = output
        self._lines: list[bytes] = []
        self._bytes = 0

    def write(self, scope: Any, *, status: int, began: float, request_id: str, trace_id: str) -> None:
        """Logs a request that has ended. `status`: 0 if there was no response. `began`: on the monotonic clock."""
        status = status or CLIENT_CLOSED_REQUEST
        if status < self._lowest_status or scope["path"].startswith(_LEFT_OUT):
            return
        identity, method = scope.get("user"), scope["method"]
        known = identity if isinstance(identity, Identity) else None
        line = _Line(
            service=self._service,
            level="info" if status < _LEVELS["warning"] else "warning" if status < _LEVELS["error"] else "error",
            method=method if method in _METHODS else "other",
            route=scope.get("path_template") or None,
            status=status,
            ms=round((time.monotonic() - began) * 1_000, 1),
            user=known.user_id if known else None,
            restaurant=(known.restaurant_id or None) if known else None,
            request_id=request_id,
            trace_id=trace_id,
            timestamp=datetime.now(UTC),
        )
        encoded = msgspec.json.encode(line)
        if not self._lines:
            asyncio.get_running_loop().call_later(_DELAY_SECONDS, self.flush)
        elif self._bytes + len(encoded) >= _WRITE_BYTES:
            self.flush()
        self._lines.append(encoded)
        self._bytes += len(encoded) + 1

    def flush(self) -> None:
        """Writes the lines that wait."""
        if self._lines:
            self._output.write(b"\n".join([*self._lines, b""]).decode())
            self._lines.clear()
            self._bytes = 0
