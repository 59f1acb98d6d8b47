"""Repeated requests: a repeat creates no second entity and adds no second fact.

    entity   its id is derived from the caller, the route and the Idempotency-Key, so a repeat has the same id. The
             repeat loses its claim to the first request. Without a claim, this instance or the stores know the first.
             The state keeps the hash of the request that created it
    fact     a payment or a move has the id of the body, else one that is derived in the same way and from its entity.
             So the state and the tables keep it once, in every fork. If a request has both, the fact keeps what was
             derived from the key beside its id, and the key decides: with another id it is another request (in a
             fork both count, docs/losses.md)

The same key with another body is refused (422), and so is the same id with other content (409). Both hold also after
the entity has changed or was deleted.
"""

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

import msgspec
from msgspec import UNSET, Struct, UnsetType

from shared.entities.entity import Entity
from shared.errors import Conflict, InvalidInput, Unavailable
from shared.rail.commit import Rail
from shared.rail.draft import Draft
from shared.rail.head import Standing
from shared.rail.outcomes import ClaimLost, Committed, NoClaim
from shared.whole_numbers import integer_if_whole

_NAMESPACE = uuid5(NAMESPACE_URL, "https://ticketrail.example/idempotency-key")
_KEY = re.compile(r"^[\x21-\x7e]{1,200}$")
_DECODER = msgspec.json.Decoder(float_hook=integer_if_whole)
_TWIN_TIMEOUT_SECONDS = 4.0
"""A repeat waits this long for the first request. A claim becomes stale and is finished in less."""
_PAUSE_SECONDS = 0.02
_LOOK_TIMEOUT_SECONDS = 0.2
"""The wait for PostgreSQL while the mirror does not know all keys yet."""
_MAX_RECENT = 10_000


def checked_key(key: str | None) -> str | None:
    """Returns the value of the header Idempotency-Key. Raises InvalidInput."""
    if key is not None and not _KEY.match(key):
        raise InvalidInput("must be 1 to 200 visible ASCII characters", field="Idempotency-Key")
    return key


def request_hash(body: bytes) -> str:
    """Returns the SHA-256 of the canonical JSON of a request. It covers the fields that were sent, and not those of a
    Struct, so that a release with a further optional field agrees. 1, 1.0 and 1e0 are one number, as in `read_body`."""
    return hashlib.sha256(msgspec.json.encode(_DECODER.decode(body), order="sorted")).hexdigest()


def entity_id(caller: str, route: str, key: str | None) -> str:
    """Returns the id of a new entity. It is the same for the same caller, route and key, and random without a key."""
    return str(uuid4() if key is None else uuid5(_NAMESPACE, f"{caller}|{route}|{key}"))


def key_reused() -> InvalidInput:
    return InvalidInput("this key was used for another request", field="Idempotency-Key", code="idempotency_key_reused")


class Fact(Protocol):
    """A payment or a move."""

    @property
    def id(self) -> str: ...

    @property
    def request_key(self) -> str | UnsetType:
        """The id that was derived from the Idempotency-Key of the request, if that also had an id."""
        ...


F = TypeVar("F", bound=Fact)


class FactId(Struct, frozen=True):
    """The id of a new fact."""

    id: str
    given: bool
    """Whether the body has the id."""
    key: str | None
    """The id that is derived from the Idempotency-Key."""

    @classmethod
    def of(cls, given: UUID | None, target: str, caller: str, route: str, key: str | None) -> "FactId":
        """`given`: the id in the body. `target`: the id of the entity that gets the fact. `caller`, `route` and `key`
        are those of `entity_id`."""
        derived = None if key is None else entity_id(f"{target}|{caller}", route, key)
        return cls(str(given or derived or uuid4()), given is not None, derived)

    @property
    def repeatable(self) -> bool:
        """Whether a repeat of the request has the same id."""
        return self.given or self.key is not None

    @property
    def request_key(self) -> str | UnsetType:
        """The field of the new fact. A fact without an id of the body has the derived one as its id."""
        return self.key if self.given and self.key is not None else UNSET

    def earlier(self, facts: Iterable[F]) -> F | None:
        """Returns the fact that an earlier request with this key, or else with this id, has added."""
        facts = tuple(facts) if self.repeatable else ()
        by_key = (one for one in facts if self.key is not None and self.key in (one.id, one.request_key))
        return next(by_key, None) or next((one for one in facts if one.id == self.id), None)

    def check_repeat(self, earlier: Fact, what: str, *, same: bool) -> None:
        """Checks that this request repeats the one that has added a fact. `same`: both have the same content. `what`:
        the kind of fact, such as "payment". Raises InvalidInput for a key that was used for another request, and
        Conflict for an id that was."""
        if self.key is not None and self.key in (earlier.id, earlier.request_key):
            had_id = earlier.id != self.key
            if not same or had_id != self.given or (self.given and earlier.id != self.id):
                raise key_reused()
        elif not same:
            raise Conflict(f"this id was used for another {what}", code=f"{what}_id_reused", field="id")


