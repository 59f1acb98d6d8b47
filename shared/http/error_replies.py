"""Turns errors into replies: `{"success": false, "error": {"message", "code", "details", "trace_id"}}`."""

from typing import Any

import msgspec
import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap

from shared.entities.contract import BrokenContract
from shared.errors import TicketrailError, Unavailable
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.encodings import ACCEPTED
from shared.http.methods import allowed_methods
from shared.observability import tracing
from shared.observability.metrics import HttpMetrics

log = structlog.get_logger(__name__)

METRICS = "ticketrail.metrics"
"""The key in the ASGI scope under which the authorization middleware stores HttpMetrics, so that errors are counted."""

# Headers that RFC 9110 asks for: the scheme by which a client can authenticate (15.5.2), the end of a connection whose
# request never came (15.5.9), and the encodings of bodies that the service reads (15.5.16).
_OF_STATUS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    415: {"Accept-Encoding": ACCEPTED},
}


def _error_reply(
    status: int, message: str, code: str, details: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Response[bytes]:
    error = {"message": message, "code": code, "details": details or {}, "trace_id": tracing.begun().trace_id}
    return Response(
        msgspec.json.encode({"success": False, "error": error}),
        status_code=status,
        media_type=MediaType.JSON,
        headers={**_OF_STATUS.get(status, {}), **(headers or {})},
    )


def _ticketrail_error(request: Request[Any, Any, Any], error: TicketrailError) -> Response[bytes]:
    _count(request, error.error_code)
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    return _error_reply(error.status, error.message, error.error_code, error.details, headers)


def _count(request: Request[Any, Any, Any], code: str) -> None:
    metrics = request.scope.get(METRICS)
    if isinstance(metrics, HttpMetrics):  # the middleware sets it only if a route matched
        metrics.refused(code)


def _http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    codes = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
    details: dict[str, Any] = {}
    if error.status_code == 413:
        details = {"field": "body", "max_bytes": MAX_BODY_BYTES}
    elif isinstance(error.extra, list):
        details = {"field": ", ".join(str(part.get("key", "")) for part in error.extra if isinstance(part, dict))}
    _count(request, codes.get(error.status_code, "http_error"))
    headers = dict(error.headers or {})
    if declared := headers.pop("allow", None):  # for status 405
        headers["Allow"] = allowed_methods(declared.split(", "))
    return _error_reply(error.status_code, error.detail, codes.get(error.status_code, "http_error"), details, headers)


def _newer_release(request: Request[Any, Any, Any], error: BrokenContract) -> Response[bytes]:
    """A stored state of a major version that this release does not read. An instance of the newer release reads it."""
    if error.reason != "unsupported_version":
        return _unexpected_error(request, error)
    return _ticketrail_error(request, Unavailable(f"{error}; retry", retry_after=2.0, code=error.reason))


def _unexpected_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    log.error("unexpected_error", path=request.url.path[:200], method=request.method, exc_info=error)
    _count(request, "internal")
    return _error_reply(500, "something went wrong on our side", "internal")


EXCEPTION_HANDLERS: ExceptionHandlersMap = {
    TicketrailError: _ticketrail_error,
    HTTPException: _http_exception,
    BrokenContract: _newer_release,
    Exception: _unexpected_error,
}
