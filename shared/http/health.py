"""What supervisors and Prometheus ask: `/health/live`, `/health/ready` and `/metrics`."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar import MediaType, Response, get
from litestar.handlers import HTTPRouteHandler

from shared.observability.metrics import Metrics

Readiness = Callable[[], Awaitable[tuple[bool, dict[str, Any]]]]


def health(readiness: Readiness) -> list[HTTPRouteHandler]:
    """`/health/live`: the process answers. `/health/ready`: 200 when it can do its work, 503 when it cannot; both
    with the details of `readiness`."""

    @get("/health/live", sync_to_thread=False)
    def live() -> Response[bytes]:
        return Response(b'{"status":"live"}', media_type=MediaType.JSON)

    @get("/health/ready")
    async def ready() -> Response[bytes]:
        ready_now, details = await readiness()
        body = {"status": "ready" if ready_now else "not_ready", **details}
        return Response(msgspec.json.encode(body), status_code=200 if ready_now else 503, media_type=MediaType.JSON)

    return [live, ready]


def metrics_route(metrics: Metrics) -> HTTPRouteHandler:
    """`/metrics` for Prometheus. It asks for no token, so do not expose it to clients."""

    @get("/metrics", sync_to_thread=False)
    def scrape() -> Response[bytes]:
        return Response(metrics.text(), headers={"Content-Type": metrics.content_type})

    return scrape
