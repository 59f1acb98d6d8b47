"""Backups of PostgreSQL by pg_dump, and their restore into an empty database.

A backup holds the whole database at one moment: every change, every state, accounts, audit and dead letters. It lacks
all data outside PostgreSQL: changes that wait in lanes, retry queues or journals, the change log, and the mirror. After
a restore, the ledger adds every change that the change log has and the database lacks (docs/clusters-and-backups.md).

pg_dump and pg_restore get the password through their environment, so that no process list shows it.
"""

import asyncio
import os
import shutil
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import asyncpg
from msgspec import Struct

from shared.errors import Conflict, TicketrailError, Unavailable
from shared.postgres.migrate import make_roles, migrate
from shared.settings import Settings

_PROGRAMS = Path("/usr/lib/postgresql")
_MAX_ERROR_CHARS = 2_000
_CONTENT = """
select count(*)::int8 as changes, max(written_at) as newest, pg_is_in_recovery() as standby from changes
"""
_TABLES = "select count(*) from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"


class BackupFailed(TicketrailError):
    """pg_dump or pg_restore failed. The message has its error output."""


class Backup(Struct, frozen=True):
    path: str
    bytes: int
    changes: int
    """The number of changes just before the dump began. The dump has these and perhaps a few more."""
    newest: datetime | None
    """The time of the newest of these changes."""


async def make_backup(settings: Settings, path: Path) -> Backup:
    """Writes the database into a file that only its owner may read. The services may run meanwhile. A file that exists
    is replaced at the end. Raises BackupFailed, Unavailable and one of UNAVAILABLE."""
    url = settings.database_backup_url or settings.database_url
    connection = await asyncpg.connect(url, timeout=settings.database_timeout_seconds)
    try:
        content = await connection.fetchrow(_CONTENT)
    finally:
        await connection.close()
    assert content is not None
    part = path.with_name(f"{path.name}.part")
    _create(part)
    try:
        await _run("pg_dump", url, "--format=custom", f"--file={part}")
        size = _publish(part, path)
    finally:
        part.unlink(missing_ok=True)
    return Backup(str(path), size, content["changes"], content["newest"])


def _create(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)


def _publish(part: Path, path: Path) -> int:
    part.replace(path)
    return path.stat().st_size


async def restore_backup(settings: Settings, path: Path) -> list[str]:
    """Restores a backup into the empty database of `database_url`, and migrates it to the schema of this release.
    Returns the migrations that the backup lacked. All or nothing: a restore that fails leaves the database empty.

    Raises Conflict if the database is not empty, BackupFailed, Unavailable, MigrationError, one of UNAVAILABLE."""
    connection = await asyncpg.connect(settings.database_url, timeout=settings.database_timeout_seconds)
    try:
        if await connection.fetchval(_TABLES):
            raise Conflict(
                "the database is not empty: create an empty one (`drop database`, `create database … owner …`), and"
                " stop the services before",
                code="database_not_empty",
            )
        # The backup grants rights to the roles of the services, so they must exist before.
        await make_roles(connection, settings)
    finally:
        await connection.close()
    await _run(
        "pg_restore",
        settings.database_url,
        "--no-owner",
        "--no-comments",
        "--exit-on-error",
        "--single-transaction",
        file=path,
    )
    return await migrate(settings)


async def _run(program: str, url: str, *options: str, file: Path | None = None) -> None:
    parts = urlsplit(url)
    password = unquote(parts.password or "")
    user, hosts = parts.netloc.rpartition("@")[::2]
    shown = urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}@{hosts}" if user else hosts))
    arguments = [_find(program), *options, f"--dbname={shown}", *([str(file)] if file else [])]
    process = await asyncio.create_subprocess_exec(
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PGPASSWORD": password},
    )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:  # the command was interrupted
            process.terminate()
            await process.wait()
    if process.returncode:
        text = errors.decode(errors="replace").strip()[-_MAX_ERROR_CHARS:]
        hint = ""
        if "row-level security" in text:
            hint = "; set TICKETRAIL_DATABASE_BACKUP_URL to a role with BYPASSRLS, which sees every restaurant"
        raise BackupFailed(f"{program} failed: {text}{hint}")


def _find(program: str) -> str:
    """Returns the path of the newest installed version, because an older pg_dump refuses a newer server."""

    def version(path: Path) -> float:
        name = path.parent.parent.name
        return float(name) if name.isdigit() else 0.0

    installed = sorted(_PROGRAMS.glob(f"*/bin/{program}"), key=version)
    found = str(installed[-1]) if installed else shutil.which(program)
    if found is None:
        raise Unavailable(f"{program} is not installed; it is in the package postgresql-client")
    return found
