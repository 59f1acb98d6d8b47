"""Reports of the ledger: where every accepted change is.

    accepted = synced + queued + retrying + journaled + dead + unexplained

    synced      in `changes`
    dead        has a dead letter, also a discarded or edited one
    retrying    in `retries`
    journaled   in a journal on this host
    queued      in none of these, and its lane may still hold it, or a retry or dead-letter queue does
    unexplained in none of these, and it has left its lane

A change counts once, in the first of these places. `only_in_postgres` are synced changes that the log lacks.

A report has a session of the leader's class without repairs (session.py). It begins at a checkpoint, or at the first
entry that the log has, reads log and feed to their ends, and looks up the changes that one side alone has. A checkpoint
proves that nothing before its `log_low` is open, so that each report names every open change, wherever it begins; from
the first entry on, it proves that without the leader's word.

A change that left its lane counts as unexplained after `timeout_seconds`, because a consumer may still hold it. One
that the log lacks counts after the log has been read to its end for ten seconds. The report waits for those that it
found at first. Under load it therefore reports late rather than falsely.

While PostgreSQL or RabbitMQ is unavailable, a report raises Unavailable.
"""

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import structlog

from services.sync.ledger import queues, store
from services.sync.ledger.begin import first_entry, ledger_reader, provable
from services.sync.ledger.journals import Journals, journals
from services.sync.ledger.ledger_loop import MAX_AGE_SECONDS, totals_of
from services.sync.ledger.log_changes import is_id
from services.sync.ledger.report_shapes import PLACES, LeaderState, LedgerReport, OpenChange
from services.sync.ledger.session import EndOfSession, LedgerSession, Patience
from services.sync.ledger.sides import LogOnly
from shared.entities import registry
from shared.entities.contract import now
from shared.errors import Unavailable
from shared.lifecycle import end_tasks
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.observability.tracing import trace_id_of
from shared.postgres.checkpoints import Checkpoint, last_checkpoint, list_checkpoints
from shared.postgres.feed import ForeignDatabase, PositionLost
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.settings import Settings

log = structlog.get_logger(__name__)

DEFAULT_SINCE = timedelta(hours=1)
_SEARCH_INTERVAL_SECONDS = 0.5
_READ_INTERVAL_SECONDS = 0.02
_READ_TIMEOUT_SECONDS = 20.0
_MAX_SESSIONS = 3
_MAX_NAMED = 1_000
_MIN_PENDING_AGE = timedelta(minutes=1)


async def take_report(settings: Settings, ops: Postgres, mirror: Mirror | None = None, **options: Any) -> LedgerReport:
    """Takes one report, with the options of `Ledger`. Raises Unavailable."""
    async with Ledger(settings, ops, mirror, **options) as ledger:
        return await ledger.report()


