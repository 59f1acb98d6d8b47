"""Order numbers: a change gets the next number of its series. Each restaurant and business day has a series.

`order_number.lua`, a part of the claim script, takes the next number of the series from a counter in the mirror, such
as "0042", or "A0043" after a mirror was lost (shared/mirror/identity.py). Without a warm mirror, `InstanceNumbers`
gives a number of the instance's own series: "J1-0007".
"""

import asyncio
from typing import Any

import msgspec
from msgspec import Raw

from shared.entities.contract import Change, ChangeData, encode
from shared.entities.entity import Entity
from shared.entities.overlay import field_of, with_field
from shared.errors import Unavailable
from shared.rail.journal import NUMBER_BLOCK_SIZE, Journal, JournalBroken

_MAX_SERIES = 10_000


class InstanceNumbers:
    """Order numbers of this instance's own series, for creations without a claim. The journal reserves them on disk in
    blocks, so that no number is given twice, even after a crash."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._given: dict[tuple[str, str], tuple[str, int, int]] = {}  # series, last given and last reserved number
        self._lock = asyncio.Lock()

    async def next(self, restaurant: str, day: str) -> str:
        """Returns the next number of a business day, such as `J1-0007`. Raises Unavailable without an open journal."""
        if self._journal is None:
            raise Unavailable("no order number is available without the mirror or a journal")
        async with self._lock:
            series, last, reserved = self._given.get((restaurant, day), ("", 0, 0))
            if last == reserved:
                try:
                    series, reserved = await self._journal.reserve_numbers(restaurant, day)
                except JournalBroken as error:
                    raise Unavailable("no order number is available without the mirror or the journal") from error
                last = reserved - NUMBER_BLOCK_SIZE
                if len(self._given) > _MAX_SERIES:
                    # Most series belong to past business days. A series that is used again gets a new block.
                    self._given.clear()
            self._given[restaurant, day] = (series, last + 1, reserved)
        return f"{series}-{last + 1:04d}"


def series_of(entity: Entity, state: Any) -> str | None:
    """Returns the business day whose series must give the state a number. Returns None if the state has a number or
    needs none."""
    numbering = entity.numbering
    return numbering.business_day(state) if numbering and not numbering.number(state) else None


def with_number(entity: Entity, change: Change, state: Any, number: str) -> tuple[Change, Any]:
    """Returns the change and the state with the number that the claim gave. The change keeps the id that it had before
    the claim. Its encoding equals that of `with_number_in_event`."""
    if not number or entity.numbering is None:
        return change, state
    after = with_field(bytes(change.data.after), entity.numbering.field, encode(number))
    data = ChangeData(after=Raw(after), before=change.data.before)
    return msgspec.structs.replace(change, data=data), entity.numbering.with_number(state, number)


def with_number_in_event(entity: Entity, event: bytes, number: str) -> bytes:
    """Returns an encoded change with the number that its claim gave. Everything else is kept as it is: a change id has
    one content, whichever release finishes the claim."""
    if not number or entity.numbering is None:
        return event
    data = field_of(event, "data")
    after = with_field(field_of(data, "after"), entity.numbering.field, encode(number))
    return with_field(event, "data", with_field(data, "after", after))


def number_in(entity: Entity, encoded: bytes) -> str:
    """Returns the number in an encoded state. The number is empty for an entity without numbers."""
    state = entity.decode_state(encoded)
    return entity.numbering.number(state) if entity.numbering else ""
