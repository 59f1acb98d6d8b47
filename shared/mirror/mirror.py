"""The mirror: claims, states and their sync states, in Redis or Valkey.

Every method can raise `MirrorUnavailable` (nothing was done) or `MirrorInDoubt` (it may have been executed); see
connection.py.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct

from shared.entities import registry
from shared.entities.contract import Change, Head, Lane, Outline
from shared.entities.entity import Entity, Hold, at_micros
from shared.messaging.position import LogPosition
from shared.mirror import keys
from shared.mirror.claim_replies import ClaimReply, Stale, claim_reply, stale
from shared.mirror.connection import MirrorConnection
from shared.mirror.identity import MirrorIdentity, countable
from shared.mirror.known_keys import KnownKeys
from shared.mirror.stock_texts import Stock, hold_text, stock_text
from shared.mirror.stored_heads import FailedState, FeedNote, StoredHead


class Document(Struct, frozen=True):
    """An encoded state in the mirror, with its sync state."""

    head: Head
    state: bytes
    pending: bool = False
    failure: bytes = b""
    """The last failure as JSON: {"error", "attempts", "last_attempt"}. Empty if no write failed."""
    conflict: bool = False
    """True while a conflict of the entity is open."""


class Apply(Struct, frozen=True):
    """One state for `Mirror.apply`. `how` is "reveal", "stored" or "late"; scripts/apply.lua describes them."""

    entity: Entity
    state: Any
    head: Head
    encoded: bytes
    accepted_at: datetime
    how: str = "reveal"


NOTHING_APPLIED = LogPosition(-1, 0)
"""The position of a mirror that the mirror writer has begun to fill, or that must be read again from an older place."""


class Mirror:
    def __init__(self, url: str, *, timeout: float, stale_seconds: float) -> None:
        self._redis = MirrorConnection(url, timeout=timeout)
        self.known_keys = KnownKeys(self._redis)
        self._stale_ms = int(stale_seconds * 1000)

    @property
    def available(self) -> bool:
        return self._redis.available

    @property
    def down(self) -> bool:
        return self._redis.down

    async def check(self) -> None:
        await self._redis.check()

    async def close(self) -> None:
        await self._redis.close()

    # -- claims ------------------------------------------------------------------------------------------------

    async def claim(
        self,
        entity: Entity,
        change: Change,
        event: bytes,
        base: Head | None,
        series: str | None,
        stock: str = "",
        *,
        lane: Lane | None = None,
        within: float | None = None,
        ask: bool = False,
    ) -> ClaimReply:
        """Claims the next version of an entity for a change. Repeating the call with the same change is harmless.

        `base`: the head that the change was built on, or None for a new entity. `series`: the business day, if the
        change needs an order number. `stock`: the result of `claimed_stock_text`. `lane`: the lane in which the change
        will be recorded, by default that of its entity. `within`: the number of seconds after which the server must
        refuse the claim; the reply is then Cold. `ask`: reply Ask if the mirror does not know all keys, because this
        creation may be a repeat.
        """
        latest = None if within is None else self._redis.server_ms(within)
        restaurant, name, id_ = change.restaurantid, entity.name, change.entity_id
        reply = await self._redis.script(
            "claim",
            [
                keys.doc(restaurant, name, id_),
                keys.claim(restaurant, name, id_),
                keys.CLAIMS,
                keys.WARM,
                keys.number(restaurant, series or "-"),
                keys.KEYS,
            ],
            [
                change.id,
                change.entityversion,
                base.version if base else 0,
                base.change_id if base else "",
                event,
                1 if series else 0,
                keys.member(restaurant, name, id_),
                self._stale_ms,
                stock,
                "" if latest is None else latest,
                (lane or entity.lane).value,
                int(ask),
            ],
        )
        if reply[0] == b"late":
            self._redis.reconnect()  # the server answers, so it is not frozen: its clock has jumped
        return claim_reply(reply)

    async def take_back(self, change: Change) -> bool:
        """Removes the claim of a change that was never sent. Returns True if the claim is gone, so that the change will
        not be recorded, and False if the change may be recorded."""
        restaurant, entity, id_ = change.restaurantid, change.entity, change.entity_id
        reply = await self._redis.script(
            "take_back",
            [keys.claim(restaurant, entity, id_), keys.CLAIMS, keys.doc(restaurant, entity, id_), keys.WARM],
            [change.id, keys.member(restaurant, entity, id_)],
        )
        return bool(reply)

    async def stale_claims(self, *, limit: int = 100) -> list[str]:
        """Returns up to `limit` stale claims, oldest first, as members of the claims index (see `keys.member`). A claim
        is also stale if the server's clock was set back after it was made."""
        found = await self._redis.script("stale_claims", [keys.CLAIMS], [self._stale_ms, limit])
        return [member.decode() for member in found]

    async def mark(self, member: str) -> Stale | None:
        """Marks a stale claim and returns it. Returns None if there is nothing to finish."""
        restaurant, entity, id_ = member.split("|")
        reply = await self._redis.script(
            "mark",
            [keys.doc(restaurant, entity, id_), keys.claim(restaurant, entity, id_), keys.CLAIMS, keys.WARM],
            [member, self._stale_ms],
        )
        return stale(reply) if reply else None

    # -- states ------------------------------------------------------------------------------------------------

    async def apply(
        self,
        states: Sequence[Apply],
        *,
        at: LogPosition | None = None,
        note: LogPosition | None = None,
        server: str = "",
        only_warm: bool = False,
    ) -> list[int] | None:
        """Writes states under the guard, in one atomic step.

        `at`: write only to a mirror that has applied the log at least this far; one that has lost a part of it becomes
        cold. `note`: move the position of the mirror forward to this one in the same step. `server`: write only to this
        server (see `server`). `only_warm`: write only to it while it is warm, because the caller sends only the changes
        that `missing` returned. Returns the indexes of late states whose document is missing, or None if this is not
        the mirror that the caller has filled; then nothing is written.
        """
        all_keys = [keys.LOG, keys.CLAIMS, keys.WARM]
        positions: list[str | bytes | int | float] = [*(at or ("", "")), *(note or ("", ""))]
        arguments = [*positions, server, int(only_warm)]
        for state in states:
            restaurant, name, id_ = state.state.restaurant_id, state.entity.name, state.state.id
            series, number = "-", ""
            if numbering := state.entity.numbering:
                series, number = numbering.business_day(state.state), numbering.number(state.state)
            all_keys += [
                keys.doc(restaurant, name, id_),
                keys.claim(restaurant, name, id_),
                keys.live(restaurant, name),
                keys.pending(restaurant, name),
                keys.number(restaurant, series),
            ]
            arguments += [
                state.head.version,
                state.head.change_id,
                state.encoded,
                state.entity.score(state.state),
                int(state.accepted_at.timestamp() * 1000),
                keys.member(restaurant, name, id_),
                state.how,
                number if countable(number) else "",
                stock_text(state.entity, state.state),
            ]
        reply = await self._redis.script("apply", all_keys, arguments)
        return None if reply[0] == b"rewind" else [int(place) - 1 for place in reply[1:]]

    async def missing(self, changes: Sequence[Outline]) -> list[int]:
        """Returns the indexes of the changes for which `apply` would write something."""
        all_keys: list[str] = []
        arguments: list[str | bytes | int | float] = []
        for one in changes:
            restaurant, (name, _, id_) = one.restaurantid, one.subject.partition("/")
            all_keys += [keys.doc(restaurant, name, id_), keys.claim(restaurant, name, id_)]
            arguments += [one.entityversion, one.id]
        return [place - 1 for place in await self._redis.script("missing", all_keys, arguments)]

    async def settle(
        self,
        entities: Sequence[StoredHead],
        *,
        at: int | None = None,
        note: FeedNote | None = None,
        mark: bool = False,
    ) -> list[int] | None:
        """Marks states as synced that PostgreSQL has, and returns the indexes of the entities that the mirror lacks or
        has in an older state.

        `at`: settle only in a mirror whose feed position has reached this xid; for another mirror the reply is None.
        `note`: set the feed position of the mirror in the same step, unless indexes are returned. `mark`: mark states
        as pending that are above the state in PostgreSQL."""
        all_keys: list[str] = [keys.FEED]
        arguments: list[str | bytes | int | float] = [
            "" if at is None else at,
            "" if note is None else note.position,
            "" if note is None else note.xid,
            int(note is not None and note.again),
            int(mark),
        ]
        for one in entities:
            all_keys += [
                keys.doc(one.restaurant_id, one.entity, one.id),
                keys.pending(one.restaurant_id, one.entity),
                keys.failed(one.restaurant_id, one.entity),
                keys.live(one.restaurant_id, one.entity),
            ]
            arguments += [0, ""] if one.head is None else [one.head.version, one.head.change_id]
        reply = await self._redis.script("settle", all_keys, arguments)
        return None if reply[0] == b"rewind" else [int(place) - 1 for place in reply[1:]]

    async def feed_position(self) -> str | None:
        """Returns the feed position of the mirror, or None if it has none, because it is not filled."""
        found = await self._redis.call("HGET", keys.FEED, "position")
        return None if found is None else found.decode()

    async def note_failures(self, failures: Sequence[FailedState]) -> list[int]:
        """Stores the failures of pending states. Returns the indexes of those that the mirror does not have."""
        all_keys: list[str] = []
        arguments: list[str | bytes | int | float] = []
        for one in failures:
            all_keys += [
                keys.doc(one.restaurant_id, one.entity, one.id),
                keys.pending(one.restaurant_id, one.entity),
                keys.failed(one.restaurant_id, one.entity),
            ]
            arguments += [one.change_id, one.failure]
        reply = await self._redis.script("note_failures", all_keys, arguments) if failures else []
        return [int(place) - 1 for place in reply]

    async def read(self, restaurant: str, entity: str, ids: Sequence[str]) -> tuple[bool, list[Document | None]]:
        """Returns (whether the mirror is warm, documents in the order of the ids). If the mirror is cold, an entity
        without a document may still exist."""
        reply = await self._redis.script(
            "read",
            [
                keys.WARM,
                keys.pending(restaurant, entity),
                keys.failed(restaurant, entity),
                keys.CONFLICTS,
                *(keys.doc(restaurant, entity, id_) for id_ in ids),
            ],
            [keys.member(restaurant, entity, ""), *ids],
        )
        found: list[Document | None] = []
        for i in range(1, len(reply), 6):
            version, change, state, pending, failure, conflict = reply[i : i + 6]
            found.append(
                None
                if version is None or state is None
                else Document(Head(int(version), change.decode()), state, bool(pending), failure, bool(conflict))
            )
        return bool(reply[0]), found

    async def pending_ids(self, restaurant: str, entity: str) -> list[str]:
        """Returns the ids of pending entities, newest first."""
        found = await self._redis.call("ZREVRANGE", keys.pending(restaurant, entity), 0, -1)
        return [id_.decode() for id_ in found]

    async def failed_ids(self, restaurant: str, entity: str) -> list[str]:
        """Returns the ids of pending entities whose last attempt to write to PostgreSQL failed, newest first."""
        pending = keys.pending(restaurant, entity)
        ids = await self._redis.call("HKEYS", keys.failed(restaurant, entity))
        places = await self._redis.call("ZMSCORE", pending, *ids) if ids else []
        found = [(float(place), id_.decode()) for id_, place in zip(ids, places, strict=True) if place is not None]
        return [id_ for _, id_ in sorted(found, reverse=True)]

    async def conflicts(self) -> set[str]:
        """Returns the members (see `keys.member`) that have an open conflict in the mirror, over all
        tenants."""
        return {member.decode() for member in await self._redis.call("SMEMBERS", keys.CONFLICTS)}

    async def note_conflicts(self, opened: Sequence[str], closed: Sequence[str]) -> None:
        """Adds the members (see `keys.member`) in `opened`, which have an open conflict. Removes the members in
        `closed`, whose conflicts are all closed."""
        if opened:
            await self._redis.call("SADD", keys.CONFLICTS, *opened)
        if closed:
            await self._redis.call("SREM", keys.CONFLICTS, *closed)

    async def accepted_at(self, restaurant: str, entity: str, ids: Sequence[str]) -> list[float | None]:
        """Returns the times when the current states of these ids were accepted, in Unix seconds. The time is None for
        an id that the mirror lacks."""
        found = await asyncio.gather(*(self._redis.call("HGET", keys.doc(restaurant, entity, id_), "p") for id_ in ids))
        return [None if at is None else int(at) / 1000 for at in found]

    async def live_ids(
        self, restaurant: str, entity: str, *, max_score: float = float("inf"), limit: int = -1
    ) -> list[str]:
        """Returns up to `limit` ids in the live window whose index score is at most `max_score`, newest first. A limit
        of -1 means all."""
        found = await self._redis.call(
            "ZREVRANGEBYSCORE", keys.live(restaurant, entity), max_score, "-inf", "LIMIT", 0, limit
        )
        return [id_.decode() for id_ in found]

    async def trim(self, restaurant: str, entity: str, seen: dict[str, str]) -> int:
        """Removes documents from the live window, unless they are pending or have changed since the caller saw them.
        Keeps the heads of those that may have been created with an Idempotency-Key.

        `seen`: id -> the change id that the caller saw. Returns the number of removed documents."""
        keyed = registry.ENTITIES[entity].keyed
        left = await self._redis.script(
            "trim",
            [
                keys.live(restaurant, entity),
                keys.pending(restaurant, entity),
                *(keys.doc(restaurant, entity, id_) for id_ in seen),
            ],
            [int(keyed is not None), keyed.mark if keyed else "", *seen.values()],
        )
        return int(left)

    async def counts(self, restaurant: str, entity: str) -> tuple[int, int]:
        """Returns the numbers of (pending, failed) entities."""
        pending = await self._redis.call("ZCARD", keys.pending(restaurant, entity))
        failed = await self._redis.call("HLEN", keys.failed(restaurant, entity))
        return int(pending), int(failed)

    # -- stock and limits --------------------------------------------------------------------------------------

    async def stock(self, restaurant: str, items: Sequence[str]) -> list[Stock | None]:
        """Returns the stock of each inventory item: None for an item that the mirror does not count, and for every item
        if the mirror is cold."""
        fields = ("count", "sum", "since")
        warm, *found = await asyncio.gather(
            self.is_warm(), *(self._redis.call("HMGET", keys.stock(restaurant, item), *fields) for item in items)
        )
        return [
            None if count is None or not warm else Stock(int(count), int(held or 0), at_micros(int(since)))
            for count, held, since in found
        ]

    async def hold(self, orders: Sequence[tuple[str, str, Sequence[Hold]]]) -> None:
        """Sets the holds of orders, given as (restaurant, order, holds). Skips orders in the live window."""
        docs = [keys.doc(restaurant, "order", order) for restaurant, order, _ in orders]
        await self._redis.script("fill_stock_holds", docs, [hold_text(holds) for _, _, holds in orders])

    async def take_tokens(self, caller: str, capacity: int, rate: float, requested: int) -> tuple[int, int, float]:
        """Takes up to `requested` tokens from the bucket of a caller. The bucket gains `rate` tokens per second.

        Returns (tokens taken, tokens left, seconds until the bucket has a token).
        """
        taken, left, wait = await self._redis.script("bucket", [keys.bucket(caller)], [capacity, rate, requested, 1])
        return int(taken), int(left), int(wait) / 1000

    async def give_back_token(self, caller: str, capacity: int, rate: float) -> None:
        await self._redis.script("bucket", [keys.bucket(caller)], [capacity, rate, -1, -1])

    async def make_familiar(self, caller: str, ttl_seconds: int) -> None:
        """Notes that a caller, an account at an address, has signed in."""
        await self._redis.call("SET", keys.familiar(caller), 1, "EX", ttl_seconds)

    async def is_familiar(self, caller: str) -> bool:
        return bool(await self._redis.call("EXISTS", keys.familiar(caller)))

    # -- restaurants -------------------------------------------------------------------------------------------

    async def keep_restaurant(self, restaurant_id: str, encoded: bytes) -> None:
        await self._redis.call("SET", keys.restaurant(restaurant_id), encoded)
        await self._redis.call("SADD", keys.RESTAURANTS, restaurant_id)

    async def restaurant(self, restaurant_id: str) -> bytes | None:
        found: bytes | None = await self._redis.call("GET", keys.restaurant(restaurant_id))
        return found

    async def restaurant_ids(self) -> list[str]:
        return [id_.decode() for id_ in await self._redis.call("SMEMBERS", keys.RESTAURANTS)]

    # -- the state of the mirror writer ------------------------------------------------------------------------

    async def log_position(self) -> LogPosition | None:
        """Returns how far the mirror writer has applied the log, or None if no mirror writer has begun to fill it."""
        offset, crc = await self._redis.call("HMGET", keys.LOG, "offset", "crc")
        return None if offset is None else LogPosition(int(offset), int(crc))

    async def begin_log(self) -> None:
        """Begins to fill a mirror by setting its position to NOTHING_APPLIED. After that, `apply` with `at` writes only
        to this mirror and not to a later one. Does nothing if the mirror already has a position."""
        await self._redis.script("begin_log", [keys.LOG, keys.WARM], NOTHING_APPLIED)

    async def go_back(self, broken: LogPosition, to: LogPosition) -> bool:
        """Moves the position of the mirror back, because the log does not prove `broken`. Returns False if the mirror
        has another position. The mirror stays warm or cold."""
        return bool(await self._redis.script("go_back", [keys.LOG], [*broken, *to]))

    async def server(self) -> tuple[str, bool]:
        """Returns (the name of the server, whether its mirror is warm). A server gets another name when it is started
        or promoted, so one that keeps its name has kept its data, unless somebody has replaced them."""
        name, identity = await self._redis.script("server", [keys.WARM], [])
        return name.decode(), identity != b""

    async def is_warm(self) -> bool:
        _, warm = await self.server()
        return warm

    async def warm(self, at: LogPosition, server: str, identity: MirrorIdentity) -> bool:
        """Makes the mirror of a server warm, under a new identity. Does nothing if it is warm already. Returns False if
        this is not the mirror that the caller has filled up to `at`."""
        return bool(
            await self._redis.script(
                "warm", [keys.LOG, keys.WARM], [*at, server, identity.id, identity.prefix, identity.prefix_until]
            )
        )

    async def clock_skew_seconds(self) -> float:
        """Returns the number of seconds by which the server's clock is ahead of this host's."""
        return await self._redis.clock_skew_seconds()
