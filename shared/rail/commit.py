"""Claim, record, reveal. The states and crash points are in the package's docstring."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, TypeVar

import msgspec
import structlog
from msgspec import Raw, Struct
from opentelemetry.trace import SpanKind

from shared.entities import registry
from shared.entities.contract import (
    MAX_DATA_BYTES,
    BrokenContract,
    Change,
    ChangeData,
    Head,
    Lane,
    change_id,
    changed_fields,
    decode_change,
    encode,
)
from shared.entities.entity import Entity
from shared.errors import InvalidInput, OutcomeUnknown, TicketrailError, Unavailable
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Apply, Busy, Claimed, Cold, HeadMoved, Mirror, Stale, StockShort, stock_text
from shared.observability import tracing
from shared.observability.metrics import RailMetrics
from shared.observability.tracing import Tracer
from shared.rail.journal import Journal, JournalBroken
from shared.rail.record import Durability, Recorder, Unrecorded

log = structlog.get_logger(__name__)

T = TypeVar("T")
_PAUSE = 0.05
_REMEMBERED = 10_000
_CLAIM = {"db.system.name": "redis", "db.operation.name": "EVALSHA", "db.stored_procedure.name": "claim"}
_REVEAL = {**_CLAIM, "db.stored_procedure.name": "apply"}


class Draft(Struct, kw_only=True):
    """A change that is wanted: the state after it and what it is built on (`base` None: a creation)."""

    entity: Entity
    event: str
    state: Any
    base: Head | None
    before: Struct | None
    at: datetime
    source: str
    lane: Lane | None = None
    actor: str | None = None
    """Who asked for it."""
    traceparent: str | None = None
    """Context of the span that makes it durable; by default one below the current trace's."""
    existing: Callable[[], Awaitable[tuple[Head, Any] | None]] | None = None
    """Looks for an earlier creation under the same id where no mirror can answer for it; raises Unavailable where
    nobody can."""


class Committed(Struct, frozen=True):
    state: Any
    head: Head
    durability: Durability
    visible: bool


class ClaimLost(TicketrailError):
    """Another change came first. `head` is None while that is still on its way; `state` also where only PostgreSQL
    has it."""

    status = 409
    code = "version_conflict"

    def __init__(self, head: Head | None = None, state: Any = None) -> None:
        super().__init__("another change came first")
        self.head = head
        self.state = state


class OutOfStock(TicketrailError):
    """`left`: (inventory item, what is left of it)."""

    status = 409
    code = "out_of_stock"

    def __init__(self, left: tuple[tuple[str, int], ...]) -> None:
        super().__init__("there is not enough left")
        self.left = left


class _Doubt(Struct):
    """What a commit must remember until it answers."""

    claim_sent: bool = False
    """A claim was sent without an answer: it may have been executed, or be executed when a frozen server wakes."""
    noted: bool = False
    """It stands among those that this instance makes without a claim."""


