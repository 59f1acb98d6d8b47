"""Finishes stale claims: records and reveals the change that its owner left behind when it died or stalled.

A commit finishes the stale claim that stands in its way. The reconciler finishes all others. Finishing is idempotent:
the change keeps its id, so that two instances may finish the same claim, even while its owner does.

A claim that cannot be finished holds back no other one: the round passes over it, and later rounds try it again after a
growing pause. Reasons are a change that the broker does not confirm and no journal takes, and a change of a newer
release. The claims are finished one after the other, so that none shares a message with one that the broker refuses.
"""

import time
from collections.abc import Callable

import structlog
from msgspec import Struct

from shared.entities import registry
from shared.entities.contract import BrokenContract, decode_change
from shared.errors import Unavailable
from shared.mirror.claim_replies import Stale
from shared.mirror.connection import MirrorInDoubt
from shared.mirror.mirror import Mirror
from shared.observability.metrics import RailMetrics
from shared.observability.tracing import Tracer
from shared.rail.order_numbers import with_number_in_event
from shared.rail.record import Recorder, Unrecorded
from shared.rail.reveal import Reveal

log = structlog.get_logger(__name__)


_CLAIMS_PER_ROUND = 100
_MAX_ROUND_SECONDS = 10.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 5.0, 60.0


class _Unfinished(Struct):
    """A claim that could not be finished."""

    attempts: int
    next_at: float
    """The next attempt may begin at this time, on the clock of the finisher."""


class ClaimFinisher:
    def __init__(
        self,
        mirror: Mirror,
        recorder: Recorder,
        reveal: Reveal,
        *,
        tracer: Tracer | None = None,
        metrics: RailMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tracer`: adds spans to the traces of other instances' changes when this instance finishes their claims.
        `clock` counts seconds."""
        self._mirror = mirror
        self._recorder = recorder
        self._reveal = reveal
        self._tracer = tracer
        self._metrics = metrics
        self._clock = clock
        self._unfinished: dict[str, _Unfinished] = {}
        """The member of a claim that could not be finished -> its attempts."""

    @property
    def unfinished(self) -> int:
        """The number of stale claims whose last attempt failed."""
        return len(self._unfinished)

    async def finish_all(self) -> int:
        """Finishes the stale claims of all tenants, and passes over those that cannot be finished now. Returns the
        number of finished claims. Raises MirrorUnavailable, and MirrorInDoubt if the claims cannot be listed."""
        members = await self._mirror.stale_claims(limit=_CLAIMS_PER_ROUND + len(self._unfinished))
        listed = set(members)
        # Another instance, or the next writer of the entity, has finished the claims that are no longer listed.
        self._unfinished = {member: one for member, one in self._unfinished.items() if member in listed}
        due = [member for member, one in self._unfinished.items() if one.next_at <= self._clock()]
        finished, ends_at = 0, self._clock() + _MAX_ROUND_SECONDS
        # Claims that failed before come last, so that they take the time of a round from no other claim.
        for member in [*(member for member in members if member not in self._unfinished), *due]:
            try:
                stale = await self._mirror.mark(member)
                if stale is not None and not await self.finish(stale):
                    raise Unavailable("the change is recorded, and the mirror did not take it")
            except (Unavailable, MirrorInDoubt, BrokenContract) as error:
                self._pass_over(member, error)
            else:
                finished += stale is not None
                self._unfinished.pop(member, None)
            if self._clock() >= ends_at:
                break
        return finished

    def _pass_over(self, member: str, error: Exception) -> None:
        attempts = self._unfinished[member].attempts + 1 if member in self._unfinished else 1
        pause = min(_FIRST_PAUSE_SECONDS * 2 ** min(attempts - 1, 10), _MAX_PAUSE_SECONDS)
        self._unfinished[member] = _Unfinished(attempts, self._clock() + pause)
        log.error("claim_not_finished", member=member, attempts=attempts, error=str(error) or type(error).__name__)

    async def finish(self, stale: Stale) -> bool:
        """Records and reveals the change of a stale claim, under its own id. Returns whether the mirror has it. Raises
        Unavailable, and BrokenContract if a newer release made the change."""
        entity, _ = registry.read(decode_change(stale.event))
        event = with_number_in_event(entity, stale.event, stale.number)
        change = decode_change(event)
        entity, state = registry.read(change)
        began = time.time_ns()
        try:
            await self._recorder.record(stale.lane, event, change.traceparent)
        except Unrecorded as error:
            raise Unavailable("an earlier change of this entity is not finished yet; retry", retry_after=2.0) from error
        visible = await self._reveal(entity, change, state)
        if self._metrics is not None:
            self._metrics.claims_finished.inc()
        # This span is exported even if the trace is not sampled. The request that made the claim never ended its trace,
        # so this span may be the only one that shows what happened to the change.
        if self._tracer is not None:
            found = {"ticketrail.change_id": change.id, "ticketrail.order_id": change.entity_id}
            self._tracer.add(change.traceparent, "finish claim", began, time.time_ns(), attributes=found)
        log.info("claim_finished", change_id=change.id, subject=change.subject, version=change.entityversion)
        return visible
