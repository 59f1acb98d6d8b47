"""Rate limits: a token bucket for each restaurant and each client address, shared by all instances of all services.

The mirror holds the buckets. A process takes up to a hundredth of a bucket at a time (atomically, scripts/bucket.lua)
and spends these tokens itself, because a round trip for every request would be too expensive. The process drops its
unspent tokens after a second. They are at most a twentieth of the tokens that the bucket gains in a second. When a
bucket is empty, the process does not ask again until the bucket can have a token. While the mirror is unavailable, each
process uses a bucket of its own.
"""

import asyncio
import math
import time
from contextlib import suppress
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from weakref import WeakValueDictionary

from msgspec import Struct

from shared.errors import TooManyRequests
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from shared.settings import Settings

_MAX_BUCKETS = 10_000
_MIN_SHARES_PER_BUCKET = 100
_MIN_SHARES_PER_SECOND = 20
_MAX_TOKEN_AGE_SECONDS = 1.0


class Rate(Struct, frozen=True):
    capacity: int
    per_second: float


class _Bucket(Struct):
    tokens: float
    at: float
    left: int = 0
    """The number of tokens in the shared bucket after the last round trip."""
    empty_until: float = 0.0


class TokenBucket:
    """The buckets of one kind of caller, such as `address`."""

    def __init__(
        self,
        mirror: Mirror | None,
        kind: str,
        rate: Rate,
        *,
        max_token_age_seconds: float = _MAX_TOKEN_AGE_SECONDS,
    ) -> None:
        """`max_token_age_seconds`: after this time the process drops tokens that it took from the mirror."""
        self._max_token_age_seconds = max_token_age_seconds
        self._mirror = mirror
        self._kind = kind
        self.rate = rate
        self._share = max(
            1, min(rate.capacity // _MIN_SHARES_PER_BUCKET, int(rate.per_second / _MIN_SHARES_PER_SECOND))
        )
        self._taken: dict[str, _Bucket] = {}
        self._local: dict[str, _Bucket] = {}
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, caller: str) -> tuple[float, int]:
        """Takes one token. Returns (seconds to wait, tokens left). The wait is 0 if the token was taken."""
        if (spent := self._spend_taken(caller)) is not None:
            return spent
        if self._mirror is not None and self._mirror.available:
            # A caller has only one round trip at a time. Several would each take a share, and all but one share
            # would be lost.
            lock = self._asking.setdefault(caller, asyncio.Lock())
            async with lock:
                try:
                    if (spent := self._spend_taken(caller)) is not None:
                        return spent
                    if self._mirror.available:
                        return await self._ask(self._mirror, caller)
                except (MirrorUnavailable, MirrorInDoubt):
                    pass  # the local bucket takes over
        return self._take_locally(caller, time.monotonic())

    async def give_back(self, caller: str) -> None:
        """Returns one token that `take` took."""
        self._taken.pop(caller, None)  # the bucket may have been empty
        if (local := self._local.get(caller)) is not None:
            local.tokens = min(self.rate.capacity, local.tokens + 1)
        if self._mirror is not None and self._mirror.available:
            with suppress(MirrorUnavailable, MirrorInDoubt):  # the token is lost, and the bucket fills by itself
                await self._mirror.give_back_token(f"{self._kind}:{caller}", self.rate.capacity, self.rate.per_second)

    def _spend_taken(self, caller: str) -> tuple[float, int] | None:
        """Spends a token that this process has already taken. Returns the same as `take`, or None if the process must
        ask the mirror."""
        taken = self._taken.get(caller)
        if taken is None:
            return None
        now = time.monotonic()
        if taken.tokens >= 1 and now - taken.at < self._max_token_age_seconds:
            taken.tokens -= 1
            return 0.0, taken.left + int(taken.tokens)
        return (taken.empty_until - now, 0) if now < taken.empty_until else None

    async def _ask(self, mirror: Mirror, caller: str) -> tuple[float, int]:
        found, left, wait = await mirror.take_tokens(
            f"{self._kind}:{caller}", self.rate.capacity, self.rate.per_second, self._share
        )
        now = time.monotonic()
        if not found:
            wait = max(wait, 0.001)
            _keep(self._taken, caller, _Bucket(0, now, empty_until=now + wait))
            return wait, 0
        _keep(self._taken, caller, _Bucket(found - 1, now, left))
        return 0.0, left + found - 1

    def _take_locally(self, caller: str, now: float) -> tuple[float, int]:
        bucket = self._local.get(caller)
        if bucket is None:
            bucket = _Bucket(float(self.rate.capacity), now)
            _keep(self._local, caller, bucket)
        bucket.tokens = min(self.rate.capacity, bucket.tokens + (now - bucket.at) * self.rate.per_second)
        bucket.at = now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) / self.rate.per_second, 0
        bucket.tokens -= 1
        return 0.0, int(bucket.tokens)


def _keep(buckets: dict[str, _Bucket], caller: str, bucket: _Bucket) -> None:
    if len(buckets) >= _MAX_BUCKETS:
        buckets.clear()
    buckets[caller] = bucket


@lru_cache(10_000)
def counted_as(address: str) -> str:
    """Returns the part of an address that a client cannot choose. For IPv6 this is the /64 network, because a client
    may use any of its 2^64 addresses."""
    try:
        found = ip_address(address)
    except ValueError:
        return address
    if not isinstance(found, IPv6Address):
        return address
    return str(found.ipv4_mapped or IPv6Address(int(found) >> 64 << 64))


class Limits:
    def __init__(self, mirror: Mirror | None, settings: Settings) -> None:
        """A rate of 0 means no limit. Without a mirror, each instance applies the limits alone."""
        self._address = _bucket(
            mirror, "address", settings.address_burst_requests, settings.address_requests_per_second
        )
        self._restaurant = _bucket(
            mirror, "restaurant", settings.restaurant_burst_requests, settings.restaurant_requests_per_second
        )

    async def of_address(self, address: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Takes a token for a client address and adds the RateLimit headers to `headers`. Raises TooManyRequests."""
        if self._address is not None and address:
            await _spend(self._address, counted_as(address), headers, "address")

    async def of_restaurant(self, restaurant: str, headers: list[tuple[bytes, bytes]]) -> None:
        """Takes a token for a restaurant, like `of_address`."""
        if self._restaurant is not None:
            await _spend(self._restaurant, restaurant, headers, "restaurant")


def _bucket(mirror: Mirror | None, kind: str, burst: int, per_second: float) -> TokenBucket | None:
    return TokenBucket(mirror, kind, Rate(burst, per_second)) if per_second else None


async def _spend(bucket: TokenBucket, caller: str, headers: list[tuple[bytes, bytes]], kind: str) -> None:
    wait, left = await bucket.take(caller)
    rate = bucket.rate
    # The headers show the tighter limit. The restaurant's limit is checked second, and replaces the address's limit
    # only if fewer requests are left.
    shown = next((int(value) for name, value in headers if name == b"ratelimit-remaining"), None)
    if shown is None or left < shown:
        headers[:] = [pair for pair in headers if not pair[0].startswith(b"ratelimit-")]
        full = math.ceil((rate.capacity - left) / rate.per_second)
        headers += (
            (b"ratelimit-limit", b"%d" % rate.capacity),
            (b"ratelimit-remaining", b"%d" % left),
            (b"ratelimit-reset", b"%d" % full),
        )
    if wait:
        raise TooManyRequests(f"too many requests from this {kind}", retry_after=math.ceil(wait), limit=rate.capacity)
