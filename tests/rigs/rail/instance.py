"""One process with a rail: whole commits, and their steps one by one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from msgspec import structs

from shared.entities import registry
from shared.entities.contract import Change, decode_change, encode
from shared.entities.entity import Entity
from shared.entities.order import ENTITY as ORDER
from shared.mirror.claim_replies import Claimed, ClaimReply, Stale
from shared.mirror.mirror import Mirror
from shared.mirror.stock_texts import claimed_stock_text
from shared.rail.assemble import assemble_rail
from shared.rail.draft import Draft, change_of
from shared.rail.drain import Drainer
from shared.rail.head import Heads
from shared.rail.idempotency import Creations
from shared.rail.journal import Journal
from shared.rail.order_numbers import series_of, with_number
from shared.rail.outcomes import Committed
from shared.rail.record import Durability
from shared.settings import Settings
from tests.rigs import builders
from tests.rigs.rail.changes import State, applied, draft
from tests.rigs.rail.gate import Gate
from tests.rigs.rail.mirror_server import MirrorServer


@asynccontextmanager
async def no_postgres(_: str) -> AsyncIterator[Any]:
    raise ConnectionRefusedError("the rig has no PostgreSQL")
    yield


class RailRig:
    """The rail uses `mirror` and `broker` instead of connections of its own. `gate` holds the calls of the rail and the
    drainer to the given mirror, broker and journal, but not those of the test. `rail_options` are passed on to
    `assemble_rail`. `creations` looks for earlier ones in the mirror alone."""

    def __init__(
        self,
        settings: Settings,
        server: MirrorServer,
        *,
        restaurant: str = builders.RESTAURANT,
        journal: Journal | None = None,
        mirror: Mirror | None = None,
        broker: Any = None,
        gate: Gate | None = None,
        **rail_options: Any,
    ) -> None:
        def gated(part: Any) -> Any:
            return part if gate is None or part is None else gate.before(part, self)

        self.server, self.restaurant, self.journal = server, restaurant, journal
        parts = assemble_rail(
            settings, mirror=gated(mirror), publisher=gated(broker), journal=gated(journal), **rail_options
        )
        self.mirror: Mirror = mirror or parts.mirror
        self.publisher, self.recorder, self.rail = parts.publisher, parts.recorder, parts.rail
        self.creations = Creations(parts.rail, Heads(self.mirror, no_postgres))
        self.drainer = Drainer(gated(journal), parts.publisher) if journal else None
        self._parts = parts

    async def up(self, *, publisher: bool = True) -> None:
        if self.journal:
            await self.journal.open()
        if publisher:
            await self.publisher.start(wait=10)
            assert self.publisher.connected

    async def down(self) -> None:
        if self.drainer:
            await self.drainer.stop()
        await self._parts.close()
        await self.server.close()
        await self.close_journal()

    async def close_journal(self) -> None:
        if self.journal:
            await self.journal.close()

    @property
    def journal_depth(self) -> int:
        return self.journal.depth if self.journal else 0

    # -- drafts ------------------------------------------------------------------------------------------------

    def creation(self, **fields: Any) -> Draft:
        return draft(ORDER, builders.order(items=1, order_number="", restaurant_id=self.restaurant, **fields))

    def update(self, on: Committed, **fields: Any) -> Draft:
        later = on.state.updated_at + timedelta(seconds=1)
        return draft(ORDER, structs.replace(on.state, updated_at=later, **fields), (on.head, on.state))

    # -- the steps of a commit ---------------------------------------------------------------------------------

    async def claim(self, draft: Draft) -> tuple[Change, ClaimReply]:
        """Returns the change with the number of the claim, and the mirror's reply."""
        change, event = change_of(draft), encode(change_of(draft))
        series, lane = series_of(draft.entity, draft.state), draft.record_lane
        stock = claimed_stock_text(draft.entity, draft.state, draft.before)
        reply = await self.mirror.claim(draft.entity, change, event, draft.base_head, series, stock, lane=lane)
        if isinstance(reply, Claimed):
            change, _ = with_number(draft.entity, change, draft.state, reply.number)
        return change, reply

    async def record(self, change: Change) -> Durability:
        return await self.recorder.record(registry.ENTITIES[change.entity].lane, encode(change))

    async def reveal(self, *changes: Change) -> None:
        await self.mirror.apply([applied(change) for change in changes])

    async def put(self, entity: Entity, state: Any, base: State | None = None) -> State:
        """Commits a change without a fault."""
        done = await self.rail.commit(draft(entity, state, base))
        assert done.visible
        return done.head, done.state

    # -- stale claims ------------------------------------------------------------------------------------------

    async def stale_claims(self) -> list[str]:
        """The members of this restaurant only, because other tests may use the same Redis."""
        found = await self.mirror.stale_claims(limit=10_000)
        return [member for member in found if member.startswith(self.restaurant)]

    async def mark_stale(self) -> list[Stale]:
        found = [await self.mirror.mark(member) for member in await self.stale_claims()]
        return [left for left in found if left is not None]

    async def finish_stale(self) -> None:
        for left in await self.mark_stale():
            await self.rail.claim_finisher.finish(left)

    # -- reading back ------------------------------------------------------------------------------------------

    async def journaled(self) -> list[Change]:
        return [decode_change(entry.event) for entry in await self.journal.oldest(10_000)] if self.journal else []

    async def read(self, id_: str, entity: Entity = ORDER) -> State | None:
        return (await self.read_all([id_], entity)).get(id_)

    async def read_all(self, ids: list[str], entity: Entity = ORDER) -> dict[str, State]:
        _, found = await self.mirror.read(self.restaurant, entity.name, ids)
        pairs = zip(ids, found, strict=True)
        return {id_: (one.head, entity.decode_state(one.state)) for id_, one in pairs if one is not None}
