"""The middleware of every route. It begins the trace, applies the rate limits, identifies the caller and checks that
the caller's role allows the action of the route."""

import time
from collections.abc import Callable
from typing import Any

from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from opentelemetry.trace import SpanKind

from shared.errors import Forbidden, InvalidInput, Unauthenticated
from shared.http.api_key_verifier import ApiKeyVerifier
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.call import discard_body
from shared.http.client_address import TrustedProxies
from shared.http.endpoint import Operation
from shared.http.error_replies import METRICS
from shared.http.limits import Limits
from shared.http.open_bodies import OPEN_BODIES, OpenBodies
from shared.http.response_headers import REPLY_HEADERS
from shared.observability import tracing
from shared.observability.metrics import HttpMetrics
from shared.observability.tracing import Tracer
from shared.security.api_key_text import MARK
from shared.security.permissions import PUBLIC, may, scopes_for
from shared.security.tokens import Grant, Tokens

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"))
SYNC_TOKEN = b"x-sync-token"
"""The header in which some routes take an API key, beside `Authorization: Bearer`."""
_SINGLE = {b"authorization": "Authorization", SYNC_TOKEN: SYNC_TOKEN.decode(), b"idempotency-key": "Idempotency-Key"}
"""Headers of one value -> the name in an error. A second line is refused: a proxy may have read the other one."""
_MAX_PATH_CHARS = 200
"""The part of a path that a span keeps. A client may send 64 KiB."""
ACTION = "ticketrail.action"
"""The key of the action in the options of a handler without an Operation."""
_UNSAFE = frozenset(("POST", "PUT", "PATCH", "DELETE"))
OPEN_PATHS = ("/health", "/metrics", "/api-docs", "/.well-known/")
"""Prefixes of paths that need no token, have no rate limit and begin no trace."""


