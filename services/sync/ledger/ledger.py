"""Takes the balance of all changes: compares the ids of the accepted changes with the ids in each place.

    accepted = synced + queued + retrying + journaled + dead + unexplained

    accepted    in the change log (changes.log.v1) since a moment, or in a journal on this host
    synced      in `changes`
    dead        has a dead letter, also a discarded or edited one; plus the number of messages in dead-letter queues
    retrying    in `retries`; plus the number of messages in retry queues that are not in `retries`
    journaled   in a journal
    queued      in none of these, and its lane may still hold it
    unexplained in none of these, and its lane cannot hold it any more

A change that is in two places counts once, in the first of them in the order of balance.PLACES.

A lane cannot hold a change any more if a heartbeat that follows the change in the log has come out of the lane, and if
the lane is empty or that heartbeat came out longer ago than a consumer may hold a message. A missing change is then
searched again until it has been missing for `timeout_seconds`, because the depths of the management API are seconds
old, and because the change may be committed just after PostgreSQL was asked. Under load the ledger therefore reports
late rather than falsely.

`Ledger` continues to read the log, so that each further balance reads only the new changes, and never asks PostgreSQL
again for a change that it has found there. `take_balance` takes one balance. While PostgreSQL or RabbitMQ is
unavailable, both raise Unavailable.
"""

import asyncio
import time
from datetime import datetime, timedelta

import structlog

from services.sync.ledger import sources
from services.sync.ledger.accepted_log import AcceptedLog
from services.sync.ledger.balance import (
    PLACES,
    AcceptedChange,
    Balance,
    Missing,
    Placement,
    classify_missing,
    counted,
    missing_of,
)
from services.sync.ledger.sources import Depths, Journals
from shared.entities.contract import Lane
from shared.errors import Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

MISSING_TIMEOUT_SECONDS = 12.0
"""After this time a missing change is unexplained. It is longer than ten seconds, the maximum age of the figures of the
management API."""
BLIND_TIMEOUT_SECONDS = 30.0
"""The same time without the management API. It is longer, because the messages that consumers hold are not counted."""
_SEARCH_INTERVAL_SECONDS = 0.5


async def take_balance(
    settings: Settings,
    ops: Postgres,
    mirror: Mirror | None = None,
    *,
    since: datetime | None = None,
    timeout_seconds: float | None = None,
) -> Balance:
    """Takes one balance, with the arguments of `Ledger`. If changes are missing, searches until they are found or
    unexplained. Raises Unavailable."""
    async with Ledger(settings, ops, mirror, since=since, timeout_seconds=timeout_seconds) as ledger:
        while True:
            balance = await ledger.balance()
            if not balance.suspects:
                return balance
            await asyncio.sleep(_SEARCH_INTERVAL_SECONDS)


