"""Writes logs as JSON lines to standard output, each with the id of its trace.

Logging never raises. On a full disk, or if the reader of a pipe is gone, lines are lost, and the next line that can be
written says how many. An error instead would break the work that only wanted to log, such as the commit of an order.
"""

import json
import logging
import os
import sys
from typing import Any

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

from shared.observability import tracing


def _add_trace(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    if (trace := tracing.current()) is not None:
        event.setdefault("trace_id", trace.trace_id)
    return event


class LossyOutput:
    """A file that loses lines instead of raising an error. Takes whole lines."""

    def __init__(self, fd: int, service: str) -> None:
        self._fd = fd
        self._service = service
        self._lost = 0

    def write(self, line: str) -> None:
        data = line.encode(errors="backslashreplace")
        if self._lost:
            lost = {"service": self._service, "level": "error", "event": "log_lines_lost", "lines": self._lost}
            # The last line before the loss may be cut short.
            data = b"\n" + json.dumps(lost).encode() + b"\n" + data
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            self._lost += 1
        else:
            self._lost = 0

    def flush(self) -> None:
        """Does nothing, because `write` has no buffer."""


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

    sys.stdout.flush()
    output: Any = LossyOutput(sys.stdout.fileno(), service)
    structlog.configure(
        processors=[*shared, add_service, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(output),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(output)
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
