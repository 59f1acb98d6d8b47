"""Cross-origin resource sharing (CORS): pages of the configured origins may call a service."""

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