class Earlier(Protocol):
    """Finds what an earlier creation made (`Heads`)."""

    async def earlier(self, entity: Entity, restaurant: str, id_: str) -> Standing | None: ...


class Creations:
    """Creates entities, one for each id."""

    def __init__(
        self,
        rail: Rail,
        heads: Earlier,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`clock` and `sleep` count seconds."""
        self._rail = rail
        self._heads = heads
        self._clock = clock
        self._sleep = sleep
        self._under_way: dict[str, asyncio.Event] = {}
        # Creations without a claim, the oldest first. Until PostgreSQL has one, only this table can recognise a repeat.
        self._recent: dict[str, Standing] = {}

    async def create(self, draft: Draft) -> Committed | Standing:
        """Commits a creation, even if the caller is cancelled meanwhile. Returns what an earlier creation with this id
        has made, if there was one. Raises InvalidInput, OutOfStock, Unavailable, OutcomeUnknown, and ClaimLost if an
        earlier creation is still under way after four seconds."""
        id_, deadline = draft.state.id, self._clock() + _TWIN_TIMEOUT_SECONDS
        while True:
            if (recent := self._recent.get(id_)) is not None:
                return await self._earlier(draft) or recent  # it may have changed since
            lost: ClaimLost | None = None
            if (twin := self._under_way.get(id_)) is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(twin.wait(), deadline - self._clock())
            else:
                # Nothing is awaited since the look, so the second of two concurrent repeats sees the first one.
                self._under_way[id_] = asyncio.Event()
                try:
                    return await self._rail.run(self._create(draft))
                except ClaimLost as error:  # an earlier creation is under way in another instance
                    lost = error
            if not draft.keyed or self._clock() > deadline:
                raise lost or ClaimLost()
            if twin is None:
                await self._sleep(_PAUSE_SECONDS)

    async def _create(self, draft: Draft) -> Committed | Standing:
        try:
            none: NoClaim | None = None
            while none is None or none.asked:
                try:
                    return await self._rail.commit(draft, after=none)
                except NoClaim as error:
                    none = error
                    if draft.keyed and (found := await self._earlier(draft, none)):
                        return found
                except ClaimLost as lost:
                    if lost.head is None:
                        raise
                    if found := lost.standing or await self._earlier(draft):
                        return found
                    raise Unavailable(
                        f"the {draft.entity.name} was created earlier and cannot be read now", retry_after=2.0
                    ) from lost
            made = await self._rail.commit_unclaimed(draft, none)
            if draft.keyed:
                while len(self._recent) >= _MAX_RECENT:
                    del self._recent[next(iter(self._recent))]
                self._recent[draft.state.id] = Standing(made.head, made.state, made.raw)
            return made
        finally:
            self._under_way.pop(draft.state.id).set()

    async def _earlier(self, draft: Draft, none: NoClaim | None = None) -> Standing | None:
        # If no store can answer, the creation continues. A repeat has the same id, so there is still only one entity.
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(_LOOK_TIMEOUT_SECONDS if none and none.asked else None):
                return await self._heads.earlier(draft.entity, draft.state.restaurant_id, draft.state.id)
        return None
