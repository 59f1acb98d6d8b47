"""One Redis as a mirror, which a test makes warm or cold, wipes, copies and rolls back."""

import asyncio
from collections.abc import Sequence
from uuid import uuid4

from shared.messaging.position import LogPosition
from shared.mirror import keys
from shared.mirror.connection import MirrorConnection
from shared.mirror.identity import MirrorIdentity
from shared.mirror.mirror import NOTHING_APPLIED, Mirror

Copy = Sequence[tuple[bytes, int, bytes]]
"""A copy of a mirror: key, time to live in ms, value in the format of Redis's DUMP."""


class MirrorServer:
    def __init__(self, url: str) -> None:
        self.url = url
        self._redis = MirrorConnection(url, timeout=5.0)
        self.call = self._redis.call
        self.mirror = Mirror(url, timeout=5.0, stale_seconds=3600.0)

    async def close(self) -> None:
        await self.mirror.close()
        await self._redis.close()

    async def warm(self, at: LogPosition = NOTHING_APPLIED, identity: MirrorIdentity | None = None) -> None:
        """Makes the mirror warm, as the mirror writer does at the end of the log. The default is a new identity whose
        order numbers have no prefix. The mirror then knows all keys."""
        await self.mirror.begin_log()
        server, _ = await self.mirror.server()
        identity = identity or MirrorIdentity(uuid4().int >> 65, "", "")
        assert await self.mirror.warm(at, server, identity)
        await self.call("SET", keys.KEYS, identity.id)

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

    async def restore(self, copy: Copy) -> None:
        """Replaces the data while the server runs, as an operator may do by mistake."""
        await self.wipe()
        await asyncio.gather(*(self.call("RESTORE", key, life, value) for key, life, value in copy))

    async def fail_over_and_back(self) -> None:
        """Makes the server a replica and promotes it again: the process keeps its run id and the data."""
        await self.call("REPLICAOF", "127.0.0.1", 1)
        await self.call("REPLICAOF", "NO", "ONE")

    async def roll_back(self, copy: Copy) -> None:
        """Acts like a failover and a failback, both to a replica that lagged."""
        await self.restore(copy)
        await self.fail_over_and_back()

    async def claimed_in_former_mirror(self, restaurant: str, entity: str, id_: str) -> None:
        """Makes a claim look as if a lost mirror had taken it and this mirror were a copy."""
        claim = keys.claim(restaurant, entity, id_)
        if await self.call("HEXISTS", claim, "mirror"):
            await self.call("HSET", claim, "mirror", "0")

    async def age_claims(self) -> None:
        """Makes every claim an hour older, so that it is stale. Claims from the future stay: they are stale already."""
        seconds, _ = await self.call("TIME")
        await self._move_claims(-1, latest=int(seconds) * 1000)

    async def jump_clock(self, hours: int) -> None:
        """Makes every claim look as if the server's clock had jumped ahead or back since it was made."""
        await self._move_claims(-hours)

    async def _move_claims(self, hours: int, *, latest: int | None = None) -> None:
        for member in await self.claims():
            claim = keys.claim(*member.split("|"))
            at = int(await self.call("HGET", claim, "at"))
            if latest is None or at <= latest + 1000:
                at += hours * 3_600_000
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
