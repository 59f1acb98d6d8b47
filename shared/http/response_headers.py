"""Headers that every response of a service gets, and the request log, whose lines have the request id of a header."""

import re
import time
from typing import Any

from shared.http.methods import head_as_get
from shared.http.request_log import RequestLog
from shared.observability import tracing

REPLY_HEADERS = "ticketrail.reply_headers"
"""The key in the ASGI scope of a list of (name, value). Inner layers add headers of the response to this list."""
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
CSP = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
HEADERS = [
    (b"strict-transport-security", b"max-age=63072000; includeSubDomains"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class ResponseHeaders:
    """ASGI middleware around the whole application. It adds the request id, the trace id and the security headers to
    every response, even if no route matches, and logs the request. A response without a Content-Security-Policy gets
    the strictest one. HEAD is answered like GET."""

    def __init__(self, app: Any, request_log: RequestLog | None = None) -> None:
        self.app = app
        self._request_log = request_log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            if scope["type"] == "lifespan" and self._request_log is not None:
                self._request_log.flush()
            return
        if scope["method"] == "HEAD":
            receive, send = head_as_get(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else b""
        began, status, trace_id = time.monotonic(), 0, b""
        added: list[tuple[bytes, bytes]] = []
        scope[REPLY_HEADERS] = added

        async def sent(message: Any) -> None:
            nonlocal status, trace_id
            if message["type"] == "http.response.start":
                headers = [*message["headers"], *HEADERS, *added]
                found = dict(headers)
                if b"content-security-policy" not in found:
                    headers.append((b"content-security-policy", CSP))
                trace_id = found.get(b"x-trace-id", b"")
                # The authorization middleware does not run for an unknown or open path.
                if not trace_id:
                    trace_id = tracing.begun().trace_id.encode()
                    headers.append((b"x-trace-id", trace_id))
                headers.append((b"x-request-id", request_id or trace_id))
                status = message["status"]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            if self._request_log is not None:
                self._request_log.write(
                    scope,
                    status=status,
                    began=began,
                    request_id=(request_id or trace_id).decode(),
                    trace_id=trace_id.decode(),
                )