class Ledger:
    def __init__(
        self,
        settings: Settings,
        ops: Postgres,
        mirror: Mirror | None = None,
        *,
        since: datetime | None = None,
        timeout_seconds: float | None = None,
        accepted_log: AcceptedLog | None = None,
    ) -> None:
        """`ops`: a pool of the ops role. `since`: the moment from which changes count; None is the beginning of the
        log. `mirror`: if given, the balance also lists changes that only the mirror shows. `timeout_seconds`: how long
        a change is missing before it counts as unexplained; default MISSING_TIMEOUT_SECONDS, or BLIND_TIMEOUT_SECONDS
        while the management API is unavailable. `accepted_log`: reads the change log; by default one of its own, from
        `since` on."""
        self._settings = settings
        self._ops = ops
        self._mirror = mirror
        self._since = since
        self._timeout_seconds = timeout_seconds
        self._log = accepted_log or AcceptedLog(settings, ops, since)
        self._missing: dict[str, float] = {}
        """Change id of each suspect -> when it was first missing, on the monotonic clock."""
        self._cleared: set[str] = set()
        """The suspects that their lane cannot hold any more."""

    async def __aenter__(self) -> "Ledger":
        self._log.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._log.stop()

    async def balance(self) -> Balance:
        """Takes a balance now. Raises Unavailable."""
        try:
            return await self._balance()
        except UNAVAILABLE as error:
            raise Unavailable("the ledger needs PostgreSQL, which is unavailable", retry_after=2.0) from error

    async def _balance(self) -> Balance:
        # The places are read in the order in which a change passes them, so that a change that moves meanwhile is found
        # in a later place: journals drain into the log and the lanes, and a message leaves its queue after its commit.
        journals = await asyncio.to_thread(sources.journals, self._settings.journal_folder)
        await self._log.read_to_the_end()
        heartbeats = await sources.heartbeats(self._ops)
        depths = await sources.depths(self._settings, self._ops)
        known = list(self._log.open.values())
        await self._log.settle(known)
        synced = self._log.synced.copy()
        unsettled = [change for change in known if change.change_id in self._log.open]
        only_journaled = [
            change
            for change_id, change in {**journals.damaged, **journals.waiting}.items()
            if not self._log.has(change_id)
        ]
        found = await sources.synced(self._ops, only_journaled)
        synced.update(change.restaurant_id for change in only_journaled if change.change_id in found)
        unsettled += [change for change in only_journaled if change.change_id not in found]

        placement, outcomes = await self._sort(unsettled, journals, heartbeats)
        at = time.monotonic()
        self._missing = {change.change_id: self._missing.get(change.change_id, at) for change in placement.suspects}
        self._cleared.intersection_update(self._missing)
        self._cleared.update(
            change.change_id for change in placement.suspects if self._left_its_lane(change, heartbeats, depths)
        )
        missing_for = {change_id: at - since for change_id, since in self._missing.items()}
        timeout_seconds = BLIND_TIMEOUT_SECONDS if "management" in depths.unavailable else MISSING_TIMEOUT_SECONDS
        if self._timeout_seconds is not None:
            timeout_seconds = self._timeout_seconds
        counted_dead = len(placement.places["dead"])
        undecided = classify_missing(placement, depths.unknown, missing_for, self._cleared, timeout_seconds)
        if in_queue := len(placement.places["dead"]) - counted_dead:
            outcomes["in_queue"] = in_queue
        total, restaurants = counted(synced, placement.places, await sources.slugs(self._ops))
        lost = placement.places["unexplained"]
        successors = await sources.successors(self._ops, lost)
        hints, unavailable = await self._hints()
        last_heartbeats = [heartbeats[lane.value] for lane in Lane if lane.value in heartbeats]
        return Balance(
            **{name: getattr(total, name) for name in ("accepted", *PLACES)},
            since=self._since,
            until=min(last_heartbeats) if len(last_heartbeats) == len(Lane) else None,
            restaurants=restaurants,
            missing=[missing_of(change, successors.get(change.change_id)) for change in reversed(lost)],
            suspects=undecided,
            dead_outcomes=outcomes,
            mirror_only=hints,
            unreadable=self._log.unreadable,
            journals=journals.depths,
            unavailable=[*depths.unavailable, *journals.unreadable, *unavailable],
            restarted=self._log.restarted,
        )

    async def _sort(
        self, unsettled: list[AcceptedChange], journals: Journals, heartbeats: dict[str, datetime]
    ) -> tuple[Placement, dict[str, int]]:
        """Sorts the changes that are not in PostgreSQL. Returns (changes by place, number of dead changes by
        status)."""
        dead = await sources.dead(self._ops, unsettled)
        retrying = await sources.retrying(self._ops, unsettled)
        placement = Placement()
        outcomes: dict[str, int] = {}
        for change in unsettled:
            if (outcome := dead.get(change.change_id)) is not None:
                placement.places["dead"].append(change)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            elif change.change_id in retrying:
                placement.places["retrying"].append(change)
            elif change.change_id in journals.waiting:
                placement.places["journaled"].append(change)
            elif change.seen_in == "log" and self._heartbeat_age(change, heartbeats) is None:
                placement.places["queued"].append(change)
            else:
                placement.suspects.append(change)
        return placement, outcomes

    def _heartbeat_age(self, change: AcceptedChange, heartbeats: dict[str, datetime]) -> timedelta | None:
        """Compares the first heartbeat after the change with the last heartbeat that came out of its lane. Returns how
        much later the last one was sent; None if the first one has not come out yet."""
        first, last = self._log.next_heartbeat.get(change.change_id), heartbeats.get(change.lane)
        return last - first if first is not None and last is not None and last >= first else None

    def _left_its_lane(self, change: AcceptedChange, heartbeats: dict[str, datetime], depths: Depths) -> bool:
        age = self._heartbeat_age(change, heartbeats)
        if age is not None and age.total_seconds() > self._settings.sink_hold_seconds:
            return True
        return change.seen_in != "log" or depths.lanes.get(change.lane, 0) == 0

    async def _hints(self) -> tuple[list[Missing], list[str]]:
        """Returns (changes that only the mirror shows, sources that were unavailable)."""
        if self._mirror is None:
            return [], []
        try:
            pending = await sources.pending_in_mirror(self._mirror, self._since)
        except (MirrorUnavailable, MirrorInDoubt):
            return [], ["mirror"]
        unknown = [change for change in pending if not self._log.has(change.change_id)]
        elsewhere = {*await sources.synced(self._ops, unknown), *await sources.dead(self._ops, unknown)}
        # Read the journals again, because a change may have been accepted since they were read.
        journals = await asyncio.to_thread(sources.journals, self._settings.journal_folder)
        elsewhere |= journals.waiting.keys() | journals.damaged.keys()
        return [missing_of(change) for change in unknown if change.change_id not in elsewhere], []
