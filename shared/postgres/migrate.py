"""Brings a database to the current schema. The migrations are plain SQL files, applied in the order of their names,
each in a separate transaction.

`migrate` holds an advisory lock, so that two runs at the same time do the work once. It refuses a file whose content
has changed since it was applied, because the database would not get the change.
"""

import hashlib
from importlib import resources
from urllib.parse import unquote, urlsplit

import asyncpg

from shared.settings import Settings

_ADVISORY_LOCK_ID = 0x71636B74


class MigrationError(RuntimeError):
    """The database cannot be migrated. The message gives the reason."""


def files() -> list[tuple[str, str]]:
    """Returns (name, SQL) of every migration, in the order in which they are applied."""
    folder = resources.files("shared.postgres") / "migrations"
    found = [(path.name, path.read_text()) for path in folder.iterdir() if path.name.endswith(".sql")]
    return sorted(found)


async def _make_role(connection: "asyncpg.Connection[asyncpg.Record]", url: str) -> None:
    """Creates or updates the login role with the name and the password in the service's URL."""
    parts = urlsplit(url)
    name, password = unquote(parts.username or ""), unquote(parts.password or "")
    quoted = await connection.fetchval("select quote_literal($1)", password)
    known = await connection.fetchrow("select rolsuper or rolbypassrls as above from pg_roles where rolname = $1", name)
    if known and known["above"]:
        raise MigrationError(
            f"role {name!r} bypasses row-level security, so it would see every tenant: use a role without"
            " superuser and bypassrls"
        )
    await connection.execute(f'{"alter" if known else "create"} role "{name}" login password {quoted}')
    database = await connection.fetchval("select quote_ident(current_database())")
    await connection.execute(f'grant connect on database {database} to "{name}"')


# The policies of `changes` name the roles of the services, so the owner sees no row while they are forced.
_FORGET_XIDS = """
alter table changes no force row level security;
update changes set xid = '0';
alter table changes force row level security;
delete from checkpoints;
"""


async def _adopt(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Notes the server that gives the xids. If the database was restored from a dump of another server, sets the xids
    of its changes to 0: the feed must show these changes before every new one."""
    system = (await connection.fetchval("select feed_timeline()")).partition("-")[0]
    async with connection.transaction():
        known = await connection.fetchval("select system_identifier from database_server for update")
        if known is None:
            await connection.execute("insert into database_server (system_identifier) values ($1)", system)
        elif system and known != system:
            if known:
                await connection.execute(_FORGET_XIDS)
            await connection.execute("update database_server set system_identifier = $1", system)


async def make_roles(connection: "asyncpg.Connection[asyncpg.Record]", settings: Settings) -> None:
    """Creates or updates the roles of the services. Raises MigrationError."""
    for url in (settings.database_writer_url, settings.database_api_url, settings.database_ops_url):
        await _make_role(connection, url)


async def migrate(settings: Settings) -> list[str]:
    """Creates the roles, applies the missing files and returns their names. Raises MigrationError."""
    connection = await asyncpg.connect(settings.database_url, timeout=settings.database_timeout_seconds)
    try:
        await connection.execute("select pg_advisory_lock($1)", _ADVISORY_LOCK_ID)
        await make_roles(connection, settings)
        await connection.execute(
            "create table if not exists migrations"
            " (name text primary key, sha256 text not null, applied_at timestamptz not null default now())"
        )
        done = {row["name"]: row["sha256"] for row in await connection.fetch("select name, sha256 from migrations")}
        applied = []
        for name, sql in files():
            digest = hashlib.sha256(sql.encode()).hexdigest()
            if name in done:
                if done[name] != digest:
                    raise MigrationError(
                        f"{name} has changed since it was applied: undo the edit and put the change into a new"
                        " migration"
                    )
                continue
            async with connection.transaction():
                await connection.execute(sql)
                await connection.execute("insert into migrations (name, sha256) values ($1, $2)", name, digest)
            applied.append(name)
        await _adopt(connection)
        return applied
    finally:
        await connection.close()
