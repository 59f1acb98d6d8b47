"""A primary PostgreSQL and its standbys, always as local processes: asynchronous streaming replication, the default of
most managers. A standby that is stopped while the primary commits lacks these commits when it is promoted."""

import os
import shutil
from pathlib import Path
from typing import Any

import asyncpg

from deploy.local import database, packages, servers
from deploy.local.child import Child
from deploy.local.port_check import HOST, find_free
from shared.settings import Settings
from tests.rigs.system import eventually


class Standby(servers.PostgreSQL):
    def __init__(self, directory: Path, primary: servers.PostgreSQL) -> None:
        super().__init__(directory, directory.with_suffix(".log"), packages.ensure(), port=find_free(1)[0])
        self._primary = primary

    def _prepare(self) -> None:
        database.make_reachable(self.directory, self._user)
        if self._data.exists():
            database.remove_lock_of_killed_server(self._data)
            return
        program = self._programs.initdb.with_name("pg_basebackup")
        source = self._primary.superuser_url.rpartition("/")[0] + "/"
        command: list[str | Path] = [
            program,
            "--pgdata",
            self._data,
            "--dbname",
            source,
            "--write-recovery-conf",
            "--checkpoint=fast",
        ]
        env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        copy = Child.spawn(command, log=self.log, env=env, cwd=self.directory.resolve(), user=self._user)
        self._children = [copy]
        if copy.wait(60) != 0:
            raise servers.ServerFailed(f"pg_basebackup failed:\n{copy.tail()}")

    def _answers(self) -> bool:
        try:
            database.run_sql(self.superuser_url, "select 1", timeout=2)
        except (OSError, asyncpg.PostgresError):
            return False
        return True

    def promote(self) -> None:
        database.run_sql(self.superuser_url, "select pg_promote()")


class Replication:
    """One primary and its standbys. `superuser` connects to the server that is the primary now."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs = packages.ensure()
        place = folder / "primary"
        port = find_free(1)[0]
        self.primary = servers.PostgreSQL(place, folder / "primary.log", self._programs, port=port)
        self._standbys: list[Standby] = []
        self.now: servers.PostgreSQL = self.primary
        """The server that the tests write to."""

    def standby(self) -> Standby:
        """Makes and starts another standby of the current primary."""
        made = Standby(self._folder / f"standby-{len(self._standbys)}", self.now)
        self._standbys.append(made)
        made.start()
        return made

    def fail_over(self, standby: Standby) -> None:
        """Kills the current primary and promotes the standby, which then has what it received before."""
        self.now.kill()
        standby.start()
        standby.promote()
        self.now = standby

    def copy_files(self) -> Path:
        """Stops the current primary for a copy of its files, as a snapshot of its disk."""
        self.now.stop()
        source, copy = self.now.directory.resolve(), self._folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy, symlinks=True)
        self.now.start()
        return copy

    def put_back(self, copy: Path) -> None:
        """Kills the current primary and starts it with the files of the copy."""
        self.now.kill()
        place = self.now.directory.resolve()
        shutil.rmtree(place / "data")
        shutil.copytree(copy / "data", place / "data", symlinks=True)
        if user := database.user_to_run_as():
            for path in [place / "data", *(place / "data").rglob("*")]:
                shutil.chown(path, user)
        self.now.start()

    def settings(self) -> Settings:
        return Settings(
            _env_file=None,
            database_url=self._url("ticketrail_owner"),
            database_writer_url=self._url("ticketrail_writer"),
            database_api_url=self._url("ticketrail_api"),
            database_ops_url=self._url("ticketrail_ops"),
        )

    def _url(self, role: str) -> str:
        return f"postgresql://{role}:{servers.PASSWORD}@{HOST}:{self.now.port}/ticketrail"

    async def connect(self, role: str = "ticketrail_writer") -> "asyncpg.Connection[Any]":
        return await asyncpg.connect(self._url(role), timeout=10)

    async def caught_up(self, standby: Standby) -> None:
        """Waits until the standby has replayed everything that the current primary has written."""
        await caught_up(self.now, standby)

    def discard(self) -> None:
        for server in (self.primary, *self._standbys):
            server.thaw()
            server.stop()


async def caught_up(primary: servers.PostgreSQL, standby: Standby) -> None:
    """Waits until the standby has replayed everything that the primary has written."""
    connection = await asyncpg.connect(primary.superuser_url)
    other = await asyncpg.connect(standby.superuser_url)
    try:
        end = await connection.fetchval("select pg_current_wal_lsn()::text")
        replayed = "select pg_last_wal_replay_lsn() >= $1::text::pg_lsn"
        await eventually(lambda: other.fetchval(replayed, end), what="the standby at the end of the primary")
    finally:
        await connection.close()
        await other.close()