class Authorization:
    """ASGI middleware. Sets `request.user` to the caller's Identity and `request.auth` to its Grant (None on public
    routes), or raises Unauthenticated, Forbidden or TooManyRequests.

    The trace ends with the first byte of the response body. The span of an event stream therefore shows how long the
    client waited until the stream began.
    """

    def __init__(
        self,
        app: ASGIApp,
        tokens: Tokens,
        api_keys: ApiKeyVerifier | None,
        tracer: Tracer,
        metrics: HttpMetrics,
        limits: Limits | None,
        open_bodies: OpenBodies,
        proxies: str,
    ) -> None:
        self._app = app
        self._tokens = tokens
        self._api_keys = api_keys
        self._tracer = tracer
        self._metrics = metrics
        self._limits = limits
        self._open_bodies = open_bodies
        self._proxies = TrustedProxies(proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith(OPEN_PATHS):
            return await self._app(scope, receive, send)
        scope[METRICS] = self._metrics  # type: ignore[literal-required]
        scope[OPEN_BODIES] = self._open_bodies  # type: ignore[literal-required]
        single: dict[bytes, str] = {}
        traceparent = repeated = None
        has_body = too_large = False
        for name, value in scope["headers"]:
            if name in _SINGLE:
                if name in single:
                    repeated = _SINGLE[name]
                single[name] = value.decode("latin-1")
            elif name == b"traceparent":
                traceparent = value.decode("latin-1")
            elif name == b"content-length":
                has_body = value != b"0"
                too_large = value.isdigit() and int(value) > MAX_BODY_BYTES
            elif name == b"transfer-encoding":
                has_body = True
        trace = self._tracer.begin()
        reply_headers: list[tuple[bytes, bytes]] = scope.get(REPLY_HEADERS, [])  # type: ignore[assignment]
        reply_headers.append((b"x-trace-id", trace.trace_id.encode()))
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
                await self._admit(scope, single, repeated, reply_headers)
                if traceparent and scope["user"] is not None:
                    self._tracer.continue_from(trace, traceparent)
                    reply_headers[:] = [pair for pair in reply_headers if pair[0] != b"x-trace-id"]
                    reply_headers.append((b"x-trace-id", trace.trace_id.encode()))
                if too_large:
                    raise RequestEntityTooLarge
                if b"idempotency-key" in single:
                    _check_honours_key(scope)
            except Exception:
                if has_body:
                    await discard_body(receive)
                raise
            await self._app(scope, receive, watched)
        except Exception as error:
            status = getattr(error, "status", 0) or getattr(error, "status_code", 500)
            raise
        finally:
            end()
        return None

    async def _admit(
        self,
        scope: Scope,
        single: dict[bytes, str],
        repeated: str | None,
        reply_headers: list[tuple[bytes, bytes]],
    ) -> None:
        """`single`: the headers of _SINGLE that the request has. `repeated`: the name of one that it has twice."""
        options = scope["route_handler"].opt
        operation: Operation | None = options.get("operation")
        action = operation.action if operation is not None else options.get(ACTION, "me.read")
        address = self._proxies.client_of(scope)
        scope["client_address"] = address  # type: ignore[typeddict-unknown-key]
        if self._limits is not None:
            await self._limits.of_address(address, reply_headers)
        if repeated is not None:
            raise InvalidInput("given twice; the header takes one value", field=repeated)
        if action == PUBLIC:
            scope["user"], scope["auth"] = None, None
            return
        takes_sync_token = operation is not None and SYNC_TOKEN.decode() in operation.headers
        sync_token = single.get(SYNC_TOKEN) if takes_sync_token else None
        grant = await self._identify(single.get(b"authorization"), sync_token, address)
        identity = grant.identity
        scope["user"], scope["auth"] = identity, grant
        if self._limits is not None and identity.restaurant_id:
            await self._limits.of_restaurant(identity.restaurant_id, reply_headers)
        if not may(identity, action):
            if identity.scopes is None:
                raise Forbidden(f"the role {identity.role} may not do this", action=action)
            raise Forbidden("the API key has no scope for this", action=action, scopes=scopes_for(action))

    async def _identify(self, authorization: str | None, sync_token: str | None, address: str) -> Grant:
        """Returns what the caller's token or API key grants. Raises Unauthenticated, TooManyRequests, Unavailable."""
        key, field = sync_token, SYNC_TOKEN.decode()
        if key is None:
            key, field = (authorization or "").partition(" ")[2].strip(), "Authorization"
            if not key.startswith(MARK):
                return self._tokens.grant(authorization)
        if self._api_keys is None:
            raise Unauthenticated("this service takes no API keys", field=field)
        grant = await self._api_keys.verify(key, address, field=field)
        self._tokens.check_session(grant)  # a key that was revoked a moment ago
        return grant

    def _end(self, trace: tracing.Trace, scope: Scope, status: int) -> None:
        requested = str(scope.get("method", ""))
        # Clients may send any method, and spans must have few names.
        method = requested if requested in _METHODS else "_OTHER"
        template = str(scope.get("path_template", ""))
        self._metrics.answered(f"{method} {template}", status, (time.time_ns() - trace.started) / 1e9)
        if not trace.kept:
            return
        attributes: dict[str, Any] = {
            "http.request.method": method,
            "url.path": scope["path"][:_MAX_PATH_CHARS],
            "url.scheme": str(scope.get("scheme", "http")),
        }
        name = requested if requested in _METHODS else "HTTP"
        if route := scope.get("path_template"):
            attributes["http.route"] = route
            name = f"{name} {route}"
        if status:  # the status is 0 if the caller disconnected before the response
            attributes["http.response.status_code"] = status
        error = str(status) if status >= 500 else None
        self._tracer.end(trace, name, kind=SpanKind.SERVER, attributes=attributes, error=error)


def _check_honours_key(scope: Scope) -> None:
    """Raises InvalidInput if the request changes something and its route ignores the Idempotency-Key. The client would
    take it for a promise that a repeat is safe."""
    operation: Operation | None = scope["route_handler"].opt.get("operation")
    if operation is not None and scope.get("method") in _UNSAFE and "Idempotency-Key" not in operation.headers:
        raise InvalidInput(
            "this route does not honour an Idempotency-Key",
            field="Idempotency-Key",
            code="idempotency_key_not_honoured",
        )


def authorization(
    tokens: Tokens,
    tracer: Tracer,
    metrics: HttpMetrics,
    open_bodies: OpenBodies,
    limits: Limits | None = None,
    *,
    proxies: str = "",
    api_keys: ApiKeyVerifier | None = None,
) -> Callable[[ASGIApp], ASGIApp]:
    """Returns the middleware in the form that Litestar's list of middleware takes. Without `limits` there is no rate
    limit, and without `api_keys` only tokens are accepted."""
    return lambda app: Authorization(app, tokens, api_keys, tracer, metrics, limits, open_bodies, proxies)
