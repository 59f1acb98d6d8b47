"""The request log: one line for each request, in the log of its service.

    {"service": "orders", "event": "request", "level": "info", "method": "POST", "route": "/api/orders",
     "status": 201, "ms": 4.2, "user": "…", "restaurant": "…", "request_id": "…", "trace_id": "…", "timestamp": "…"}

The level depends on the status: info below 400, warning below 500, error from 500 on. `request_log_level` is
the lowest level that is logged. Requests for health and metrics are left out. The line of an event stream comes at its
end. A line has no path, query, address or email, because these contain personal data.
"""

import time
from typing import Any

import structlog

from shared.security.tokens import Identity

log = structlog.get_logger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""The status in the log of a request whose client disconnected before the response. The number is that of nginx."""
_LEFT_OUT = ("/health", "/metrics")
_LEVELS = {"info": 0, "warning": 400, "error": 500}
"""Level -> the lowest status that has it."""
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class RequestLog:
    def __init__(self, level: str) -> None:
        """`level`: the lowest level that is logged: info, warning, error or off."""
        self._lowest_status = _LEVELS.get(level, 1_000)

    def write(self, scope: Any, *, status: int, began: float, request_id: str, trace_id: str) -> None:
        """Logs a request that has ended. `status`: 0 if there was no response. `began`: on the monotonic clock."""
        status = status or CLIENT_CLOSED_REQUEST
        if status < self._lowest_status or scope["path"].startswith(_LEFT_OUT):
            return
        identity, method = scope.get("user"), scope["method"]
        known = identity if isinstance(identity, Identity) else None
        write = log.info if status < _LEVELS["warning"] else log.warning if status < _LEVELS["error"] else log.error
        write(
            "request",
            method=method if method in _METHODS else "other",
            route=scope.get("path_template") or None,
            status=status,
            ms=round((time.monotonic() - began) * 1_000, 1),
            user=known.user_id if known else None,
            restaurant=(known.restaurant_id or None) if known else None,
            request_id=request_id,
            trace_id=trace_id,
        )
