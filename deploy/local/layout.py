"""Whether the data of a home fits this version: `make run` says so in one sentence instead of failing somewhere later.

Migrations and queues are compared by name, migrations by content too. Data of a version whose migrations are a
beginning of ours fits; `migrate` adds the rest.
"""

import hashlib
import re
from typing import Any
from urllib.parse import quote

import asyncpg

from shared.messaging import topology
from shared.messaging.management import ask, vhost_of
from shared.postgres.migrate import files
from shared.settings import Settings

_OURS = re.compile(r"(sync|changes)\.")
_DELAY = re.compile(r"\.retry\.\d+ms\.")  # a setting, not the layout


class OtherLayout(Exception):
    """The data was made by a version with other tables or queues; says what differs."""


async def check_database(url: str) -> None:
    """Raises OtherLayout. An empty database fits."""
    connection = await asyncpg.connect(url, timeout=10)
    try:
        if await connection.fetchval("select to_regclass('migrations')") is None:
            return
        applied = {row["name"]: row["sha256"] for row in await connection.fetch("select name, sha256 from migrations")}
    finally:
        await connection.close()
    ours = {name: hashlib.sha256(sql.encode()).hexdigest() for name, sql in files()}
    for name, digest in sorted(applied.items()):
        if name not in ours:
            raise OtherLayout(f"this version has no migration {name}")
        if ours[name] != digest:
            raise OtherLayout(f"migration {name} was applied with another content")


def check_queues(management_url: str, amqp_url: str, settings: Settings) -> None:
    """Raises OtherLayout, OSError. Only names that look like ours count."""
    found: Any = ask(management_url, "GET", f"/api/queues/{quote(vhost_of(amqp_url), safe='')}?columns=name")
    known = {_plain(queue.name) for queue in [*topology.queues(settings), *topology.logs(settings)]}
    for name in sorted(queue["name"] for queue in found or ()):
        if _OURS.match(name) and _plain(name) not in known:
            raise OtherLayout(f"this version has no queue {name}")


def _plain(name: str) -> str:
    return _DELAY.sub(".retry.ms.", name)
