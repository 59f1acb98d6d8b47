"""What the operators' commands share: connections of the ops role, and how they print."""

import getpass
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from rich.console import Console

from services.sync.command_session import CommandSession, connected, run
from shared.entities.contract import encode
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Connection, Postgres
from shared.rail.commit import Rail
from shared.security.tokens import Role
from shared.settings import Settings

T = TypeVar("T")
ROLE = Role.OPERATOR.value

json_option = click.option("--json", "as_json", is_flag=True, help="print JSON, for scripts")


def ask(question: Callable[[Connection], Awaitable[T]]) -> T:
    async def answer() -> T:
        settings = Settings.load()
        async with connected(settings, settings.database_ops_url) as connection:
            return await question(connection)

    found: T = run(answer())
    return found


def with_rail(deed: Callable[[Postgres, Mirror, Rail], Awaitable[T]]) -> T:
    """Of what commits a change; `Postgres` as the ops role."""

    async def done() -> T:
        settings = Settings.load()
        ops = Postgres(settings.database_ops_url, settings, size=2)
        try:
            async with CommandSession(settings) as session:
                return await deed(ops, session.mirror, session.rail)
        finally:
            await ops.close()

    found: T = run(done())
    return found


def actor() -> str:
    return f"cli/{getpass.getuser()}"


def print_json(value: Any) -> None:
    click.echo(encode(value).decode())


def console() -> Console:
    # What stands in a letter is no markup, whatever it looks like.
    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)


def ago(at: datetime) -> str:
    seconds = (datetime.now(UTC) - at).total_seconds()
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
