"""The commit of a change: claim, record, reveal. The docstring of the package lists the states and the effects of a
crash in each."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from msgspec import Struct
from opentelemetry.trace import SpanKind

from shared.entities import registry
from shared.entities.contract import (
    MAX_DATA_BYTES,
    BrokenContract,
    Change,
    Head,
    encode,
)
from shared.entities.entity import Entity
from shared.errors import InvalidInput, OutcomeUnknown, TicketrailError, Unavailable
from shared.messaging.topology import lane_of
from shared.mirror.claim_replies import Busy, Claimed, Cold, HeadMoved, Stale, StockShort
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Apply, Mirror, stock_text
from shared.observability import tracing
from shared.observability.metrics import RailMetrics
from shared.observability.tracing import Tracer
from shared.rail.claim_finisher import ClaimFinisher
from shared.rail.draft import Draft, change_of
from shared.rail.journal import Journal, JournalBroken
from shared.rail.order_numbers import InstanceNumbers, number_in, series_of, with_number
from shared.rail.record import Durability, Recorder, Unrecorded

log = structlog.get_logger(__name__)

T = TypeVar("T")
_RETRY_PAUSE_SECONDS = 0.05
_MAX_WITHOUT_CLAIM = 10_000
_CLAIM = {"db.system.name": "redis", "db.operation.name": "EVALSHA", "db.stored_procedure.name": "claim"}
_REVEAL = {**_CLAIM, "db.stored_procedure.name": "apply"}


class Committed(Struct, frozen=True):
    state: Any
    head: Head
    durability: Durability
    visible: bool


class ClaimLost(TicketrailError):
    """Another change came first. `head` is None while that change is not committed yet. `state` is None in the same
    case, and also if the mirror does not have the state."""

    status = 409
    code = "version_conflict"

    def __init__(self, head: Head | None = None, state: Any = None) -> None:
        super().__init__("another change came first")
        self.head = head
        self.state = state


class OutOfStock(TicketrailError):
    """The stock is not enough. `left`: pairs of inventory item id and available amount."""

    status = 409
    code = "out_of_stock"

    def __init__(self, left: tuple[tuple[str, int], ...]) -> None:
        super().__init__("the stock is not enough")
        self.left = left


class _Doubt(Struct):
    """The uncertain steps of one commit, kept until it returns."""

    claim_sent: bool = False
    """A claim got no reply. It may have been executed, or may be executed when a frozen server continues."""
    noted: bool = False
    """The creation is listed in `_without_claim`."""


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
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`tracer`: adds spans to the traces of other instances' changes when this instance finishes their claims.
        `clock` and `sleep` count seconds."""
        self._mirror = mirror
        self._recorder = recorder
        self._instance_numbers = InstanceNumbers(journal) if journal is not None else None
        self._claim_seconds = claim_timeout_seconds
        self._reveal_seconds = reveal_timeout_seconds
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self.claim_finisher = ClaimFinisher(mirror, recorder, self._reveal, tracer=tracer, metrics=metrics, clock=clock)
        # Recent creations with an idempotency key that this instance made without a claim. The value is None while the
        # creation is under way. Until PostgreSQL has the creation, only this table can recognise a repeat.
        self._without_claim: dict[str, tuple[Head, Any] | None] = {}
        self._background: set[asyncio.Task[Any]] = set()

    async def commit(self, draft: Draft) -> Committed:
        """Commits a change, even if the caller is cancelled meanwhile.

        Raises InvalidInput (no store could read the state), ClaimLost, OutOfStock, Unavailable (nothing happened) and
        OutcomeUnknown (the change may appear).
        """
        return await asyncio.shield(self._keep(asyncio.create_task(self._commit(draft), name="commit")))

    async def drain(self) -> None:
        """Waits for the commits that are under way. Call it at shutdown, after the last request."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        await self._recorder.drain()

    # -- the three steps ---------------------------------------------------------------------------------------

    async def _commit(self, draft: Draft) -> Committed:
        trace = tracing.current()
        if draft.traceparent is None and trace is not None:
            draft.traceparent = trace.context_of(tracing.new_span_id())
        change = change_of(draft)
        if trace is not None:
            trace.attributes[f"ticketrail.{draft.entity.name}_id"] = draft.state.id
            trace.attributes["ticketrail.change_id"] = change.id
        try:
            registry.read(change)
        except BrokenContract as error:
            # Every store must be able to read an accepted change, and constructing a Struct checks nothing.
            raise InvalidInput(str(error), field="data", code="contract_broken") from error
        if len(memoryview(change.data.after)) + len(memoryview(change.data.before)) > MAX_DATA_BYTES:
            raise InvalidInput("too large for one change", field="data", code="too_large", max_bytes=MAX_DATA_BYTES)
        doubt = _Doubt()
        try:
            with tracing.span("claim", kind=SpanKind.CLIENT, attributes=_CLAIM):
                number, claimed = await self._claim(draft, change, doubt)
            if claimed:
                change, state = with_number(draft.entity, change, draft.state, number)
            else:
                numbering = draft.entity.numbering
                state = numbering.with_number(draft.state, number) if numbering else draft.state
                draft.state = state
                # The change gets a new id, because its number differs from that of a claim in a lost mirror.
                change = change_of(draft)
            durability = await self._record(change, claimed=claimed)
            if doubt.noted:
                self._without_claim[draft.state.id] = (change.head, state)
        except (ClaimLost, OutOfStock, Unavailable) as error:
            if self._metrics is not None and isinstance(error, ClaimLost):
                self._metrics.claims_lost.inc()
            # If the entity of a creation exists, the outcome is known. After a claim in doubt, any other change may
            # still appear.
            exists = draft.base is None and isinstance(error, ClaimLost) and error.head is not None
            if doubt.claim_sent and not exists:
                raise OutcomeUnknown("the mirror did not answer in time; the change may appear") from error
            raise
        finally:
            if doubt.noted and self._without_claim.get(draft.state.id) is None:
                self._without_claim.pop(draft.state.id, None)
        with tracing.span("reveal", kind=SpanKind.CLIENT, attributes=_REVEAL):
            visible = await self._reveal(draft.entity, change, state, keep_trying=claimed)
        if not visible and not claimed and not self._mirror.down:
            # Reveals in the background. Until the mirror has the entity, another instance would create it again for a
            # repeated request.
            self._keep(asyncio.create_task(self._reveal(draft.entity, change, state), name="reveal"))
        if self._metrics is not None:
            self._metrics.accepted.inc(change.type)
        return Committed(state, change.head, durability, visible)

    async def _claim(self, draft: Draft, change: Change, doubt: "_Doubt") -> tuple[str, bool]:
        """Returns (order number or "", whether a claim is held). Without a warm mirror, a creation needs no claim and
        gets a number from this instance's own series."""
        series = series_of(draft.entity, draft.state)
        event, stock = encode(change), stock_text(draft.entity, draft.state)
        deadline = self._clock() + self._claim_seconds
        if draft.existing is not None and draft.state.id in self._without_claim:
            await self._raise_created(draft)
        while True:
            try:
                # The mirror must not execute a claim after this commit has gone on without it.
                within = max(0.0, deadline - self._clock())
                reply = await self._mirror.claim(draft.entity, change, event, draft.base, series, stock, within=within)
            except MirrorInDoubt:
                doubt.claim_sent = True
            except MirrorUnavailable as error:
                if not doubt.claim_sent:
                    return await self._unclaimed(draft, series, error, doubt)
            else:
                match reply:
                    case Claimed(number):
                        return number, True
                    case HeadMoved(head, bytes() as encoded) if head.change_id == change.id:
                        return number_in(draft.entity, encoded), True  # another instance finished our claim
                    case Stale():
                        try:
                            await self.claim_finisher.finish(reply)
                        except BrokenContract as error:
                            raise Unavailable(
                                "an earlier change of this entity is from a newer release, which must finish it; retry",
                                retry_after=2.0,
                            ) from error
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
            if self._clock() > deadline:
                if draft.base is not None:
                    raise OutcomeUnknown("the mirror did not answer in time; the change may appear")
                return await self._unclaimed(draft, series, None, doubt)
            await self._sleep(_RETRY_PAUSE_SECONDS)

    async def _unclaimed(
        self, draft: Draft, series: str | None, error: Exception | None, doubt: "_Doubt"
    ) -> tuple[str, bool]:
        """Continues without a claim and returns like `_claim`. Only a creation can do so; raises Unavailable for any
        other change."""
        if draft.base is not None:
            raise Unavailable("nothing can be changed until the mirror is warm; retry", retry_after=2.0) from error
        if draft.existing is not None:
            if draft.state.id in self._without_claim:
                await self._raise_created(draft)
            # This comes before the first await, so that the second of two concurrent repeats sees it.
            self._note_creation(draft.state.id, doubt)
        # If no store can answer, the creation continues. A repeat has the same id, so there is still only one order.
        with contextlib.suppress(Unavailable):
            if draft.existing and (found := await draft.existing()):
                raise ClaimLost(*found)
        if series is None:
            return "", False
        if self._instance_numbers is None:
            raise Unavailable("no order number is available without the mirror or a journal") from error
        try:
            return await self._instance_numbers.next(draft.state.restaurant_id, series), False
        except JournalBroken as broken:
            raise Unavailable("no order number is available without the mirror or the journal") from broken

    async def _record(self, change: Change, *, claimed: bool) -> Durability:
        try:
            return await self._recorder.record(lane_of(change), encode(change), change.traceparent)
        except Unrecorded as error:
            if not error.sent and (not claimed or await self._take_back(change)):
                raise Unavailable("neither the broker nor the journal accepts changes now", retry_after=2.0) from error
            raise OutcomeUnknown("the change was sent and not confirmed; it may appear") from error

    async def _take_back(self, change: Change) -> bool:
        try:
            return await self._mirror.take_back(change)
        except (MirrorUnavailable, MirrorInDoubt) as error:
            log.warning("take_back_failed", change_id=change.id, error=str(error))
            return False

    async def _reveal(self, entity: Entity, change: Change, state: Any, *, keep_trying: bool = True) -> bool:
        """Returns whether the mirror has the change now. Tries for `reveal_timeout_seconds`, or only once without
        `keep_trying`. After a failure, the mirror writer applies the change from the log."""
        revealed = Apply(entity, state, change.head, bytes(change.data.after), change.time)
        deadline = self._clock() + self._reveal_seconds
        while True:
            try:
                await self._mirror.apply([revealed])
                return True
            except (MirrorUnavailable, MirrorInDoubt) as error:
                if not keep_trying or self._mirror.down or self._clock() > deadline:
                    log.warning("not_revealed", change_id=change.id, error=str(error) or type(error).__name__)
                    return False
            await self._sleep(_RETRY_PAUSE_SECONDS)

    # -- creations without a claim -----------------------------------------------------------------------------

    def _note_creation(self, id_: str, doubt: "_Doubt") -> None:
        while len(self._without_claim) >= _MAX_WITHOUT_CLAIM:
            del self._without_claim[next(iter(self._without_claim))]
        self._without_claim[id_], doubt.noted = None, True

    async def _raise_created(self, draft: Draft) -> None:
        """Raises ClaimLost, because this instance has created the entity or is creating it. The mirror may not have it
        yet."""
        made = self._without_claim[draft.state.id]
        if made is not None and draft.existing is not None:
            with contextlib.suppress(Unavailable):
                if found := await draft.existing():  # the entity may have changed since
                    raise ClaimLost(*found)
        raise ClaimLost(*(made or ()))

    def _keep(self, task: "asyncio.Task[T]") -> "asyncio.Task[T]":
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
