"""Functions that wait for rounds of a background loop instead of for a time. They fail after a minute without a round,
because the loop then hangs."""

import asyncio

from shared.lifecycle import BackgroundLoop

_DEADLINE_SECONDS = 60.0


async def next_turn(loop: BackgroundLoop) -> None:
    """Waits until the current round has ended."""
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await loop.turn_after(loop.turns)


async def whole_turn(loop: BackgroundLoop) -> None:
    """Waits for the end of a round that started after this call. Such a round has seen everything that the test did
    before the call."""
    async with asyncio.timeout(_DEADLINE_SECONDS):
        await loop.turn_after(loop.turns + 1)