class Rail:
    def __init__(
        self,
        mirror: Mirror,
        recorder: Recorder,
        journal: Journal | None,
        *,
        claim_timeout_seconds: float,
        reveal_timeout_seconds: float,
        tracer: Tracer | None = None,
        metrics: RailMetrics | None = None,
    ) -> None:
        """`tracer`: for changes of other traces that are finished here."""
        self._mirror = mirror
        self._recorder = recorder
        self._journal = journal
        self._claim_seconds = claim_timeout_seconds
        self._reveal_seconds = reveal_timeout_seconds
        self._tracer = tracer
        self._metrics = metrics
        self._highest: dict[tuple[str, str], int] = {}
        # Creations under a key that were made here without a claim of late; None: on its way. PostgreSQL learns of them
        # a moment later: until then nobody else can tell a repeat that it is one.
        self._without_claim: dict[str, tuple[Head, Any] | None] = {}
        self._later: set[asyncio.Task[Any]] = set()

    async def commit(self, draft: Draft) -> Committed:
        """Raises InvalidInput (no store could read the state), Lost, OutOfStock, Unavailable (nothing happened) or
        OutcomeUnknown.
        A caller that goes away does not stop it."""
        return await asyncio.shield(self._keep(asyncio.create_task(self._commit(draft), name="commit")))

    async def finish(self, left: Stale) -> None:
        """Records and reveals a change that its owner left behind, as the same change."""
        change = decode_change(left.event)
        entity, state = registry.read(change)
        change, state = _numbered(entity, change, state, left.number)
        began = time.time_ns()
        try:
            await self._recorder.record(lane_of(change), encode(change), change.traceparent)
        except Unrecorded as error:
            raise Unavailable("an earlier change cannot be finished now", retry_after=2.0) from error
        await self._reveal(entity, change, state)
        if self._metrics is not None:
            self._metrics.claims_finished.inc()
        if self._tracer is not None:  # whatever the sampling: its own request has told nobody how it ended
            found = {"ticketrail.change_id": change.id, "ticketrail.order_id": change.entity_id}
            self._tracer.add(change.traceparent, "finish claim", began, time.time_ns(), attributes=found)
        log.info("claim_finished", change_id=change.id, subject=change.subject, version=change.entityversion)

    async def drain(self) -> None:
        """Waits for what is under way: for a graceful stop, after the last request."""
        while self._later:
            await asyncio.gather(*self._later, return_exceptions=True)
        await self._recorder.drain()

    # -- the three steps ---------------------------------------------------------------------------------------

    async def _commit(self, draft: Draft) -> Committed:
        trace = tracing.current()
        if draft.traceparent is None and trace is not None:
            draft.traceparent = trace.context_of(tracing.new_span_id())
        change = _change(draft)
        if trace is not None:
            trace.attributes[f"ticketrail.{draft.entity.name}_id"] = draft.state.id
            trace.attributes["ticketrail.change_id"] = change.id
        try:
            registry.read(change)
        except BrokenContract as error:
            # What we acknowledge every store must be able to read: constructing a state checks nothing.
            raise InvalidInput(str(error), field="data", code="contract_broken") from error
        if len(memoryview(change.data.after)) + len(memoryview(change.data.before)) > MAX_DATA_BYTES:
            raise InvalidInput("too large for one change", field="data", code="too_large", max_bytes=MAX_DATA_BYTES)
        doubt = _Doubt()
        try:
            with tracing.span("claim", kind=SpanKind.CLIENT, attributes=_CLAIM):
                number, claimed = await self._claim(draft, change, doubt)
            if claimed:
                change, state = _numbered(draft.entity, change, draft.state, number)
            else:
                numbering = draft.entity.numbering
                state = numbering.with_number(draft.state, number) if numbering else draft.state
                draft.state = state
                change = _change(draft)  # an id that covers the number: the claim of a mirror that is lost had another
            durability = await self._record(change, claimed=claimed)
            if doubt.noted:
                self._without_claim[draft.state.id] = (change.head, state)
        except (ClaimLost, OutOfStock, Unavailable) as error:
            if self._metrics is not None and isinstance(error, ClaimLost):
                self._metrics.claims_lost.inc()
            # A creation that is told what stands is answered: its order exists. All else may still appear.
            exists = draft.base is None and isinstance(error, ClaimLost) and error.head is not None
            if doubt.claim_sent and not exists:
                raise OutcomeUnknown("the mirror did not answer in time; the change may appear") from error
            raise
        finally:
            if doubt.noted and self._without_claim.get(draft.state.id) is None:
                self._without_claim.pop(draft.state.id, None)
        with tracing.span("reveal", kind=SpanKind.CLIENT, attributes=_REVEAL):
            visible = await self._reveal(draft.entity, change, state, patient=claimed)
        if not visible and not claimed and not self._mirror.down:
            # Nobody waits for it: until the mirror has it, a repeat that comes elsewhere would make it again.
            self._keep(asyncio.create_task(self._reveal(draft.entity, change, state), name="reveal"))
        if self._metrics is not None:
            self._metrics.accepted.inc(change.type)
        return Committed(state, change.head, durability, visible)

    async def _claim(self, draft: Draft, change: Change, doubt: "_Doubt") -> tuple[str, bool]:
        """(number, claimed). Not claimed: a creation without a warm mirror, with a number of our own series."""
        numbering = draft.entity.numbering
        series = numbering.business_day(draft.state) if numbering and not numbering.number(draft.state) else None
        floor = self._highest.get((change.restaurantid, series), 0) if series else 0
        event, stock = encode(change), stock_text(draft.entity, draft.state)
        deadline = time.monotonic() + self._claim_seconds
        if draft.existing is not None and draft.state.id in self._without_claim:
            await self._tell_made(draft)
        while True:
            try:
                # Nothing is to be claimed when we have gone on without it.
                within = max(0.0, deadline - time.monotonic())
                reply = await self._mirror.claim(
                    draft.entity, change, event, draft.base, series, floor, stock, within=within
                )
            except MirrorInDoubt:
                doubt.claim_sent = True
            except MirrorUnavailable as error:
                if not doubt.claim_sent:
                    return await self._unclaimed(draft, series, error, doubt)
            else:
                match reply:
                    case Claimed(number):
                        self._remember(change.restaurantid, series, number)
                        return number, True
                    case HeadMoved(head, bytes() as encoded) if head.change_id == change.id:
                        return _number_in(draft.entity, encoded), True  # finished by somebody who thought us dead
                    case Stale():
                        try:
                            await self.finish(reply)
                        except BrokenContract as error:  # of a newer version than ours: it is left to those
                            raise Unavailable("an earlier change cannot be finished here", retry_after=2.0) from error
                    case Cold():
                        return await self._unclaimed(draft, series, None, doubt)
                    case HeadMoved(head, None):
                        if draft.existing and (found := await draft.existing()):
                            raise ClaimLost(*found)
                        raise ClaimLost(head)
                    case HeadMoved(head, bytes() as encoded):
                        raise ClaimLost(head, draft.entity.decode_state(encoded))
                    case Busy():
                        raise ClaimLost
                    case StockShort(left):
                        raise OutOfStock(left)
                continue
            if time.monotonic() > deadline:
                if draft.base is not None:
                    raise OutcomeUnknown("the mirror did not answer in time; the change may appear")
                return await self._unclaimed(draft, series, None, doubt)
            await asyncio.sleep(_PAUSE)

    async def _unclaimed(
        self, draft: Draft, series: str | None, error: Exception | None, doubt: "_Doubt"
    ) -> tuple[str, bool]:
        if draft.base is not None:
            raise Unavailable("changes wait until the mirror is warm", retry_after=2.0) from error
        if draft.existing is not None:
            if draft.state.id in self._without_claim:
                await self._tell_made(draft)
            self._note(draft.state.id, doubt)  # before the first await: of two repeats at once the second is told
        # Where no store can tell, creations go on: under the same id it stays one order.
        with contextlib.suppress(Unavailable):
            if draft.existing and (found := await draft.existing()):
                raise ClaimLost(*found)
        if series is None:
            return "", False
        if self._journal is None:
            raise Unavailable("no order number without the mirror or a journal") from error
        try:
            return await self._journal.next_number(draft.state.restaurant_id, series), False
        except JournalBroken as broken:
            raise Unavailable("no order number without the mirror or the journal") from broken

    async def _record(self, change: Change, *, claimed: bool) -> Durability:
        try:
            return await self._recorder.record(lane_of(change), encode(change), change.traceparent)
        except Unrecorded as error:
            if not error.sent and (not claimed or await self._take_back(change)):
                raise Unavailable("neither the broker nor the journal takes changes now", retry_after=2.0) from error
            raise OutcomeUnknown("the change was sent and not confirmed; it may appear") from error

    async def _take_back(self, change: Change) -> bool:
        try:
            return await self._mirror.take_back(change)
        except (MirrorUnavailable, MirrorInDoubt) as error:
            log.warning("take_back_failed", change_id=change.id, error=str(error))
            return False

    async def _reveal(self, entity: Entity, change: Change, state: Any, *, patient: bool = True) -> bool:
        """Tried for a second, or, where the mirror took no claim a moment ago, once; where it fails the mirror writer
        does it, from the log."""
        revealed = Apply(entity, state, change.head, bytes(change.data.after), change.time)
        deadline = time.monotonic() + self._reveal_seconds
        while True:
            try:
                await self._mirror.apply([revealed])
                return True
            except (MirrorUnavailable, MirrorInDoubt) as error:
                if not patient or self._mirror.down or time.monotonic() > deadline:
                    log.warning("not_revealed", change_id=change.id, error=str(error) or type(error).__name__)
                    return False
            await asyncio.sleep(_PAUSE)

    # -- small things ------------------------------------------------------------------------------------------

    def _remember(self, restaurant: str, series: str | None, number: str) -> None:
        """The highest number that this instance was given: a mirror that lost its counter does not give it again."""
        if series:
            if len(self._highest) > 10_000:  # business days gone by
                self._highest.clear()
            self._highest[restaurant, series] = max(int(number), self._highest.get((restaurant, series), 0))

    def _note(self, id_: str, doubt: "_Doubt") -> None:
        while len(self._without_claim) >= _REMEMBERED:
            del self._without_claim[next(iter(self._without_claim))]
        self._without_claim[id_], doubt.noted = None, True

    async def _tell_made(self, draft: Draft) -> None:
        """Raises Lost: this instance makes it already, or has made it of late, and the mirror may not have it yet."""
        made = self._without_claim[draft.state.id]
        if made is not None and draft.existing is not None:
            with contextlib.suppress(Unavailable):
                if found := await draft.existing():  # it may have moved on
                    raise ClaimLost(*found)
        raise ClaimLost(*(made or ()))

    def _keep(self, task: "asyncio.Task[T]") -> "asyncio.Task[T]":
        self._later.add(task)
        task.add_done_callback(self._later.discard)
        return task


