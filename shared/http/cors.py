"""Cross-origin resource sharing (CORS): pages of the configured origins may call a service."""

from typing import Any

from litestar.config.cors import CORSConfig

from shared.settings import Settings


def cors(settings: Settings) -> CORSConfig | None:
    """Returns the configuration of CORS, or None if the setting `cors_origins` is empty. With None, pages of other
    origins cannot call the service."""
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


class OtherOrigins:
    """ASGI middleware around the application. It hides the origin of a page that may not call from preflight requests,
    so that the answer is the same as without configured origins: 204 without a permission, and not 400. Other requests
    keep their origin, because event streams check it."""

    def __init__(self, app: Any, config: CORSConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            scope["headers"] = [header for header in scope["headers"] if not self._is_other(header)]
        await self._app(scope, receive, send)

    def _is_other(self, header: tuple[bytes, bytes]) -> bool:
        name, value = header
        return name == b"origin" and not self._config.is_origin_allowed(value.decode("latin-1"))
