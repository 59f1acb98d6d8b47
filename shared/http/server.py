"""What every HTTP service has in common: bodies, the envelope, errors, health, and the server. The gate (gate.py)
stands before it.

{"success": true, "data": …}
{"success": false, "error": {"message", "code", "details", "trace_id"}}
"""

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
import structlog
from litestar import MediaType, Request, Response, get, route
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.handlers import HTTPRouteHandler
from litestar.types import ExceptionHandlersMap, Receive, Scope, Send

from shared.errors import InvalidInput, TicketrailError
from shared.http.bodies import MAX_BODY_BYTES
from shared.observability import tracing
from shared.observability.metrics import HttpMetrics, Metrics
from shared.security.tokens import Identity

log = structlog.get_logger(__name__)

_SWALLOWED_BYTES = 16_000_000
_SWALLOWED_SECONDS = 2.0
METRICS = "ticketrail.metrics"
"""Where the gate leaves them in the scope for those that answer errors."""
OPEN_PATHS = ("/health/", "/metrics", "/api-docs")

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


# -- in ----------------------------------------------------------------------------------------------------------


class Call(Request[Identity, Any, Any]):
    """A request whose body and single headers are read as they came: Litestar's own streams the one and builds a
    multidict of the others, together a tenth of what an order costs. Hand it to the application as `request_class`."""

    __slots__ = ()

    def header(self, name: bytes) -> str | None:
        """`name` in lower case; of several the first."""
        for found, value in self.scope["headers"]:
            if found == name:
                return value.decode("latin-1")
        return None

    @property
    def identity(self) -> Identity:
        """Who calls, as the gate found it."""
        found: Identity = self.scope["user"]
        return found

    async def whole_body(self) -> bytes:
        """Once. Raises RequestEntityTooLarge."""
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                raise InvalidInput("the client left before its request was whole", field="body")
            pieces.append(message["body"])
            size += len(message["body"])
            if size > MAX_BODY_BYTES:
                if message.get("more_body"):
                    await swallow(self.receive)
                raise RequestEntityTooLarge
            if not message.get("more_body"):
                return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def swallow(receive: Receive) -> None:
    """Reads the rest of a body that nobody wants, within bounds: a connection that is closed while its client still
    sends is reset, and the client would never see the answer."""
    left = _SWALLOWED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SWALLOWED_SECONDS):
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left -= len(message["body"])


# -- out ---------------------------------------------------------------------------------------------------------


class Reply:
    """An answer that is whole: an ASGI application that sends it. Litestar's own response looks for cookies, encoders
    and hooks that we have none of, at a fifth of what an order costs."""

    __slots__ = ("_body", "_headers", "_status", "_type")

    def __init__(
        self,
        body: bytes,
        *,
        status: int = 200,
        headers: Mapping[str, str] = _NO_HEADERS,
        content_type: bytes = b"application/json",
    ) -> None:
        self._body = body
        self._status = status
        self._headers = headers
        self._type = content_type

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.lower().encode(), value.encode()) for name, value in self._headers.items()]
        if self._status != 304:
            headers += ((b"content-type", self._type), (b"content-length", b"%d" % len(self._body)))
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


def success(data: Any, *, status: int = 200, headers: Mapping[str, str] = _NO_HEADERS, **meta: Any) -> Reply:
    """`data` may be `msgspec.Raw`: what is encoded already is not encoded again."""
    return Reply(msgspec.json.encode({"success": True, "data": data, **meta}), status=status, headers=headers)


def failure(error: TicketrailError) -> Response[bytes]:
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    return _failure(error.status, error.message, error.error_code, error.details, headers)


