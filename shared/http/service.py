"""Creates the application of each service in the same way."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

from litestar import Litestar, Response, route
from litestar.datastructures import State
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler

from shared.http.api_docs import pages
from shared.http.api_key_verifier import ApiKeyVerifier
from shared.http.authorization import ACTION, authorization
from shared.http.bodies import MAX_BODY_BYTES
from shared.http.call import Call
from shared.http.cors import OtherOrigins, cors
from shared.http.error_replies import EXCEPTION_HANDLERS
from shared.http.health import Readiness, health, metrics_route
from shared.http.jwks import jwks_route
from shared.http.limits import Limits
from shared.http.methods import allowed_methods
from shared.http.open_bodies import OpenBodies
from shared.http.openapi import Api
from shared.http.request_log import RequestLog
from shared.http.response_headers import ResponseHeaders
from shared.mirror.mirror import Mirror
from shared.observability.logs import LossyOutput, configure_logging
from shared.observability.metrics import HttpMetrics, Metrics
from shared.observability.tracing import Tracer
from shared.security.permissions import PUBLIC
from shared.security.tokens import Tokens
from shared.settings import Settings

Lifespan = Callable[[Litestar], AbstractAsyncContextManager[None]]


def settings_of_service(name: str, settings: Settings | None) -> Settings:
    """Reads the settings, unless a test passes them, and configures the log. Every service calls this first."""
    settings = settings or Settings.load()
    configure_logging(name, settings.log_level)
    return settings


def create_service(
    name: str,
    settings: Settings,
    api: Api,
    *,
    state: Mapping[str, Any],
    readiness: Readiness,
    lifespan: Lifespan,
    tokens: Tokens,
    api_keys: ApiKeyVerifier,
    tracer: Tracer,
    metrics: Metrics,
    limits_mirror: Mirror | None,
) -> ResponseHeaders:
    """Returns an application with the routes of `api`, their documentation, health and metrics.

    `name`: the name of the service in the request log. `state`: the objects that handlers find in `request.app.state`,
    by name. `limits_mirror`: the mirror through which instances share the rate limits. With None, each instance applies
    the limits alone.
    """
    open_bodies = OpenBodies(settings)
    metrics.watch("ticketrail_open_bodies", lambda: len(open_bodies))
    handlers = [*api.handlers, *health(readiness), metrics_route(metrics), jwks_route(tokens), *pages(api)]
    origins = cors(settings)
    app: Any = Litestar(
        route_handlers=[*_options(handlers), *handlers],
        state=State(dict(state)),
        middleware=[
            authorization(
                tokens,
                tracer,
                HttpMetrics(metrics),
                open_bodies,
                Limits(limits_mirror, settings),
                proxies=settings.trusted_proxies,
                api_keys=api_keys,
            )
        ],
        cors_config=origins,
        exception_handlers=EXCEPTION_HANDLERS,
        request_class=Call,
        lifespan=[lifespan],
        request_max_body_size=MAX_BODY_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    if origins is not None:
        app = OtherOrigins(app, origins)
    return ResponseHeaders(app, RequestLog(settings.request_log_level, name, LossyOutput(sys.stdout.fileno(), name)))


def create_health_service(readiness: Readiness, metrics: Metrics, lifespan: Lifespan) -> ResponseHeaders:
    """Returns an application for a process without an API. It has only health and metrics."""
    handlers = [*health(readiness), metrics_route(metrics)]
    app = Litestar(
        route_handlers=[*_options(handlers), *handlers],
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=[lifespan],
        openapi_config=None,
        logging_config=None,
    )
    return ResponseHeaders(app)


def _options(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """Returns one OPTIONS handler for each path. They must stand before `handlers`. If several handlers share a path,
    Litestar's own OPTIONS handler names the methods of only one of them."""
    methods: dict[str, set[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, set()).update(handler.http_methods)
    return [_options_of(path, allowed_methods(found)) for path, found in methods.items()]


def _options_of(path: str, allowed: str) -> HTTPRouteHandler:
    # A browser sends no token with its question whether a page may call the path.
    @route(path, http_method=HttpMethod.OPTIONS, status_code=204, sync_to_thread=False, opt={ACTION: PUBLIC})
    def answer() -> Response[None]:
        return Response(None, status_code=204, headers={"Allow": allowed})

    return answer
