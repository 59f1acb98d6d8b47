"""One Redis as a mirror, which a test makes warm or cold, wipes, copies and rolls back."""

import asyncio
from collections.abc import Sequence

from shared.mirror import keys
from shared.mirror.connection import MirrorConnection
from shared.mirror.mirror import LogState, Mirror

FRESH = LogState("test", -1)
"""The log state of a mirror that has read nothing."""
_FORMER_SERVER = "0" * 40

Copy = Sequence[tuple[bytes, int, bytes]]
"""A copy of a mirror: key, time to live in ms, value in the format of Redis's DUMP."""


class MirrorServer:
    def __init__(self, url: str) -> None:
        self._redis = MirrorConnection(url, timeout=5.0)
        self.call = self._redis.call
        self.mirror = Mirror(url, timeout=5.0, stale_seconds=3600.0)

    async def close(self) -> None:
        await self.mirror.close()
        await self._redis.close()

    async def warm(self, state: LogState = FRESH, series: Sequence[tuple[str, str]] = (), gap: int = 0) -> None:
        """Makes the mirror warm, as the mirror writer does at the end of the log."""
        await self.mirror.begin_log(state)
        assert await self.mirror.warm(state, series, gap)

    async def cool(self) -> None:
        """Makes the mirror cold, as it is after a restart until the mirror writer has filled it."""
        await self.call("DEL", keys.WARM)

    async def wipe(self) -> None:
        await self.call("FLUSHALL")

    async def copy(self) -> Copy:
        every = await self.call("KEYS", "*")
        lives = await asyncio.gather(*(self.call("PTTL", key) for key in every))
        values = await asyncio.gather(*(self.call("DUMP", key) for key in every))
        return [(key, max(life, 0), value) for key, life, value in zip(every, lives, values, strict=True)]

    async def roll_back(self, copy: Copy) -> None:
        """Acts like a failover to a replica that lagged: the data is older and has the stamps of the former server."""
        await self.wipe()
        await asyncio.gather(*(self.call("RESTORE", key, life, value) for key, life, value in copy))
        if await self.call("EXISTS", keys.WARM):
            await self.call("SET", keys.WARM, _FORMER_SERVER)
        for member in await self.claims():
            await self.claimed_by_former_server(*member.split("|"))

    async def claimed_by_former_server(self, restaurant: str, entity: str, id_: str) -> None:
        """Makes a claim look as if a lost mirror had taken it and this mirror were a copy."""
        claim = keys.claim(restaurant, entity, id_)
        if await self.call("HEXISTS", claim, "server"):
            await self.call("HSET", claim, "server", _FORMER_SERVER)

    async def age_claims(self) -> None:
        """Makes every claim an hour older, so that it is stale."""
        for member in await self.claims():
            claim = keys.claim(*member.split("|"))
            at = int(await self.call("HGET", claim, "at")) - 3_600_000
            await asyncio.gather(self.call("HSET", claim, "at", at), self.call("ZADD", keys.CLAIMS, at, member))

    async def claims(self, restaurant: str = "") -> list[str]:
        """The members of the claims index, stale or not; of one restaurant or of all."""
        members = [member.decode() for member in await self.call("ZRANGE", keys.CLAIMS, 0, -1)]
        return [member for member in members if member.startswith(restaurant)]

    async def holds(self, restaurant: str, item: str) -> dict[str, str]:
        """The holds of an inventory item by holder; a holder that ends in + is the claim of an order."""
        found = await self.call("HGETALL", keys.stock(restaurant, item))
        pairs = zip(found[::2], found[1::2], strict=True)
        return {name.decode(): text.decode() for name, text in pairs if b"@" in text}