def _failure(
    status: int, message: str, code: str, details: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Response[bytes]:
    error = {"message": message, "code": code, "details": details or {}, "trace_id": tracing.begun().trace_id}
    return Response(
        msgspec.json.encode({"success": False, "error": error}),
        status_code=status,
        media_type=MediaType.JSON,
        headers=headers or {},
    )


def _ours(request: Request[Any, Any, Any], error: TicketrailError) -> Response[bytes]:
    _count(request, error.error_code)
    return failure(error)


def _count(request: Request[Any, Any, Any], code: str) -> None:
    metrics = request.scope.get(METRICS)
    if isinstance(metrics, HttpMetrics):  # what never reached the gate, such as an unknown path, is not counted
        metrics.refused(code)


def _litestars(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    codes = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    details: dict[str, Any] = {}
    if error.status_code == 413:
        details = {"field": "body", "max_bytes": MAX_BODY_BYTES}
    elif isinstance(error.extra, list):
        details = {"field": ", ".join(str(part.get("key", "")) for part in error.extra if isinstance(part, dict))}
    _count(request, codes.get(error.status_code, "http_error"))
    # 405 brings `Allow` with it.
    headers = dict(error.headers or {})
    return _failure(error.status_code, error.detail, codes.get(error.status_code, "http_error"), details, headers)


def _unexpected(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("unexpected", path=request.url.path, method=request.method, exc_info=error)
    _count(request, "internal")
    return _failure(500, "something went wrong on our side", "internal")


def options(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """`OPTIONS` of every path, to be handed over before `handlers`: of a path with several Litestar's own names the
    methods of one alone."""
    methods: dict[str, set[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, {"OPTIONS"}).update(handler.http_methods)
    return [_options(path, ", ".join(sorted(found))) for path, found in methods.items()]


def _options(path: str, allowed: str) -> HTTPRouteHandler:
    @route(path, http_method=HttpMethod.OPTIONS, status_code=204, sync_to_thread=False)
    def answer() -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allowed})

    return answer


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    TicketrailError: _ours,
    HTTPException: _litestars,
    Exception: _unexpected,
}


# -- health ------------------------------------------------------------------------------------------------------

Readiness = Callable[[], Awaitable[tuple[bool, dict[str, Any]]]]


def health(readiness: Readiness) -> list[HTTPRouteHandler]:
    """`/health/live`: the process turns. `/health/ready`: it can do its work; 503 with what is missing when not."""

    @get("/health/live", sync_to_thread=False)
    def live() -> Response[bytes]:
        return Response(b'{"status":"live"}', media_type=MediaType.JSON)

    @get("/health/ready")
    async def ready() -> Response[bytes]:
        fit, details = await readiness()
        body = {"status": "ready" if fit else "not_ready", **details}
        return Response(msgspec.json.encode(body), status_code=200 if fit else 503, media_type=MediaType.JSON)

    return [live, ready]


def metrics_route(metrics: Metrics) -> HTTPRouteHandler:
    """`/metrics`, for Prometheus: no token, so keep it away from the outside."""

    @get("/metrics", sync_to_thread=False)
    def scrape() -> Response[bytes]:
        return Response(metrics.text(), headers={"Content-Type": metrics.content_type})

    return scrape


# -- the server --------------------------------------------------------------------------------------------------


def stop_event() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set before the server acts on them: Granian waits for open responses, so
    every stream must end on it, or the process never exits. Call it in the lifespan, inside the worker process."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        before = signal.getsignal(number)

        def stop(signum: int, frame: Any, before: Any = before) -> None:
            loop.call_soon_threadsafe(stopping.set)
            if callable(before):
                before(signum, frame)

        signal.signal(number, stop)
    return stopping


def serve(target: str, *, host: str, port: int, connections: int | None = None, kill_after: int = 8) -> None:
    """Runs the ASGI factory `target` ("package.module:function") in one worker process until it is told to stop.
    `connections`: how many may be open at once; Granian's 1,024 leave no way to /health when all of them stream.
    `kill_after`: seconds after which a worker that is told to stop is killed; a client that does not read holds it."""
    from granian import Granian  # not at the top: tests of an app need no server
    from granian.constants import HTTPModes, Interfaces, Loops

    Granian(
        target,
        address=host,
        port=port,
        interface=Interfaces.ASGI,
        http=HTTPModes.http1,  # to detect HTTP/2 costs 10 KB of buffers for every open connection
        backpressure=connections,
        factory=True,
        loop=Loops.uvloop,
        workers=1,
        log_access=False,
        workers_kill_timeout=kill_after,
    ).serve()
