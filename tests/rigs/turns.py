"""Waiting for the rounds of a background loop instead of for time. Both fail after a minute without a round, which only
a loop that hangs needs."""

import asyncio

from shared.lifecycle import BackgroundLoop

_DEADLINE_SECONDS = 60.0


async def next_turn(loop: BackgroundLoop) -> None:
    """Until the round that is under way has ended."""
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await loop.turn_after(loop.turns)


async def whole_turn(loop: BackgroundLoop) -> None:
    """Until a round has ended that began after this call: it saw everything that the test did before."""
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await loop.turn_after(loop.turns + 1)