def lane_of(change: Change) -> Lane:
    return next((lane for lane in Lane if lane.priority <= change.priority), Lane.BACKGROUND)


def _change(draft: Draft) -> Change:
    after = encode(draft.state)
    before = encode(changed_fields(draft.before, draft.state))
    version = draft.base.version + 1 if draft.base else 1
    base = draft.base.change_id if draft.base else None
    type_ = draft.entity.type(draft.event)
    return Change(
        id=change_id(draft.state.id, version, b"\0".join((type_.encode(), (base or "").encode(), before, after))),
        source=draft.source,
        type=type_,
        subject=f"{draft.entity.name}/{draft.state.id}",
        time=draft.at,
        restaurantid=draft.state.restaurant_id,
        priority=(draft.lane or draft.entity.lane).priority,
        entityversion=version,
        basechangeid=base,
        traceparent=draft.traceparent,
        actor=draft.actor,
        data=ChangeData(after=Raw(after), before=Raw(before)),
    )


def _numbered(entity: Entity, change: Change, state: Any, number: str) -> tuple[Change, Any]:
    """The same change with the number that its claim was given."""
    if not number or entity.numbering is None:
        return change, state
    state = entity.numbering.with_number(state, number)
    data = ChangeData(after=Raw(encode(state)), before=change.data.before)
    return msgspec.structs.replace(change, data=data), state


def _number_in(entity: Entity, encoded: bytes) -> str:
    state = entity.decode_state(encoded)
    return entity.numbering.number(state) if entity.numbering else ""
