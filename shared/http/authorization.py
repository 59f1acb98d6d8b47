"""Before every handler: the trace begins, limits are asked, the caller is known, and may do what the route is for.

`outer` stands before everything, also what no route answers: it gives each answer its request id, its trace id and the
headers that browsers heed.
"""

import re
import time
from collections.abc import Callable
from typing import Any

from litestar.config.cors import CORSConfig
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from opentelemetry.trace import SpanKind

from shared.errors import Forbidden
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.client_address import TrustedProxies
from shared.http.endpoint import Operation
from shared.http.limits import Limits
from shared.http.server import METRICS, OPEN_PATHS, swallow
from shared.observability import tracing
from shared.observability.metrics import HttpMetrics
from shared.observability.tracing import Tracer
from shared.security.permissions import ACTIONS, PUBLIC
from shared.security.tokens import Tokens
from shared.settings import Settings

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"))

_ANSWER = "ticketrail.answer"
"""Where the gate leaves headers in the scope for `outer`."""
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_CSP = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
_HEADERS = [
    (b"strict-transport-security", b"max-age=63072000; includeSubDomains"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
]


class ResponseHeaders:
    """ASGI: the outermost. A response may bring a content-security-policy of its own; all others get the strictest."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = asked if _REQUEST_ID.fullmatch(asked) else b""
        answer: list[tuple[bytes, bytes]] = []
        scope[_ANSWER] = answer

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], *_HEADERS, *answer]
                if not any(name == b"content-security-policy" for name, _ in message["headers"]):
                    headers.append((b"content-security-policy", _CSP))
                trace_id = next((value for name, value in answer if name == b"x-trace-id"), b"")
                if not trace_id:  # no gate has seen it: no such path, or one that is open to all
                    trace_id = tracing.begun().trace_id.encode()
                    headers.append((b"x-trace-id", trace_id))
                headers.append((b"x-request-id", request_id or trace_id))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, sent)


class Authorization:
    """ASGI middleware, one for each route: says who calls (`request.user`; raises Unauthenticated, Forbidden or
    TooManyRequests), and ends the trace with the first byte of the answer, so that the span of an event stream says how
    long its client waited for it."""

    def __init__(
        self, app: ASGIApp, tokens: Tokens, tracer: Tracer, metrics: HttpMetrics, limits: Limits | None, proxies: str
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._tracer = tracer
        self._metrics = metrics
        self._limits = limits
        self._proxies = TrustedProxies(proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(OPEN_PATHS):
            return await self._app(scope, receive, send)
        scope[METRICS] = self._metrics  # type: ignore[literal-required]
        authorization = traceparent = None
        sends = too_large = False
        for name, value in scope["headers"]:
            if name == b"authorization":
                authorization = value.decode("latin-1")
            elif name == b"traceparent":
                traceparent = value.decode("latin-1")
            elif name == b"content-length":
                sends = value != b"0"
                too_large = value.isdigit() and int(value) > MAX_BODY_BYTES
            elif name == b"transfer-encoding":
                sends = True
        trace = self._tracer.begin(traceparent)
        answer: list[tuple[bytes, bytes]] = scope.get(_ANSWER, [])  # type: ignore[assignment]
        answer.append((b"x-trace-id", trace.trace_id.encode()))
        status = 0
        ended = False

        def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                self._end(trace, scope, status)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not ended:
                end()
            await send(message)

        try:
            try:
                await self._admit(scope, authorization, answer)
                if too_large:
                    raise RequestEntityTooLarge
            except Exception:
                if sends:
                    await swallow(receive)
                raise
            await self._app(scope, receive, watched)
        except Exception as error:
            status = getattr(error, "status", 0) or getattr(error, "status_code", 500)
            raise
        finally:
            end()
        return None

    async def _admit(self, scope: Scope, authorization: str | None, answer: list[tuple[bytes, bytes]]) -> None:
        operation: Operation | None = scope["route_handler"].opt.get("operation")
        action = operation.action if operation is not None else "me.read"
        address = self._proxies.client_of(scope)
        scope["client_address"] = address  # type: ignore[typeddict-unknown-key]
        if self._limits is not None:
            await self._limits.of_address(address, answer)
        if action == PUBLIC:
            scope["user"], scope["auth"] = None, None
            return
        who = self._tokens.verify(authorization)
        scope["user"], scope["auth"] = who, None
        if self._limits is not None and who.restaurant_id:
            await self._limits.of_restaurant(who.restaurant_id, answer)
        if who.role not in ACTIONS[action]:
            raise Forbidden(f"the role {who.role} may not do this", action=action)

    def _end(self, trace: tracing.Trace, scope: Scope, status: int) -> None:
        asked = str(scope.get("method", ""))
        method = asked if asked in _METHODS else "_OTHER"  # anybody may invent one: names of spans are few
        template = str(scope.get("path_template", ""))
        self._metrics.answered(f"{method} {template}", status, (time.time_ns() - trace.started) / 1e9)
        if not trace.kept:
            return
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "url.path": scope["path"],
            "url.scheme": str(scope.get("scheme", "http")),
        }
        name = asked if asked in _METHODS else "HTTP"
        if route := scope.get("path_template"):
            attributes["http.route"] = route
            name = f"{name} {route}"
        if status:  # none: the caller went away before it was answered
            attributes["http.response.status_code"] = status
        error = str(status) if status >= 500 else None
        self._tracer.end(trace, name, kind=SpanKind.SERVER, attributes=attributes, error=error)


def cors(settings: Settings) -> CORSConfig | None:
    """None: pages of other origins may not call."""
    origins = [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]
    if not origins:
        return None
    return CORSConfig(
        allow_origins=origins,
        allow_headers=[
            "Authorization",
            "Content-Type",
            "Idempotency-Key",
            "If-Match",
            "If-None-Match",
            "Last-Event-ID",
            "Traceparent",
            "X-Request-Id",
        ],
        expose_headers=[
            "ETag",
            "Idempotency-Replayed",
            "RateLimit-Limit",
            "RateLimit-Remaining",
            "RateLimit-Reset",
            "Retry-After",
            "X-Request-Id",
            "X-Served-By",
            "X-Trace-Id",
        ],
        max_age=600,
    )


def authorization(
    tokens: Tokens, tracer: Tracer, metrics: HttpMetrics, limits: Limits | None = None, *, proxies: str = ""
) -> Callable[[ASGIApp], ASGIApp]:
    """The middleware, for Litestar's list."""
    return lambda app: Authorization(app, tokens, tracer, metrics, limits, proxies)
