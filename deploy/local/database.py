"""Prepares PostgreSQL: a user to run as, a directory that this user can reach, our role and our database.

Every function is idempotent and changes only our own instance.
"""

import asyncio
import hashlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import psutil

OUTSIDE = Path("/var/lib/ticketrail")  # systemd removes files below /var/tmp that were not used for 30 days

T = TypeVar("T")


def user_to_run_as() -> str | None:
    """Returns the user that PostgreSQL runs as, or None for the present user. PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)


def make_reachable(directory: Path, user: str | None) -> None:
    """Creates `directory` for `user`. If that user cannot reach it, `directory` becomes a link to another place."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    target = directory
    if directory.is_symlink():
        target = directory.readlink()
    elif user and not directory.exists() and not _may_enter(directory.parent, user):
        OUTSIDE.mkdir(mode=0o755, exist_ok=True)
        target = OUTSIDE / hashlib.sha256(str(directory).encode()).hexdigest()[:12]
        # If only its link was removed, the data of an earlier instance may still be there.
        shutil.rmtree(target, ignore_errors=True)
        directory.symlink_to(target)
    target.mkdir(mode=0o700, exist_ok=True)
    if user:
        shutil.chown(target, user)


def _may_enter(directory: Path, user: str) -> bool:
    return subprocess.run(["test", "-x", str(directory)], user=user, extra_groups=[], check=False).returncode == 0


def remove_lock_of_killed_server(data: Path) -> None:
    """Removes the lock file of a killed server. PostgreSQL ignores a lock whose pid does not run, but not one whose pid
    now belongs to another process of the same user, such as another PostgreSQL of this machine."""
    lock = data / "postmaster.pid"
    try:
        pid = int(lock.read_text().split("\n", 1)[0])
        command = psutil.Process(pid).cmdline()
    except (FileNotFoundError, ValueError, psutil.Error):
        return
    if str(data) not in command:
        lock.unlink()


def postgres_for(data: Path, newest: Path) -> Path:
    """Returns the server of the version that created `data`, if it is installed, because no other version can read the
    data. Otherwise returns `newest`."""
    version = (data / "PG_VERSION").read_text().strip()
    own = Path("/usr/lib/postgresql") / version / "bin/postgres"
    return own if own.exists() else newest


def run_sql(url: str, *statements: str, timeout: float = 60.0) -> None:
    """Executes each statement in its own transaction, which CREATE DATABASE requires. `timeout` is in seconds per
    statement. Raises OSError and the errors of asyncpg."""

    async def execute() -> None:
        connection = await asyncpg.connect(url, ssl=False, timeout=timeout)
        try:
            for statement in statements:
                await connection.execute(statement, timeout=timeout)
        finally:
            await connection.close(timeout=5)

    _in_own_loop(execute())


def make_owner(url: str, password: str) -> bool:
    """Creates the database and its owner, a role that may create the other roles. `url` is the URL of a superuser.
    Returns False while the server starts or recovers."""

    async def ensure() -> bool:
        try:
            connection = await asyncpg.connect(url, ssl=False, timeout=2)
        except (OSError, TimeoutError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError):
            return False
        try:
            if not await connection.fetchval("select 1 from pg_roles where rolname = 'ticketrail_owner'"):
                await connection.execute(f"create role ticketrail_owner login createrole password '{password}'")
            if not await connection.fetchval("select 1 from pg_database where datname = 'ticketrail'"):
                await connection.execute("create database ticketrail owner ticketrail_owner")
        finally:
            await connection.close(timeout=5)
        return True

    return _in_own_loop(ensure())


def _in_own_loop(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine in another thread, because asyncio.run fails inside a running event loop, as in tests."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
