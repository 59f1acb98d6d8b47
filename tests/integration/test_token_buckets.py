"""Token buckets on a real Redis: processes share them, and each process has its own while Redis is unavailable."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from shared.http.limits import Rate, TokenBucket, counted_as
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Mirror
from tests.rigs.servers import Servers
from tests.rigs.system import ROOT, eventually

NO_REFILL_PER_SECOND = 0.000_001  # tokens per second: none returns during a test


@pytest.fixture
async def mirrors(servers: Servers) -> AsyncIterator[list[Mirror]]:
    """Two clients of one Redis server."""
    found = [Mirror(servers.redis.url, timeout=5.0, stale_seconds=2.0) for _ in range(2)]
    yield found
    for mirror in found:
        await mirror.close()


def new_name() -> str:
    return uuid4().hex


async def test_two_clients_together_take_no_more_tokens_than_there_are(mirrors: list[Mirror]) -> None:
    name = new_name()
    replies = await asyncio.gather(*(mirrors[n % 2].take_tokens(name, 100, NO_REFILL_PER_SECOND, 7) for n in range(40)))
    assert sum(taken for taken, _, _ in replies) == 100
    # The last successful call got the rest of a share; later calls got nothing.
    assert sorted(taken for taken, _, _ in replies) == [0] * 25 + [2] + [7] * 14
    assert all(wait > 0 for taken, _, wait in replies if not taken)


async def test_two_processes_together_take_no_more_tokens_than_there_are(servers: Servers) -> None:
    code = f"""
import asyncio
from shared.http.limits import Rate, TokenBucket
from shared.mirror.mirror import Mirror
async def main():
    mirror = Mirror({servers.redis.url!r}, timeout=5.0, stale_seconds=2.0)
    bucket = TokenBucket(mirror, "test", Rate(200, {NO_REFILL_PER_SECOND}))
    waits = [(await bucket.take({new_name()!r}))[0] for _ in range(200)]
    print(waits.count(0.0))
asyncio.run(main())
"""
    started = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
        for _ in range(3)
    ]
    got = [int((await process.communicate())[0]) for process in started]
    assert sum(got) == 200, got


async def test_bucket_fills_steadily_and_reports_the_wait(mirrors: list[Mirror]) -> None:
    # The bucket fills so slowly that no token returns during these calls.
    bucket, name = TokenBucket(mirrors[0], "test", Rate(2, 0.01)), new_name()
    assert [await bucket.take(name) for _ in range(2)] == [(0.0, 1), (0.0, 0)]
    wait, left = await bucket.take(name)
    assert 0 < wait <= 100
    assert left == 0
    quick = TokenBucket(mirrors[0], "test", Rate(2, 20.0))

    async def again() -> bool:
        return (await quick.take(name))[0] == 0.0

    await eventually(again, what="a returned token")


async def counted(bucket: TokenBucket, monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> list[int]:
    """Returns a list that receives the number of tokens that each call of the shared bucket takes."""
    taken: list[int] = []
    really_take = mirror.take_tokens

    async def take(*arguments: Any) -> tuple[int, int, float]:
        found = await really_take(*arguments)
        taken.append(found[0])
        return found

    monkeypatch.setattr(mirror, "take_tokens", take)
    return taken


async def test_many_callers_of_a_spent_share_take_one_new_share(
    mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If each caller took its own share and only the last one was kept, the limit would apply too early."""
    # A share that expires during the calls would be requested again.
    bucket, name = TokenBucket(mirrors[0], "test", Rate(10_000, 5_000.0), max_token_age_seconds=60.0), new_name()
    taken = await counted(bucket, monkeypatch, mirrors[0])
    waits = await asyncio.gather(*(bucket.take(name) for _ in range(1_000)))
    assert {wait for wait, _ in waits} == {0.0}
    assert sum(taken) == 1_000
    assert len(taken) == 10


async def test_empty_bucket_is_not_asked_again_before_it_has_a_token(
    mirrors: list[Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, name = TokenBucket(mirrors[0], "test", Rate(1, 0.01)), new_name()
    taken = await counted(bucket, monkeypatch, mirrors[0])
    waits = [(await bucket.take(name))[0] for _ in range(50)]
    assert waits[0] == 0.0
    assert all(wait > 0 for wait in waits[1:])
    assert taken == [1, 0]


async def test_each_process_has_its_own_bucket_while_redis_is_unavailable(servers: Servers) -> None:
    redis = await asyncio.to_thread(servers.extra_redis)
    mirror = Mirror(redis.url, timeout=5.0, stale_seconds=2.0)
    name, rate = new_name(), Rate(5, NO_REFILL_PER_SECOND)
    one, other = TokenBucket(mirror, "test", rate), TokenBucket(mirror, "test", rate)

    async def taken(bucket: TokenBucket) -> int:
        return [(await bucket.take(name))[0] for _ in range(10)].count(0.0)

    try:
        assert await taken(one) == 5
        assert await taken(other) == 0
        await asyncio.to_thread(redis.stop)

        async def unavailable() -> bool:
            try:
                await mirror.take_tokens(new_name(), 1, 1.0, 1)
            except (MirrorUnavailable, MirrorInDoubt):
                return True
            return False

        await eventually(unavailable, what="an open breaker")
        fresh = [TokenBucket(mirror, "test", rate) for _ in range(2)]
        assert [await taken(bucket) for bucket in fresh] == [5, 5]
        await asyncio.to_thread(redis.start)

        async def back() -> bool:
            return not await unavailable()

        await eventually(back, what="a closed breaker")
        # Both use one bucket again, which is empty, or full if the server lost it.
        assert await taken(one) + await taken(other) in (0, 5)
    finally:
        await mirror.close()
        await asyncio.to_thread(redis.discard)


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:DB8:1:2::", "2001:db8:1:2::"),
        ("::ffff:198.51.100.7", "198.51.100.7"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("a-unix-socket", "a-unix-socket"),
    ],
)
def test_ipv6_addresses_are_counted_by_network(address: str, counted: str) -> None:
    assert counted_as(address) == counted
