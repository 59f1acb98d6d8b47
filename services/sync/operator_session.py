"""Opens connections of the ops role for the commands of operators."""

import getpass
from collections.abc import Awaitable, Callable
from typing import TypeVar

from services.sync.command_session import CommandSession, connected, run
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.security.tokens import Role
from shared.settings import Settings

T = TypeVar("T")
ROLE = Role.OPERATOR.value


def ask(question: Callable[[Connection], Awaitable[T]]) -> T:
    """Runs `question` with a connection of the ops role, and returns its result."""

    async def answer() -> T:
        settings = Settings.load()
        async with connected(settings, settings.database_ops_url) as connection:
            return await question(connection)

    found: T = run(answer())
    return found


def with_rail(action: Callable[[Postgres, Mirror, Rail], Awaitable[T]]) -> T:
    """Runs an action that commits a change. It gets a pool of the ops role, the mirror and the rail."""

    async def act() -> T:
        settings = Settings.load()
        ops = Postgres(settings.database_ops_url, settings, size=2)
        try:
            async with CommandSession(settings) as session:
                return await action(ops, session.mirror, session.rail)
        finally:
            await ops.close()

    result: T = run(act())
    return result


def actor() -> str:
    """Returns the actor for the audit: the user of the operating system who runs the command."""
    return f"cli/{getpass.getuser()}"
