"""The ledger: what was accepted, and where each change of it is now, by sets of change ids.

    accepted = synced + queued + retrying + journaled + dead + unexplained

    accepted    the log (changes.log.v1) from a point in time on, and the journals on this host
    synced      `changes`
    dead        dead letters, also one that was discarded or edited; and what still lies in the dead queues, by number
    retrying    `retries`; and what lies on the retry queues without having been noted there, by number
    journaled   the journals
    queued      nothing of these, and its lane has not shown yet that it is through with it
    unexplained nothing of these

A change that is in two places counts once, where it is furthest (balance.PLACES).

When is a lane through with a change? A heartbeat that stands behind it in the log has come out of the lane, and since
then the lane was seen empty; or the heartbeat came out longer ago than a consumer may hold a message. What is missing
then is looked for again until it has been missing for `patience` seconds: the management API is seconds behind with its
depths, and what was not committed when PostgreSQL was asked may be committed now. So it is right while a load runs, and
late rather than wrong.

`Ledger` goes on reading the log where it stands: watching costs what has happened since, and what PostgreSQL has is not
asked for again. `draw_up` is one balance. While PostgreSQL or RabbitMQ is away there is none: Unavailable.
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

PATIENCE = 12.0
"""Seconds: the management API's figures are up to ten old."""
PATIENCE_BLIND = 30.0
"""Without it nobody tells what consumers hold."""
_LOOK_AGAIN = 0.5


async def take_balance(
    settings: Settings,
    ops: Postgres,
    mirror: Mirror | None = None,
    *,
    since: datetime | None = None,
    patience: float | None = None,
) -> Balance:
    """One balance, as `Ledger`; it takes longer than a moment only where something is missing. Raises Unavailable."""
    async with Ledger(settings, ops, mirror, since=since, patience=patience) as ledger:
        while True:
            balance = await ledger.look()
            if not balance.suspects:
                return balance
            await asyncio.sleep(_LOOK_AGAIN)


class Ledger:
    def __init__(
        self,
        settings: Settings,
        ops: Postgres,
        mirror: Mirror | None = None,
        *,
        since: datetime | None = None,
        patience: float | None = None,
    ) -> None:
        """`ops`: of the ops role. `since`: None is the beginning of the log. `mirror`: for what it alone shows.
        `patience`: PATIENCE by default, or longer where the management API does not answer."""
        self._settings = settings
        self._ops = ops
        self._mirror = mirror
        self._since = since
        self._patience = patience
        self._log = AcceptedLog(settings, ops, since)
        self._missing: dict[str, float] = {}
        """Since when each suspect has been missing, on the monotonic clock."""
        self._cleared: set[str] = set()
        """Suspects that cannot lie in their lane any more."""

    async def __aenter__(self) -> "Ledger":
        self._log.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._log.stop()

    async def look(self) -> Balance:
        """Raises Unavailable."""
        try:
            return await self._look()
        except UNAVAILABLE as error:
            raise Unavailable("the ledger needs PostgreSQL", retry_after=2.0) from error

    async def _look(self) -> Balance:
        # In this order: what moves on meanwhile is met again further on. Journals drain into the log and the lanes;
        # what has left a queue is committed.
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

        shelf, outcomes = await self._sort(unsettled, journals, heartbeats)
        at = time.monotonic()
        self._missing = {one.change_id: self._missing.get(one.change_id, at) for one in shelf.suspects}
        self._cleared.intersection_update(self._missing)
        self._cleared.update(one.change_id for one in shelf.suspects if self._clear(one, heartbeats, depths))
        missing_for = {change_id: at - since for change_id, since in self._missing.items()}
        patience = PATIENCE_BLIND if "management" in depths.away else PATIENCE
        if self._patience is not None:
            patience = self._patience
        counted_dead = len(shelf.places["dead"])
        unjudged = classify_missing(shelf, depths.unknown, missing_for, self._cleared, patience)
        if in_queue := len(shelf.places["dead"]) - counted_dead:
            outcomes["in_queue"] = in_queue
        total, restaurants = counted(synced, shelf.places, await sources.slugs(self._ops))
        lost = shelf.places["unexplained"]
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
            suspects=unjudged,
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
        """(what is where, outcomes of the dead)"""
        dead = await sources.dead(self._ops, unsettled)
        retrying = await sources.retrying(self._ops, unsettled)
        shelf = Placement()
        outcomes: dict[str, int] = {}
        for one in unsettled:
            if (outcome := dead.get(one.change_id)) is not None:
                shelf.places["dead"].append(one)
                outcomes[outcome] = outcomes.get(outcome, 0) + 1
            elif one.change_id in retrying:
                shelf.places["retrying"].append(one)
            elif one.change_id in journals.waiting:
                shelf.places["journaled"].append(one)
            elif one.seen_in == "log" and self._heartbeatd_for(one, heartbeats) is None:
                shelf.places["queued"].append(one)
            else:
                shelf.suspects.append(one)
        return shelf, outcomes

    def _heartbeatd_for(self, one: AcceptedChange, heartbeats: dict[str, LastHeartbeat]) -> timedelta | None:
        """How long ago the first heartbeat behind it came out of its lane; None: none has."""
        behind, noted = self._log.after_heartbeat.get(one.change_id), heartbeats.get(one.lane)
        return noted.sent_at - behind if behind is not None and noted is not None and noted.sent_at >= behind else None

    def _clear(self, one: AcceptedChange, heartbeats: dict[str, LastHeartbeat], depths: Depths) -> bool:
        heartbeat_for = self._heartbeatd_for(one, heartbeats)
        if heartbeat_for is not None and heartbeat_for.total_seconds() > self._settings.sink_hold_seconds:
            return True
        return one.seen_in != "log" or depths.lanes.get(one.lane, 0) == 0

    async def _hints(self) -> tuple[list[Missing], list[str]]:
        """(what only the mirror shows, what could not be asked)"""
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
