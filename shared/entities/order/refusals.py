"""Why a command on an order is refused. This package knows no HTTP: the caller maps `kind` to its status."""

from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    INVALID = "invalid"
    """The request breaks a rule by itself (422)."""
    FORBIDDEN = "forbidden"
    """Somebody else may do it (403)."""
    ABSENT = "absent"
    """There is no such thing (404)."""
    CONFLICT = "conflict"
    """The state of the order forbids it (409)."""


class Refused(Exception):
    """A command that a rule forbids. `code` is stable; `details` has what the caller needs to do better, such as the
    balance; `field` names the field of the request."""

    def __init__(self, kind: Kind, code: str, message: str, *, field: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.code = code
        self.field = field
        self.details = details


def invalid(code: str, message: str, *, field: str, **details: Any) -> Refused:
    return Refused(Kind.INVALID, code, message, field=field, **details)


def conflict(code: str, message: str, *, field: str | None = None, **details: Any) -> Refused:
    return Refused(Kind.CONFLICT, code, message, field=field, **details)


def absent(code: str, message: str) -> Refused:
    return Refused(Kind.ABSENT, code, message)


def forbidden(code: str, message: str) -> Refused:
    return Refused(Kind.FORBIDDEN, code, message)
