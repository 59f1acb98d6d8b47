"""One balance of the ledger: what it says, and how each change comes to its place. Pure; see ledger.py."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from typing import Any

from msgspec import Struct, field

PLACES = ("synced", "dead", "retrying", "journaled", "queued", "unexplained")
"""A change counts in the first one that it is found in."""


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class AcceptedChange(Struct, frozen=True, kw_only=True):
    """An accepted change, as its event or the journal tells it."""

    change_id: str
    restaurant_id: str
    """Empty: it names none that could be one."""
    subject: str
    version: int
    lane: str
    accepted_at: datetime | None
    trace_id: str | None
    seen_in: str
    """`log`, or the name of a journal."""

    @property
    def key(self) -> tuple[str, str]:
        return (self.restaurant_id, self.change_id)


class Missing(Struct, frozen=True, kw_only=True):
    """A change that ought to be somewhere and is not."""

    change_id: str
    restaurant_id: str
    subject: str
    version: int
    lane: str
    accepted_at: datetime | None
    trace_id: str | None
    seen_in: str
    successor: str | None = None
    """The change in PostgreSQL that was built on it: what it said is not lost, for that one carries the whole state."""


class Count(Struct, kw_only=True):
    accepted: int = 0
    synced: int = 0
    queued: int = 0
    retrying: int = 0
    journaled: int = 0
    dead: int = 0
    unexplained: int = 0

    def add(self, place: str, number: int = 1) -> None:
        setattr(self, place, getattr(self, place) + number)
        self.accepted += number


class RestaurantCount(Count, kw_only=True):
    restaurant_id: str
    slug: str


class Balance(Count, kw_only=True):
    """The counts are over all restaurants."""

    since: datetime | None
    """Where it begins; None: at the beginning of the log."""
    until: datetime | None
    """The last heartbeat that has come out of every lane: what was accepted before it can be unexplained."""
    epoch: str | None
    restaurants: list[RestaurantCount]
    missing: list[Missing]
    """Those that are unexplained, the oldest first."""
    suspects: int
    """Missing too, but not for long enough to say so; they count as queued."""
    dead_outcomes: dict[str, int]
    """Of those that are dead: open, replaying, discarded, edited; in_queue: not read by the keeper yet."""
    mirror_only: list[Missing]
    """A hint: what the mirror shows as pending for more than a minute, and no other source knows. It was not accepted,
    or its journal is not on this host."""
    unreadable: int
    """Events in the log that name no change."""
    journals: dict[str, int]
    """Entries of each journal on this host."""
    away: list[str]
    """What could not be asked: management, mirror, the name of a journal."""
    restarted: bool
    """The log was made anew since this began: it begins there."""


class Placement(Struct):
    """Changes by their place, while a balance is drawn up."""

    places: dict[str, list[AcceptedChange]] = field(default_factory=lambda: {place: [] for place in PLACES})
    suspects: list[AcceptedChange] = field(default_factory=list)


def classify_missing(
    shelf: Placement,
    waiting: Mapping[tuple[str, str], int],
    missing_for: Mapping[str, float],
    cleared: Container[str],
    patience: float,
) -> int:
    """What becomes of the suspects; how many of them are not judged yet. `waiting`: (place, lane) -> how many messages
    lie in queues of that place without being known by their ids. They are taken to be the newest ones: those are most
    likely still on their way. `cleared`: those that cannot lie in their lane any more."""
    left = dict(waiting)
    unjudged = 0
    for one in sorted(shelf.suspects, key=_newest_first, reverse=True):
        place = next((place for place in ("retrying", "dead") if left.get((place, one.lane), 0) > 0), None)
        if place is not None:
            left[place, one.lane] -= 1
            shelf.places[place].append(one)
        elif missing_for[one.change_id] < patience:
            unjudged += 1
            shelf.places["queued"].append(one)
        else:
            shelf.places["unexplained" if one.change_id in cleared else "queued"].append(one)
    return unjudged


def is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _newest_first(one: AcceptedChange) -> tuple[float, str]:
    return (one.accepted_at.timestamp() if one.accepted_at else 0.0, one.change_id)


def counted(
    synced: Counter[str], places: Mapping[str, Iterable[AcceptedChange]], slugs: Mapping[str, str]
) -> tuple[Count, list[RestaurantCount]]:
    """(in all, by restaurant)"""
    total, each = Count(), dict[str, RestaurantCount]()

    def add(restaurant: str, place: str, number: int = 1) -> None:
        known = each.get(restaurant)
        if known is None:
            known = each[restaurant] = RestaurantCount(restaurant_id=restaurant, slug=slugs.get(restaurant, ""))
        known.add(place, number)
        total.add(place, number)

    for restaurant, number in synced.items():
        add(restaurant, "synced", number)
    for place, entries in places.items():
        for one in entries:
            add(one.restaurant_id, place)
    return total, sorted(each.values(), key=lambda one: (one.slug, one.restaurant_id))


def missing_of(one: AcceptedChange, successor: str | None = None) -> Missing:
    return Missing(
        change_id=one.change_id,
        restaurant_id=one.restaurant_id,
        subject=one.subject,
        version=one.version,
        lane=one.lane,
        accepted_at=one.accepted_at,
        trace_id=one.trace_id,
        seen_in=one.seen_in,
        successor=successor,
    )
