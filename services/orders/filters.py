"""What a list of orders is asked for, and its cursor: an opaque text that names the last order of the page before."""

import base64
import binascii
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec
from msgspec import Struct

from shared.entities.order import Order, Status
from shared.errors import InvalidInput

DEFAULT_LIMIT = 50
MAX_LIMIT = 200
_KNOWN = {"status", "created_from", "created_to", "table_id", "limit", "cursor"}


class Filters(Struct, frozen=True, kw_only=True):
    status: Status | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    table_id: str | None = None
    session: str | None = None
    """Customers see the orders of their own session alone."""
    before: tuple[datetime, str] | None = None
    limit: int = DEFAULT_LIMIT

    def match(self, order: Order) -> bool:
        return (
            order.deleted_at is None
            and self.status in (None, order.status)
            and self.table_id in (None, order.table_id)
            and self.session in (None, order.customer_session_id)
            and (self.created_from is None or order.created_at >= self.created_from)
            and (self.created_to is None or order.created_at <= self.created_to)
            and (self.before is None or (order.created_at, order.id) < self.before)
        )

    def for_sql(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__struct_fields__ if name != "limit"}
        return {name: value.value if isinstance(value, Status) else value for name, value in found.items()}


def read_filters(query: dict[str, Any], *, session: str | None) -> Filters:
    """Raises InvalidInput that names the parameter."""
    for name in query:
        if name not in _KNOWN:
            raise InvalidInput(f"unknown parameter; known are {', '.join(sorted(_KNOWN))}", field=name)
    limit = DEFAULT_LIMIT
    if (text := query.get("limit")) is not None:
        if not (len(text) <= 3 and text.isascii() and text.isdecimal() and 1 <= int(text) <= MAX_LIMIT):
            raise InvalidInput(f"a whole number from 1 to {MAX_LIMIT}", field="limit")
        limit = int(text)
    status = None
    if (text := query.get("status")) is not None:
        try:
            status = Status(text)
        except ValueError as error:
            raise InvalidInput(f"one of {', '.join(Status)}", field="status") from error
    return Filters(
        status=status,
        created_from=_time(query, "created_from"),
        created_to=_time(query, "created_to"),
        table_id=_uuid(query, "table_id"),
        session=session,
        before=read_cursor(query["cursor"]) if "cursor" in query else None,
        limit=limit,
    )


def cursor_after(order: Order) -> str:
    text = f"{order.created_at.isoformat()} {order.id}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(text: str) -> tuple[datetime, str]:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
        at, _, id_ = raw.partition(" ")
        return _aware(at), str(UUID(id_))
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidInput("not a cursor that this API has given", field="cursor", code="invalid_cursor") from error


def _aware(text: str) -> datetime:
    at = msgspec.convert(text, datetime, strict=False)
    if at.tzinfo is None or not 1970 <= at.year < 2200:
        raise ValueError("a time with its zone, between 1970 and 2200")
    return at


def _time(query: dict[str, Any], name: str) -> datetime | None:
    if (text := query.get(name)) is None:
        return None
    try:
        # A "+" that was not escaped arrives as a space.
        return _aware(text.replace(" ", "+"))
    except (ValueError, AttributeError) as error:
        raise InvalidInput("a time with its zone, such as 2026-03-01T12:00:00Z", field=name) from error


def _uuid(query: dict[str, Any], name: str) -> str | None:
    if (text := query.get(name)) is None:
        return None
    try:
        return str(UUID(text))
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidInput("a UUID", field=name) from error
