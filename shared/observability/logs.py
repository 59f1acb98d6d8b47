"""Writes logs as JSON lines to standard output, each with the id of its trace."""

import logging
import sys

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from shared.observability import tracing


def _add_trace(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if (trace := tracing.current()) is not None:
        event.setdefault("trace_id", trace.trace_id)
    return event


def configure_logging(service: str, level: str = "info") -> None:
    """Configures logging. Call it once per process, in its entry point. Warnings of libraries that use `logging` get
    the same format."""
    number = getattr(logging, level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_trace,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]

    def add_service(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {"service": service, **event}

    structlog.configure(
        processors=[*shared, add_service, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                add_service,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