class Ledger:
    """Takes reports. A further report of the same object reads only new changes."""

    def __init__(
        self,
        settings: Settings,
        ops: Postgres,
        mirror: Mirror | None = None,
        *,
        since: datetime | None = None,
        timeout_seconds: float | None = None,
    ) -> None:
        """`ops`: a pool of the ops role. `since`: begins at the newest checkpoint that is not later, or at the first
        entry if there is none; None is the first entry. `mirror`: if given, the report also lists changes that only the
        mirror shows. `timeout_seconds`: see above."""
        self._settings = settings
        self._ops = ops
        self._mirror = mirror
        self._since = since
        self._patience = Patience() if timeout_seconds is None else Patience(look_up=timeout_seconds)
        self._stack = AsyncExitStack()
        self._session: tuple[LedgerSession, Connection, asyncio.Task[None]] | None = None
        self._begun: Checkpoint | None = None
        self._restarted = False

    async def __aenter__(self) -> "Ledger":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def report(self) -> LedgerReport:
        """Takes a report now. Raises Unavailable."""
        for _ in range(_MAX_SESSIONS):
            try:
                return await self._report()
            except (EndOfSession, PositionLost) as ended:
                log.warning("ledger_session_ended", reason=str(ended))
                await self._end()
                self._restarted = True
            except UNAVAILABLE as error:
                await self._end()
                raise Unavailable("the ledger needs PostgreSQL, which is unavailable", retry_after=2.0) from error
            except ForeignDatabase as error:
                await self._end()
                raise Unavailable(str(error)) from error
        raise Unavailable("the change log or PostgreSQL keeps losing entries; retry", retry_after=5.0)

    async def _end(self) -> None:
        if self._session is not None:
            reading = self._session[2]
            self._session = None
            await end_tasks(reading)
        await self._stack.aclose()

    async def _begin(self) -> tuple[LedgerSession, Connection, "asyncio.Task[None]"]:
        connection = await self._stack.enter_async_context(self._ops.connection())
        reader = ledger_reader(self._settings, "ledger-report")
        known = [] if self._since is None else await list_checkpoints(connection, until=self._since)
        try:
            async with asyncio.timeout(_READ_TIMEOUT_SECONDS):
                self._begun = await provable(reader, known)
                begun = self._begun or await first_entry(reader, connection)
        except TimeoutError as error:
            raise _unreadable_log() from error
        session = LedgerSession(self._settings, connection, self._patience, begun=begun)
        reading = asyncio.create_task(session.read_log(reader), name="ledger-report")
        return session, connection, reading

    async def _report(self) -> LedgerReport:
        # The places are read in the order in which a change passes them, so that a change that moves meanwhile is found
        # in a later place: journals drain into the log and the lanes, and a message leaves its queue after its commit.
        kept = await asyncio.to_thread(journals, self._settings.journal_folder)
        if self._session is None:
            self._session = await self._begin()
        await self._catch_up()
        awaited: set[str] | None = None
        while True:
            report, undecided = await self._look(kept)
            awaited = undecided if awaited is None else awaited & undecided
            if not awaited:
                return report
            await asyncio.sleep(_SEARCH_INTERVAL_SECONDS)

    async def _catch_up(self) -> None:
        """Waits until both sides are read to their ends. Raises Unavailable if the log delivers nothing."""
        assert self._session is not None
        session, _, reading = self._session
        position, moved_at = session.sides.log_position, time.monotonic()
        while True:
            caught_up = session.caught_up
            await session.round()
            if caught_up and session.feed_at_end:
                return
            await asyncio.wait({reading}, timeout=_READ_INTERVAL_SECONDS)
            if reading.done():
                await reading  # raises its error
            if session.sides.log_position != position:
                position, moved_at = session.sides.log_position, time.monotonic()
            elif not session.caught_up and time.monotonic() - moved_at > _READ_TIMEOUT_SECONDS:
                raise _unreadable_log()

    async def _look(self, kept: Journals) -> tuple[LedgerReport, set[str]]:
        """Returns (the report, the changes that count as queued or synced and may be unexplained or missing in the
        log)."""
        assert self._session is not None
        session, connection, reading = self._session
        if reading.done():
            await reading  # raises its error
        await session.round()
        in_queues, unavailable = await self._in_queues(connection)
        retrying, dead = set[str](), dict[str, str]()
        async for places in session.look_up_all():
            retrying |= places.retrying
            dead |= places.dead
        left, overdue = (
            session.left_their_lanes(patience=0.0),
            session.left_their_lanes(patience=self._patience.look_up),
        )
        undecided, places_of = set[str](), dict[str, str]()
        for change_id, found in reversed(session.sides.log.items()):  # the newest first: they may be in these queues
            if change_id in dead:
                place = "dead"
            elif change_id in retrying:
                place = "retrying"
            elif change_id in kept.waiting:
                place = "journaled"
            elif change_id not in left:
                place = "queued"
            elif in_queues.get(found.lane, 0) > 0:
                place = "queued"
                in_queues[found.lane] -= 1
            elif change_id in overdue:
                place = "unexplained"
            else:
                place = "queued"
                undecided.add(change_id)
            places_of[change_id] = place
        named = [_of_log(place, session.sides.log[id_]) for id_, place in reversed(places_of.items())]
        named += await self._only_in_journals(connection, kept, session)
        ready = dict(session.overdue())
        undecided |= session.sides.feed.keys() - ready.keys()
        counts = {place: sum(one.place == place for one in named) for place in PLACES[1:]}
        counts["synced"] = session.sides.committed + session.sides.early
        hints = await self._hints(connection, kept, session)
        last = await last_checkpoint(connection)
        leader = None if last is None else _leader(last)
        if hints is None:
            unavailable.append("mirror")
        only_in_postgres = [
            OpenChange(
                place="only_in_postgres",
                change_id=one.change.change_id,
                restaurant_id=one.change.restaurant_id,
                subject=f"{one.change.entity}/{one.change.entity_id}",
                version=one.change.version,
                seen_in="postgres",
            )
            for one in ready.values()
        ]
        late = leader is not None and leader.age_seconds > MAX_AGE_SECONDS
        lost = counts["unexplained"] or (leader is not None and leader.unexplained)
        expired = {one.after: one for one in [*(totals_of(last).expired if last else []), *session.totals.expired]}
        report = LedgerReport(
            since=self._begun.at if self._begun else None,
            accepted=sum(counts.values()),
            **counts,
            only_in_postgres=len(ready),
            open=_bounded([*named, *only_in_postgres]),
            dead_outcomes=_counted(dead),
            mirror_only=hints or [],
            unreadable=session.unreadable,
            journals=kept.depths,
            expired=list(expired.values()),
            leader=leader,
            alarms=[name for name, raised in (("unexplained", lost), ("age", late)) if raised],
            unavailable=[*unavailable, *kept.unreadable],
            restarted=self._restarted,
        )
        return report, undecided

    async def _in_queues(self, connection: Connection) -> tuple[dict[str, int], list[str]]:
        """Returns (lane -> number of messages in retry and dead-letter queues that PostgreSQL does not list, sources
        that were unavailable). An unknown depth counts as 1."""
        found = await queues.queues_report(self._settings, self._ops)
        listed = await store.retry_counts(connection)
        lanes = {lane: -count for lane, count in listed.items()}
        for queue in found.queues:
            if queue.kind in ("retry", "dead") and queue.lane is not None:
                depth = 1 if queue.depth is None else queue.depth + (queue.dead_lettering or 0)
                lanes[queue.lane] = lanes.get(queue.lane, 0) + depth
        return lanes, [*found.unavailable]

    async def _only_in_journals(
        self, connection: Connection, kept: Journals, session: LedgerSession
    ) -> list[OpenChange]:
        found = {id_: one for id_, one in {**kept.damaged, **kept.waiting}.items() if id_ not in session.sides.log}
        elsewhere = await _elsewhere(connection, [(name.restaurant_id, id_) for id_, (name, _) in found.items()])
        return [
            OpenChange(
                place="journaled" if change_id in kept.waiting else "unexplained",
                change_id=change_id,
                restaurant_id=name.restaurant_id,
                subject=name.subject,
                version=name.version,
                lane=name.lane,
                accepted_at=name.accepted_at,
                trace_id=trace_id_of(name.traceparent),
                seen_in=journal,
            )
            for change_id, (name, journal) in found.items()
            if change_id not in elsewhere
        ]

    async def _hints(self, connection: Connection, kept: Journals, session: LedgerSession) -> list[OpenChange] | None:
        """Returns the changes that only the mirror shows; None if it is unavailable."""
        if self._mirror is None:
            return []
        try:
            pending = await _pending_in_mirror(self._mirror)
        except (MirrorUnavailable, MirrorInDoubt):
            return None
        pending = [one for one in pending if one.change_id not in session.sides.log]
        elsewhere = await _elsewhere(connection, [(one.restaurant_id, one.change_id) for one in pending])
        # Read the journals again, because a change may have been accepted since they were read.
        again = await asyncio.to_thread(journals, self._settings.journal_folder)
        elsewhere |= kept.damaged.keys() | again.waiting.keys() | again.damaged.keys()
        return [one for one in pending if one.change_id not in elsewhere]


