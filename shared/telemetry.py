"""Logs as JSON lines on standard output, and the trace that a piece of work belongs to (W3C `traceparent`)."""

import logging
import re
import secrets
import sys
from contextvars import ContextVar

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

_TRACEPARENT = re.compile(r"^00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}$")
_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


def begin_trace(traceparent: str | None) -> str:
    """Continues the caller's trace, or begins one; returns our own traceparent, with a span id of ours."""
    found = _TRACEPARENT.match(traceparent or "")
    trace = found[1] if found and found[1] != "0" * 32 else secrets.token_hex(16)
    ours = f"00-{trace}-{secrets.token_hex(8)}-01"
    _current.set(ours)
    return ours


def traceparent() -> str | None:
    return _current.get()


def trace_id() -> str | None:
    current = _current.get()
    return current[3:35] if current else None


def _add_trace(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if trace := trace_id():
        event.setdefault("trace_id", trace)
    return event


def configure_logging(service: str, level: str = "info") -> None:
    """Once per process, in its entry point. Libraries that use `logging` come out in the same form, from warning on."""
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
