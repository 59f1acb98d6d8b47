"""Takes the balance of all changes: what was accepted, and where each change is now, by sets of change ids.

    accepted = synced + queued + retrying + journaled + dead + unexplained

    accepted    in the change log (changes.log.v1) since a moment, or in a journal on this host
    synced      in `changes`
    dead        has a dead letter, also a discarded or edited one; plus the number of messages in dead-letter queues
    retrying    in `retries`; plus the number of messages in retry queues that are not in `retries`
    journaled   in a journal
    queued      in none of these, and its lane may still hold it
    unexplained in none of these, and its lane cannot hold it any more

A change that is in two places counts once, in the place that is furthest (balance.PLACES).

When can a lane not hold a change any more? A later heartbeat of the change log has come out of the lane, and the lane
was empty since; or that heartbeat came out longer ago than a consumer may hold a message. A change that is missing then
is searched again until it was missing for `timeout_seconds`: the depths of the management API are seconds old, and a
change that was not committed when PostgreSQL was asked may be committed by now. Under load the ledger is therefore late
rather than wrong.

`Ledger` continues to read the log, so that watching costs only what is new, and asks PostgreSQL for no change twice.
`take_balance` takes one balance. While PostgreSQL or RabbitMQ is unavailable both raise Unavailable.
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
from services.sync.ledger.store import LastHeartbeat
from shared.entities.contract import Lane
from shared.errors import Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import UNAVAILABLE, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

MISSING_TIMEOUT_SECONDS = 12.0
"""The figures of the management API are up to ten seconds old."""
BLIND_TIMEOUT_SECONDS = 30.0
"""Without the management API the messages that consumers hold are not known."""
_SEARCH_INTERVAL_SECONDS = 0.5


async def take_balance(
    settings: Settings,
    ops: Postgres,
    mirror: Mirror | None = None,
    *,
    since: datetime | None = None,
    timeout_seconds: float | None = None,
) -> Balance:
    """Takes one balance, with the arguments of `Ledger`. Takes longer only if something is missing. Raises
    Unavailable."""
    async with Ledger(settings, ops, mirror, since=since, timeout_seconds=timeout_seconds) as ledger:
        while True:
            balance = await ledger.look()
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
    ) -> None:
        """`ops`: pool of the ops role. `since`: None is the beginning of the log. `mirror`: to find changes that only
        the mirror shows. `timeout_seconds`: how long a change is missing before it counts as unexplained; default
        MISSING_TIMEOUT_SECONDS, or BLIND_TIMEOUT_SECONDS while the management API is unavailable."""
        self._settings = settings
        self._ops = ops
        self._mirror = mirror
        self._since = since
        self._timeout_seconds = timeout_seconds
        self._log = AcceptedLog(settings, ops, since)
        self._missing: dict[str, float] = {}
        """Change id of each suspect -> when it was first missing, on the monotonic clock."""
        self._cleared: set[str] = set()
        """Suspects that their lane cannot hold any more."""

    async def __aenter__(self) -> "Ledger":
        self._log.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._log.stop()

    async def look(self) -> Balance:
        """Takes a balance now. Raises Unavailable."""
        try:
            return await self._look()
        except UNAVAILABLE as error:
            raise Unavailable("the ledger needs PostgreSQL", retry_after=2.0) from error

    async def _look(self) -> Balance:
        # The order follows the way of a change, so that one that moves meanwhile is found in a later place: journals
        # drain into the log and the lanes, and a message leaves its queue after its commit.
        journals = await asyncio.to_thread(sources.journals, self._settings.journal_folder)
        await self._log.read_to_the_end()
        heartbeats = await sources.heartbeats(self._ops)
        depths = await sources.depths(self._settings, self._ops)
        known = list(self._log.open.values())
        await self._log.settle(known)
        synced = self._log.synced.copy()
        unsettled = [one for one in known if one.change_id in self._log.open]
        alone = [
            one for change_id, one in {**journals.damaged, **journals.waiting}.items() if not self._log.has(change_id)
        ]
        found = await sources.synced(self._ops, alone)
        synced.update(one.restaurant_id for one in alone if one.change_id in found)
        unsettled += [one for one in alone if one.change_id not in found]

        placement, outcomes = await self._sort(unsettled, journals, heartbeats)
        at = time.monotonic()
        self._missing = {one.change_id: self._missing.get(one.change_id, at) for one in placement.suspects}
        self._cleared.intersection_update(self._missing)
        self._cleared.update(
            one.change_id for one in placement.suspects if self._left_its_lane(one, heartbeats, depths)
        )
        missing_for = {change_id: at - since for change_id, since in self._missing.items()}
        timeout_seconds = BLIND_TIMEOUT_SECONDS if "management" in depths.away else MISSING_TIMEOUT_SECONDS
        if self._timeout_seconds is not None:
            timeout_seconds = self._timeout_seconds
        counted_dead = len(placement.places["dead"])
        undecided = classify_missing(placement, depths.unknown, missing_for, self._cleared, timeout_seconds)
        if in_queue := len(placement.places["dead"]) - counted_dead:
            outcomes["in_queue"] = in_queue
        total, restaurants = counted(synced, placement.places, await sources.slugs(self._ops))
        lost = placement.places["unexplained"]
        successors = await sources.successors(self._ops, lost)
        hints, away = await self._hints()
        noted = [heartbeats[lane.value].sent_at for lane in Lane if lane.value in heartbeats]
        return Balance(
            **{name: getattr(total, name) for name in ("accepted", *PLACES)},
            since=self._since,
            until=min(noted) if len(noted) == len(Lane) else None,
            epoch=self._log.epoch,
            restaurants=restaurants,
            missing=[missing_of(one, successors.get(one.change_id)) for one in reversed(lost)],
            suspects=undecided,
            dead_outcomes=outcomes,
            mirror_only=hints,
            unreadable=self._log.unreadable,
            journals=journals.depths,
            away=[*depths.away, *journals.unread, *away],
            restarted=self._log.restarted,
        )

    async def _sort(
        self, unsettled: list[AcceptedChange], journals: Journals, heartbeats: dict[str, LastHeartbeat]
    ) -> tuple[Placement, dict[str, int]]:
        """Returns (changes by place, number of dead letters by status)."""
        dead = await sources.dead(self._ops, unsettled)
        retrying = await sources.retrying(self._ops, unsettled)
        placement = Placement()
        outcomes: dict[str, int] = {}
        for one in unsettled:
            if (outcome := dead.get(one.change_id)) is not None:
                placement.places["dead"].append(one)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            elif one.change_id in retrying:
                placement.places["retrying"].append(one)
            elif one.change_id in journals.waiting:
                placement.places["journaled"].append(one)
            elif one.seen_in == "log" and self._heartbeat_age(one, heartbeats) is None:
                placement.places["queued"].append(one)
            else:
                placement.suspects.append(one)
        return placement, outcomes

    def _heartbeat_age(self, one: AcceptedChange, heartbeats: dict[str, LastHeartbeat]) -> timedelta | None:
        """Returns how much later than its next heartbeat the last one that came out of its lane was sent; None if none
        came."""
        behind, noted = self._log.after_heartbeat.get(one.change_id), heartbeats.get(one.lane)
        return noted.sent_at - behind if behind is not None and noted is not None and noted.sent_at >= behind else None

    def _left_its_lane(self, one: AcceptedChange, heartbeats: dict[str, LastHeartbeat], depths: Depths) -> bool:
        heartbeat_for = self._heartbeat_age(one, heartbeats)
        if heartbeat_for is not None and heartbeat_for.total_seconds() > self._settings.sink_hold_seconds:
            return True
        return one.seen_in != "log" or depths.lanes.get(one.lane, 0) == 0

    async def _hints(self) -> tuple[list[Missing], list[str]]:
        """Returns (changes that only the mirror shows, sources that could not be asked)."""
        if self._mirror is None:
            return [], []
        try:
            pending = await sources.pending_in_mirror(self._mirror, self._since)
        except (MirrorUnavailable, MirrorInDoubt):
            return [], ["mirror"]
        unknown = [one for one in pending if not self._log.has(one.change_id)]
        elsewhere = {*await sources.synced(self._ops, unknown), *await sources.dead(self._ops, unknown)}
        # Read again: a change may have been accepted since the journals were read.
        journals = await asyncio.to_thread(sources.journals, self._settings.journal_folder)
        elsewhere |= journals.waiting.keys() | journals.damaged.keys()
        return [missing_of(one) for one in unknown if one.change_id not in elsewhere], []
