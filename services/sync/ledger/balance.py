"""The figures of a balance, and how each change gets its place. Pure; see ledger.py."""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from typing import Any

from msgspec import Struct, field

PLACES = ("synced", "dead", "retrying", "journaled", "queued", "unexplained")
"""A change counts in the first of these places in which it is found."""


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class AcceptedChange(Struct, frozen=True, kw_only=True):
    """An accepted change, as its event or its journal entry describes it."""

    change_id: str
    restaurant_id: str
    """Empty if the event has no valid restaurant id."""
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
    """A change that is in none of the places where it could be."""

    change_id: str
    restaurant_id: str
    subject: str
    version: int
    lane: str
    accepted_at: datetime | None
    trace_id: str | None
    seen_in: str
    successor: str | None = None
    """A change in PostgreSQL with this one as its base. It carries the whole state, so that nothing is lost but a
    step."""


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
    """The counts cover all restaurants."""

    since: datetime | None
    """The moment from which changes count; None is the beginning of the log."""
    until: datetime | None
    """Time of the last heartbeat that came out of every lane. Only changes accepted before it can be unexplained."""
    epoch: str | None
    restaurants: list[RestaurantCount]
    missing: list[Missing]
    """The unexplained changes, oldest first."""
    suspects: int
    """Changes that are missing, but not long enough to be unexplained. They count as queued."""
    dead_outcomes: dict[str, int]
    """Status (open, replaying, discarded or edited) -> number of dead changes. `in_queue`: not collected yet."""
    mirror_only: list[Missing]
    """A hint: changes that the mirror shows as pending for more than a minute and that no other source knows. They were
    not accepted, or their journal is on another host."""
    unreadable: int
    """Number of events in the log without a valid change id."""
    journals: dict[str, int]
    """Name of each journal on this host -> number of its entries."""
    away: list[str]
    """Sources that could not be asked: management, mirror, or the name of a journal."""
    restarted: bool
    """The log was created again while it was read; only what came later is counted."""


class Placement(Struct):
    """Changes by place, while a balance is taken."""

    places: dict[str, list[AcceptedChange]] = field(default_factory=lambda: {place: [] for place in PLACES})
    suspects: list[AcceptedChange] = field(default_factory=list)


def classify_missing(
    placement: Placement,
    waiting: Mapping[tuple[str, str], int],
    missing_for: Mapping[str, float],
    cleared: Container[str],
    timeout_seconds: float,
) -> int:
    """Places the suspects. Returns how many were not missing for long enough and count as queued.

    `waiting`: (place, lane) -> number of messages in queues of that place whose ids are not known. They are taken to be
    the newest suspects, which are the most likely ones. `missing_for`: change id -> seconds. `cleared`: suspects that
    their lane cannot hold any more."""
    left = dict(waiting)
    undecided = 0
    for one in sorted(placement.suspects, key=_newest_first, reverse=True):
        place = next((place for place in ("retrying", "dead") if left.get((place, one.lane), 0) > 0), None)
        if place is not None:
            left[place, one.lane] -= 1
            placement.places[place].append(one)
        elif missing_for[one.change_id] < timeout_seconds:
            undecided += 1
            placement.places["queued"].append(one)
        else:
            placement.places["unexplained" if one.change_id in cleared else "queued"].append(one)
    return undecided


def is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _newest_first(one: AcceptedChange) -> tuple[float, str]:
    return (one.accepted_at.timestamp() if one.accepted_at else 0.0, one.change_id)


def counted(
    synced: Counter[str], places: Mapping[str, Iterable[AcceptedChange]], slugs: Mapping[str, str]
) -> tuple[Count, list[RestaurantCount]]:
    """Returns (counts of all restaurants, counts by restaurant)."""
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
