"""The commit of a change: claim, record, reveal. The docstring of the package lists the states and the effects of a
crash in each. A creation whose mirror takes no claim continues by `commit_unclaimed`, as idempotency.py decides.

An error says what is true: Unavailable means that nothing was sent, or that the claim was taken back. After the mirror
left a claim unanswered, every error is OutcomeUnknown, unless it names the existing entity.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import structlog
from msgspec import Struct
from opentelemetry.trace import SpanKind

from shared.entities.contract import BrokenContract, Change, encode
from shared.errors import OutcomeUnknown, TicketrailError, Unavailable
from shared.mirror.claim_replies import Ask, Busy, Claimed, Cold, HeadMoved, Restamp, Stale, StockShort
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.mirror.stock_texts import claimed_stock_text
from shared.observability import tracing
from shared.observability.metrics import RailMetrics
from shared.observability.tracing import Tracer
from shared.rail.claim_finisher import ClaimFinisher
from shared.rail.draft import Draft, checked_change
from shared.rail.head import Standing
from shared.rail.journal import Journal
from shared.rail.order_numbers import InstanceNumbers, number_in, series_of, with_number
from shared.rail.outcomes import ClaimLost, Committed, NoClaim, OutOfStock, unless_sent
from shared.rail.record import Durability, Recorder, Unrecorded
from shared.rail.reveal import RETRY_PAUSE_SECONDS, Reveal

log = structlog.get_logger(__name__)

T = TypeVar("T")
_CLAIM = {"db.system.name": "redis", "db.operation.name": "EVALSHA", "db.stored_procedure.name": "claim"}
_REVEAL = {**_CLAIM, "db.stored_procedure.name": "apply"}


class _Held(Struct, frozen=True):
    """The change holds a claim."""

    change: Change
    number: str
    """The order number that the claim gave, or empty."""
    sent: bool
    """An earlier call got no reply. The server may execute it when it wakes, even after the claim was taken back."""


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
        """`tracer`: adds spans to the traces of other instances' changes when this instance finishes their claims."""
        self._mirror = mirror
        self._recorder = recorder
        self._instance_numbers = InstanceNumbers(journal)
        self._claim_seconds = claim_timeout_seconds
        self._reveal = Reveal(mirror, reveal_timeout_seconds, clock=clock, sleep=sleep)
        self._metrics = metrics
        self._clock = clock
        self._sleep = sleep
        self.claim_finisher = ClaimFinisher(mirror, recorder, self._reveal, tracer=tracer, metrics=metrics, clock=clock)
        self._background: set[asyncio.Task[Any]] = set()

    async def commit(self, draft: Draft, *, after: NoClaim | None = None) -> Committed:
        """Commits a change, even if the caller is cancelled meanwhile. `after`: the first attempt at this creation, if
        the caller has then looked for an earlier creation with its id. Raises InvalidInput (no store could read the
        state), ClaimLost, OutOfStock, Unavailable (nothing happened), OutcomeUnknown, and for a creation NoClaim."""
        return await self.run(self._commit(draft, after))

    async def commit_unclaimed(self, draft: Draft, after: NoClaim) -> Committed:
        """Commits a creation without a claim, with a number of this instance's own series unless it has a number.
        Raises like `commit`."""
        return await self.run(self._commit_unclaimed(draft, after))

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs `work` to its end, even if the caller is cancelled meanwhile."""
        if asyncio.current_task() in self._background:
            return await work
        return await asyncio.shield(self._keep(work))

    async def drain(self) -> None:
        """Waits for the commits that are under way. Call it at shutdown, after the last request."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        await self._recorder.drain()

    # -- the two ways of a commit ------------------------------------------------------------------------------

    async def _commit(self, draft: Draft, after: NoClaim | None) -> Committed:
        change = checked_change(draft)
        with tracing.span("claim", kind=SpanKind.CLIENT, attributes=_CLAIM):
            claim = await self._claim(draft, change, after)
        if isinstance(claim, NoClaim):
            raise claim if draft.base is None else claim.refusal()
        change, state = with_number(draft.entity, claim.change, draft.state, claim.number)
        durability = await self._record(draft, change, claimed=True, sent=claim.sent)
        with tracing.span("reveal", kind=SpanKind.CLIENT, attributes=_REVEAL):
            visible = await self._reveal(draft.entity, change, state)
        return self._committed(change, state, durability, visible)

    async def _commit_unclaimed(self, draft: Draft, after: NoClaim) -> Committed:
        entity, series = draft.entity, series_of(draft.entity, draft.state)
        try:
            if series is not None and entity.numbering is not None:
                number = await self._instance_numbers.next(draft.state.restaurant_id, series)
                draft.state = entity.numbering.with_number(draft.state, number)
        except Unavailable as error:
            raise unless_sent(after.sent, error) from error
        # The change has another id than in a lost mirror, because its number differs.
        change = checked_change(draft)
        durability = await self._record(draft, change, claimed=False, sent=after.sent)
        with tracing.span("reveal", kind=SpanKind.CLIENT, attributes=_REVEAL):
            visible = await self._reveal(entity, change, draft.state, keep_trying=False)
        if not visible and not self._mirror.down:
            # Until the mirror has the entity, another instance would create it again for a repeated request.
            self._keep(self._reveal(entity, change, draft.state))
        return self._committed(change, draft.state, durability, visible)

    def _committed(self, change: Change, state: Any, durability: Durability, visible: bool) -> Committed:
        if self._metrics is not None:
            self._metrics.accepted.inc(change.type)
        return Committed(state, change.head, durability, visible, bytes(change.data.after))

    # -- the steps ---------------------------------------------------------------------------------------------

    async def _claim(self, draft: Draft, change: Change, after: NoClaim | None) -> _Held | NoClaim:
        """Claims the next version for the change, for at most `claim_timeout_seconds`."""
        entity, series = draft.entity, series_of(draft.entity, draft.state)
        # A warm mirror has all entities of a kind that never leaves the live window. After the first attempt, the
        # caller has looked.
        ask = draft.keyed and entity.keyed is not None and draft.base is None and after is None
        sent, deadline = after is not None and after.sent, self._clock() + self._claim_seconds
        while True:
            try:
                stock = claimed_stock_text(entity, draft.state, draft.before, sold=draft.sold)
                # The mirror must not execute a claim after this commit has gone on without it.
                within, lane = max(0.0, deadline - self._clock()), draft.record_lane
                reply = await self._mirror.claim(
                    entity, change, encode(change), draft.base_head, series, stock, lane=lane, within=within, ask=ask
                )
            except MirrorInDoubt:
                sent = True
            except MirrorUnavailable:
                if not sent:
                    return NoClaim(sent=False)
            else:
                match reply:
                    case Claimed(number):
                        return _Held(change, number, sent)
                    case HeadMoved(head, bytes() as encoded) if head.change_id == change.id:
                        # Another instance has finished our claim.
                        return _Held(change, number_in(entity, encoded), sent)
                    case Stale():
                        await self._finish(reply, sent)
                    case Restamp(stamps):
                        draft.state = entity.restamp(draft.state, draft.before, stamps)
                        change = checked_change(draft)
                    case Cold() | Ask():
                        return NoClaim(sent=sent, asked=isinstance(reply, Ask))
                    case HeadMoved() | Busy():
                        raise self._lost(draft, sent, reply)
                    case StockShort(left):
                        raise unless_sent(sent, OutOfStock(left))
                continue
            if self._clock() > deadline:
                return NoClaim(sent=sent)
            await self._sleep(RETRY_PAUSE_SECONDS)

    async def _finish(self, stale: Stale, sent: bool) -> None:
        try:
            await self.claim_finisher.finish(stale)
        except (BrokenContract, Unavailable) as error:  # a newer release must finish a change that this one cannot read
            waits = Unavailable("an earlier change of this entity is not finished yet; retry", retry_after=2.0)
            raise unless_sent(sent, waits) from error

    def _lost(self, draft: Draft, sent: bool, reply: HeadMoved | Busy) -> TicketrailError:
        if self._metrics is not None:
            self._metrics.claims_lost.inc()
        if isinstance(reply, Busy):
            return unless_sent(sent, ClaimLost())
        found = reply.state and Standing(reply.head, draft.entity.decode_state(reply.state), reply.state)
        # The error of a creation names the existing entity. A change may be below the head.
        return unless_sent(sent and draft.base is not None, ClaimLost(reply.head, found or None))

    async def _record(self, draft: Draft, change: Change, *, claimed: bool, sent: bool) -> Durability:
        try:
            return await self._recorder.record(draft.record_lane, encode(change), change.traceparent)
        except Unrecorded as error:
            if not error.sent and (not claimed or await self._take_back(change)):
                unavailable = "neither the broker nor the journal accepts changes now"
                raise unless_sent(sent, Unavailable(unavailable, retry_after=2.0)) from error
            raise OutcomeUnknown("the change was sent and not confirmed; it may appear") from error

    async def _take_back(self, change: Change) -> bool:
        try:
            return await self._mirror.take_back(change)
        except (MirrorUnavailable, MirrorInDoubt) as error:
            log.warning("take_back_failed", change_id=change.id, error=str(error))
            return False

    def _keep(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.create_task(work, name="commit")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
