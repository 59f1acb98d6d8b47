"""Finishes stale claims: records and reveals the change that its owner left behind when it died or stalled.

A commit finishes the stale claim that stands in its way. The reconciler finishes all others. Finishing is idempotent:
the change keeps its id, so that two instances may finish the same claim, also while its owner does.
"""

import time
from typing import Any, Protocol

import structlog

from shared.entities import registry
from shared.entities.contract import BrokenContract, Change, decode_change
from shared.entities.entity import Entity
from shared.errors import Unavailable
from shared.messaging.topology import lane_of
from shared.mirror.claim_replies import Stale
from shared.mirror.mirror import Mirror
from shared.observability.metrics import RailMetrics
from shared.observability.tracing import Tracer
from shared.rail.order_numbers import with_number_in_event
from shared.rail.record import Recorder, Unrecorded

log = structlog.get_logger(__name__)


class Reveal(Protocol):
    async def __call__(self, entity: Entity, change: Change, state: Any) -> bool: ...


class ClaimFinisher:
    def __init__(
        self,
        mirror: Mirror,
        recorder: Recorder,
        reveal: Reveal,
        *,
        tracer: Tracer | None = None,
        metrics: RailMetrics | None = None,
    ) -> None:
        """`tracer`: adds spans to the traces of other instances' changes when this instance finishes their claims."""
        self._mirror = mirror
        self._recorder = recorder
        self._reveal = reveal
        self._tracer = tracer
        self._metrics = metrics

    async def finish_all(self) -> int:
        """Finishes the stale claims of all tenants. Returns their number. Raises Unavailable, MirrorUnavailable and
        MirrorInDoubt."""
        finished = 0
        for member in await self._mirror.stale_claims():
            stale = await self._mirror.mark(member)
            if stale is None:
                continue
            try:
                await self.finish(stale)
            except BrokenContract as error:
                # The change is broken or of a newer release. Leave the claim to an instance that can read it.
                log.error("claim_not_finished", member=member, reason=error.reason, error=str(error))
                continue
            finished += 1
        return finished

    async def finish(self, stale: Stale) -> None:
        """Records and reveals the change of a stale claim, under its own id. Raises Unavailable, and BrokenContract if
        a newer release made the change."""
        entity, _ = registry.read(decode_change(stale.event))
        event = with_number_in_event(entity, stale.event, stale.number)
        change = decode_change(event)
        entity, state = registry.read(change)
        began = time.time_ns()
        try:
            await self._recorder.record(lane_of(change), event, change.traceparent)
        except Unrecorded as error:
            raise Unavailable("an earlier change of this entity is not finished yet; retry", retry_after=2.0) from error
        await self._reveal(entity, change, state)
        if self._metrics is not None:
            self._metrics.claims_finished.inc()
        # This span is exported even if the trace is not sampled. The request that made the claim never ended its trace,
        # so this span may be the only one that shows what happened to the change.
        if self._tracer is not None:
            found = {"ticketrail.change_id": change.id, "ticketrail.order_id": change.entity_id}
            self._tracer.add(change.traceparent, "finish claim", began, time.time_ns(), attributes=found)
        log.info("claim_finished", change_id=change.id, subject=change.subject, version=change.entityversion)
