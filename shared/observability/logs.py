"""Writes logs as JSON lines to standard output, each with the id of its trace. The lines of libraries, of the HTTP
server and of the standard error output have the same format.

Logging never raises. On a full disk, or if the reader of a pipe is gone, lines are lost, and the next line that can be
written says how many. An error instead would break the work that only wanted to log, such as the commit of an order.
"""

import io
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


# Granian would give its logger handlers of another format. Its lines go to the handler of the root logger instead.
SERVER_LOGGING: dict[str, Any] = {
    "handlers": {},
    "loggers": {"_granian": {"level": "INFO", "propagate": True}},
}


class LossyOutput:
    """A file that loses lines instead of raising an error. `write` takes one or more whole lines."""

    def __init__(self, fd: int, service: str) -> None:
        self._fd = fd
        self._service = service
        self._lost = 0

    def write(self, text: str) -> None:
        lines, data = text.count("\n"), text.encode(errors="backslashreplace")
        if self._lost:
            lost = {"service": self._service, "level": "error", "event": "log_lines_lost", "lines": self._lost}
            # The last line before the loss may be cut short.
            data = b"\n" + json.dumps(lost).encode() + b"\n" + data
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            self._lost += min(lines, data.count(b"\n"))
        else:
            self._lost = 0

    def flush(self) -> None:
        """Does nothing, because `write` has no buffer."""


class JsonErrors(io.TextIOBase):
    """Stands in for the standard error output: each line of text becomes a JSON line, so that the log of a service has
    no line of another format. Python writes the traceback of an error there that nothing has caught."""

    def __init__(self, output: LossyOutput, service: str) -> None:
        self._output = output
        self._service = service
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._put(line)
        return len(text)

    def flush(self) -> None:
        """Writes the last line, which has no end of line yet."""
        rest, self._rest = self._rest, ""
        self._put(rest)

    def _put(self, line: str) -> None:
        if line.strip():
            found = {"service": self._service, "level": "error", "event": "stderr", "text": line}
            self._output.write(json.dumps(found) + "\n")


def configure_logging(service: str, level: str = "info") -> None:
    """Configures logging. Call it once per process, in its entry point. Warnings of Python and of libraries that use
    `logging` get the same format."""
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
    logging.captureWarnings(capture=True)
    if sys.stderr is sys.__stderr__:  # in a test, pytest captures it
        sys.stderr = JsonErrors(output, service)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))
