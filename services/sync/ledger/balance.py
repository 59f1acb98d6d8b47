"""The figures of a balance, and the rule for changes that no store has. Pure. `Ledger` in ledger.py reads the stores
and gives each change its place."""

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
    """The restaurant; empty if the event has no valid restaurant id."""
    subject: str
    version: int
    lane: str
    accepted_at: datetime | None
    trace_id: str | None
    seen_in: str
    """The place where the ledger found the change: `log`, `mirror`, or the name of a journal."""

    @property
    def key(self) -> tuple[str, str]:
        return (self.restaurant_id, self.change_id)


class Missing(Struct, frozen=True, kw_only=True):
    """A change that is in no place where the ledger can find it."""

    change_id: str
    restaurant_id: str
    subject: str
    version: int
    lane: str
    accepted_at: datetime | None
    trace_id: str | None
    seen_in: str
    successor: str | None = None
    """A change in PostgreSQL that has the missing change as its base. It carries the whole state, so only the history
    lacks a version."""


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
    """The result of the ledger. The counts cover all restaurants."""

    since: datetime | None
    """The moment from which changes count; None is the beginning of the log."""
    until: datetime | None
    """The sending time of the newest heartbeat that has come out of every lane; None if a lane had no heartbeat. Only
    changes that were accepted before it can be unexplained."""
    restaurants: list[RestaurantCount]
    missing: list[Missing]
    """The unexplained changes, oldest first."""
    suspects: int
    """The number of changes that are missing, but not for long enough to be unexplained. They count as queued."""
    dead_outcomes: dict[str, int]
    """Status -> number of dead changes. The status is that of the dead letter (open, replaying, discarded or edited),
    or `in_queue` if the collector has not stored it yet."""
    mirror_only: list[Missing]
    """Changes that the mirror shows as pending for more than a minute and that no other source has. This is only a
    hint: either they were not accepted, or their journal is on another host."""
    unreadable: int
    """The number of events in the log without a valid change id."""
    journals: dict[str, int]
    """Name of each journal on this host -> number of its entries."""
    unavailable: list[str]
    """The sources that were unavailable: management, rabbitmq, postgres, mirror, or the name of a journal."""
    restarted: bool
    """True if the log lost its end, or was created again, during the balance. The counts then cover only the changes
    that the log still has."""


class Placement(Struct):
    """The changes by place, while the ledger takes a balance."""

    places: dict[str, list[AcceptedChange]] = field(default_factory=lambda: {place: [] for place in PLACES})
    suspects: list[AcceptedChange] = field(default_factory=list)


def classify_missing(
    placement: Placement,
    waiting: Mapping[tuple[str, str], int],
    missing_for: Mapping[str, float],
    cleared: Container[str],
    timeout_seconds: float,
) -> int:
    """Gives each suspect a place. Returns the number of suspects that are not missing for long enough; they count as
    queued.

    `waiting`: (place, lane) -> number of messages in queues of that place whose ids are not known. The rule assumes
    that these are the newest suspects. `missing_for`: change id -> seconds. `cleared`: the suspects that their lane
    cannot hold any more."""
    left = dict(waiting)
    undecided = 0
    for change in sorted(placement.suspects, key=_newest_first, reverse=True):
        place = next((place for place in ("retrying", "dead") if left.get((place, change.lane), 0) > 0), None)
        if place is not None:
            left[place, change.lane] -= 1
            placement.places[place].append(change)
        elif missing_for[change.change_id] < timeout_seconds:
            undecided += 1
            placement.places["queued"].append(change)
        else:
            placement.places["unexplained" if change.change_id in cleared else "queued"].append(change)
    return undecided


def is_id(value: Any) -> bool:
    return isinstance(value, str) and _ID.fullmatch(value) is not None


def _newest_first(change: AcceptedChange) -> tuple[float, str]:
    return (change.accepted_at.timestamp() if change.accepted_at else 0.0, change.change_id)


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
        for change in entries:
            add(change.restaurant_id, place)
    return total, sorted(each.values(), key=lambda count: (count.slug, count.restaurant_id))


def missing_of(change: AcceptedChange, successor: str | None = None) -> Missing:
    return Missing(
        change_id=change.change_id,
        restaurant_id=change.restaurant_id,
        subject=change.subject,
        version=change.version,
        lane=change.lane,
        accepted_at=change.accepted_at,
        trace_id=change.trace_id,
        seen_in=change.seen_in,
        successor=successor,
    )
