"""Asks whether a mirror knows the entities that were created with an Idempotency-Key in the last weeks, so that another
creation is new. Every method raises MirrorUnavailable or MirrorInDoubt."""

from collections.abc import Sequence

from shared.entities.contract import Head
from shared.mirror import keys
from shared.mirror.connection import MirrorConnection


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

    async def load(self, identity: str, entity: str, heads: Sequence[tuple[str, str, Head]]) -> bool:
        """Loads the heads of entities, given as (restaurant, id, head), unless the mirror has the entities. Returns
        False if this is not the warm mirror with that identity."""
        docs = [keys.doc(restaurant, entity, id_) for restaurant, id_, _ in heads]
        arguments = [value for _, _, head in heads for value in (head.version, head.change_id)]
        return bool(await self._redis.script("note_keys", [keys.WARM, keys.KEYS, *docs], [identity, 0, *arguments]))

    async def complete(self, identity: str) -> bool:
        """Notes that the mirror knows all keys. Returns False if this is not the warm mirror with that identity."""
        return bool(await self._redis.script("note_keys", [keys.WARM, keys.KEYS], [identity, 1]))

    async def forget(self) -> None:
        """Notes that the mirror may lack keys, because it is filled again."""
        await self._redis.call("DEL", keys.KEYS)
