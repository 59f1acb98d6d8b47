"""The cursor of a list: an opaque text with the time and id of the last entry of the previous page."""

import base64
import binascii
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from shared.entities.contract import in_range
from shared.errors import InvalidInput

T = TypeVar("T")


def page_of(
    found: Sequence[T], limit: int, place: Callable[[T], tuple[datetime, str]], *, more: bool = False
) -> tuple[Sequence[T], dict[str, Any]]:
    """Returns (page, its `pagination`). `found`: up to `limit` + 1 entries; the additional one shows that there is a
    next page. `place`: returns the time and id by which the entries are sorted. `more`: there is a next page even if
    `found` has not more than `limit` entries."""
    page = found[:limit]
    more = more or len(found) > limit
    return page, {"limit": limit, "next_cursor": cursor_after(*place(page[-1])) if more else None}


def cursor_after(at: datetime, id_: str) -> str:
    return base64.urlsafe_b64encode(f"{at.isoformat()} {id_}".encode()).decode().rstrip("=")


def read_cursor(text: str) -> tuple[datetime, str]:
    """Returns (time, id) from a cursor. Raises InvalidInput."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
        at, _, id_ = raw.partition(" ")
        return _aware(at), str(UUID(id_))
    except (binascii.Error, ValueError, TypeError) as error:
        raise InvalidInput("the cursor is not one of this API", field="cursor", code="invalid_cursor") from error


def _aware(text: str) -> datetime:
    at = msgspec.convert(text, datetime, strict=False)
    if at.tzinfo is None or not in_range(at):
        raise ValueError("not a time between 1970 and 2200 with a zone")
    return at
