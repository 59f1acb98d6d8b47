"""Asks which backends are away, so that a command that needs them names each of them once."""

import asyncio
from collections.abc import Awaitable

import asyncpg

from shared.errors import described
from shared.messaging import declare
from shared.rail.assemble import mirror_of
from shared.settings import Settings

_TIMEOUT_SECONDS = 3.0


async def backends_away(settings: Settings) -> dict[str, str]:
    """Connects to PostgreSQL, RabbitMQ and the mirror at the same time. Returns one line for each that does not answer
    within three seconds, by the name of the backend: `postgres`, `rabbitmq`, `mirror`."""
    questions = {"postgres": _postgres, "rabbitmq": _rabbitmq, "mirror": _mirror}
    answers = await asyncio.gather(*(_ask(name, ask(settings)) for name, ask in questions.items()))
    return {name: answer for name, answer in zip(questions, answers, strict=True) if answer is not None}


async def _ask(name: str, question: Awaitable[None]) -> str | None:
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            await question
    except Exception as error:  # noqa: BLE001  (whatever the error is, the backend cannot be used, and the line says why)
        # The text of an error may have several lines, and a command prints one line for each backend.
        return f"{name} is away: {' '.join(described(error).split())}"
    return None


async def _postgres(settings: Settings) -> None:
    connection = await asyncpg.connect(settings.database_ops_url, timeout=_TIMEOUT_SECONDS)
    try:
        await connection.fetchval("select 1")
    finally:
        connection.terminate()


async def _rabbitmq(settings: Settings) -> None:
    async with await declare.connect(settings.rabbitmq_url, timeout=_TIMEOUT_SECONDS):
        return


async def _mirror(settings: Settings) -> None:
    mirror = mirror_of(settings)
    try:
        await mirror.check()
    finally:
        await mirror.close()