def _unreadable_log() -> Unavailable:
    return Unavailable("the change log cannot be read; retry", retry_after=5.0)


async def _elsewhere(connection: Connection, keys: list[tuple[str, str]]) -> set[str]:
    """Returns the ids of those changes that are in `changes` or have a dead letter."""
    found: set[str] = set()
    for start in range(0, len(keys), _MAX_NAMED):
        block = keys[start : start + _MAX_NAMED]
        found |= (await store.dead(connection, [id_ for _, id_ in block])).keys()
        found |= (await store.synced(connection, [key for key in block if is_id(key[0])])).keys()
    return found


async def _pending_in_mirror(mirror: Mirror) -> list[OpenChange]:
    """Returns changes that are pending in the mirror for more than a minute; at most the newest thousand per entity and
    restaurant. Raises MirrorUnavailable, MirrorInDoubt."""
    found: list[OpenChange] = []
    newest = now() - _MIN_PENDING_AGE
    for restaurant in await mirror.restaurant_ids():
        for entity in registry.ENTITIES.values():
            ids = (await mirror.pending_ids(restaurant, entity.name))[:_MAX_NAMED]
            if not ids:
                continue
            accepted = await mirror.accepted_at(restaurant, entity.name, ids)
            _, documents = await mirror.read(restaurant, entity.name, ids)
            for id_, seconds, document in zip(ids, accepted, documents, strict=True):
                if seconds is None or document is None or datetime.fromtimestamp(seconds, UTC) >= newest:
                    continue
                found.append(
                    OpenChange(
                        place="mirror",
                        change_id=document.head.change_id,
                        restaurant_id=restaurant,
                        subject=f"{entity.name}/{id_}",
                        version=document.head.version,
                        lane=entity.lane.value,
                        accepted_at=datetime.fromtimestamp(seconds, UTC),
                        seen_in="mirror",
                    )
                )
    return found


