"""Refusals of commands on orders. This package does not know HTTP: the caller maps `kind` to a status."""

from enum import StrEnum
from typing import Any


class Kind(StrEnum):
    INVALID = "invalid"
    """The request breaks a rule by itself (422)."""
    FORBIDDEN = "forbidden"
    """The caller may not do it, but another role may (403)."""
    ABSENT = "absent"
    """The order or its part does not exist (404)."""
    CONFLICT = "conflict"
    """The state of the order forbids it (409)."""


class Refused(Exception):
    """A rule forbids the command. `code` is stable. `details` has values that help to correct the request, such as the
    balance. `field` names the field of the request."""

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
