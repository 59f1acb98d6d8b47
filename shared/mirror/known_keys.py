"""Whether a mirror knows the orders of the last weeks that were created with an Idempotency-Key, so that another
creation is new. Every method raises MirrorUnavailable or MirrorInDoubt."""

from collections.abc import Sequence

from shared.entities.contract import Head
from shared.mirror import keys
from shared.mirror.connection import MirrorConnection

KeyedOrder = tuple[str, str, Head]
"""Restaurant, id and head of an order."""


class KnownKeys:
    def __init__(self, redis: MirrorConnection) -> None:
        self._redis = redis

    async def lacking(self) -> str | None:
        """Returns the identity of a mirror that does not know all keys. Returns None if it knows them or never was
        warm."""
        if await self._redis.call("EXISTS", keys.KEYS):
            return None
        found: bytes | None = await self._redis.call("HGET", keys.WARM, "identity")
        return None if found is None else found.decode()

    async def note(self, identity: str, orders: Sequence[KeyedOrder], *, last: bool) -> bool:
        """Loads the heads of keyed orders, unless the mirror has the orders. `last`: the mirror knows all keys then.
        Returns False if this is not the warm mirror with that identity."""
        docs = [keys.doc(restaurant, "order", id_) for restaurant, id_, _ in orders]
        heads = [value for _, _, head in orders for value in (head.version, head.change_id)]
        return bool(await self._redis.script("note_keys", [keys.WARM, keys.KEYS, *docs], [identity, int(last), *heads]))

    async def forget(self) -> None:
        """Notes that the mirror may lack keys, because it is filled again."""
        await self._redis.call("DEL", keys.KEYS)