def _of_log(place: str, found: LogOnly) -> OpenChange:
    change = found.change
    return OpenChange(
        place=place,
        change_id=change.id,
        restaurant_id=change.restaurant_id,
        subject=str(change.subject)[:200],
        version=change.entityversion if isinstance(change.entityversion, int) else 0,
        lane=found.lane,
        accepted_at=_time(change.time),
        trace_id=trace_id_of(change.traceparent) if isinstance(change.traceparent, str) else None,
    )


def _time(value: Any) -> datetime | None:
    try:
        found = msgspec.convert(value, datetime)
    except (msgspec.ValidationError, ValueError, TypeError):
        return None
    return found if found.tzinfo is not None else None


def _bounded(changes: list[OpenChange]) -> list[OpenChange]:
    numbers: dict[str, int] = {}
    kept = []
    for one in changes:
        numbers[one.place] = numbers.get(one.place, 0) + 1
        if one.place == "unexplained" or numbers[one.place] <= _MAX_NAMED:
            kept.append(one)
    return kept


def _counted(dead: dict[str, str]) -> dict[str, int]:
    return {outcome: list(dead.values()).count(outcome) for outcome in dict.fromkeys(dead.values())}


def _leader(last: Checkpoint) -> LeaderState:
    totals = totals_of(last)
    return LeaderState(
        age_seconds=round(last.age_seconds, 1),
        log_low=last.log_low.offset,
        log_at=last.log_at.offset,
        open=totals.open,
        resent=totals.resent,
        republished=totals.republished,
        unexplained=len(totals.unexplained),
    )
