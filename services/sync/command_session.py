"""Opens connections for the commands of `ticketrail`, and reports each error as one line."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import click
import structlog

from services.sync.command_system import system_label
from shared.errors import TicketrailError, described
from shared.messaging import declare
from shared.messaging.publisher import BROKEN_LINK
from shared.mirror.connection import MirrorInDoubt, MirrorUnavailable
from shared.postgres.migrate import MigrationError
from shared.postgres.pool import UNAVAILABLE, Connection, Postgres
from shared.rail.assemble import assemble_rail
from shared.settings import Settings


@asynccontextmanager
async def connected(settings: Settings, url: str) -> AsyncIterator[Connection]:
    """Opens one connection with the role in `url`."""
    postgres = Postgres(url, settings, size=1)
    try:
        async with postgres.connection() as connection:
            yield connection
    finally:
        await postgres.close()


def run(work: Coroutine[Any, Any, Any], *, quiet: bool = False) -> Any:
    """Runs a command. Reports an expected error, such as an unavailable backend, as one line with exit code 1. `quiet`:
    logs nothing, because the command itself says which backends are away."""
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL if quiet else logging.NOTSET),
    )
    if quiet:  # without a handler, Python prints the warnings of libraries, such as one for each attempt to connect
        logging.getLogger().addHandler(logging.NullHandler())
    try:
        return asyncio.run(work)
    except TicketrailError as error:
        raise refusal(error) from error
    except (MigrationError, declare.TopologyError) as error:
        raise click.ClickException(str(error)) from error
    except (MirrorUnavailable, MirrorInDoubt, *BROKEN_LINK, *UNAVAILABLE, asyncpg.PostgresError) as error:
        raise click.ClickException(
            f"a backend does not answer: {described(error)}; the command uses {system_label()}"
        ) from error


def refusal(error: TicketrailError) -> click.ClickException:
    """Returns the error of a command for an error of ours."""
    field = error.details.get("field")
    return click.ClickException(f"{field}: {error}" if field else str(error))


class CommandSession:
    """Connections for a command that commits changes. It has no journal: a change that cannot be recorded is
    refused."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.postgres = Postgres(settings.database_writer_url, settings, size=2)
        self._rail_parts = assemble_rail(settings)
        self.mirror, self.publisher, self.rail = (
            self._rail_parts.mirror,
            self._rail_parts.publisher,
            self._rail_parts.rail,
        )

    async def __aenter__(self) -> "CommandSession":
        await self.publisher.start(wait=5.0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._rail_parts.close()
        await self.postgres.close()
