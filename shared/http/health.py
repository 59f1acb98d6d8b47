"""The routes for supervisors and Prometheus: `/health/live`, `/health/ready`, its alias `/health`, and `/metrics`."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar import MediaType, Response, get
from litestar.handlers import HTTPRouteHandler

from shared.observability.metrics import Metrics

Readiness = Callable[[], Awaitable[tuple[bool, dict[str, Any]]]]


def health(readiness: Readiness) -> list[HTTPRouteHandler]:
    """Returns the routes `/health/live` and `/health/ready`, which is also `/health`. The first one always replies 200.
    The second one replies 200 if the process can do its work and 503 if it cannot, with the details of `readiness`."""

    @get("/health/live", sync_to_thread=False)
    def live() -> Response[bytes]:
        return Response(b'{"status":"live"}', media_type=MediaType.JSON)

    @get(["/health/ready", "/health"])
    async def ready() -> Response[bytes]:
        ready_now, details = await readiness()
        body = {"status": "ready" if ready_now else "not_ready", **details}
        return Response(msgspec.json.encode(body), status_code=200 if ready_now else 503, media_type=MediaType.JSON)

    return [live, ready]


def metrics_route(metrics: Metrics) -> HTTPRouteHandler:
    """Returns the route `/metrics` for Prometheus. The route needs no token, so do not expose it to clients."""

    @get("/metrics", sync_to_thread=False)
    def scrape() -> Response[bytes]:
        return Response(metrics.text(), headers={"Content-Type": metrics.content_type})

    return scrape
