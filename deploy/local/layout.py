"""Checks whether the data of a home fits this version. If not, `make run` says so in one sentence and does not start.

- `check_home` runs before anything starts. It compares the versions of the mirror and of the journal, which the home
  keeps in `layout.json`.
- `check_database` compares migrations by name and content. The data fits if its migrations are the first ones of ours;
  `migrate` adds the rest.
- `check_queues` compares queues by name.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg

from shared.messaging import topology
from shared.messaging.management import ask, vhost_of
from shared.mirror import keys
from shared.postgres.migrate import files
from shared.rail import journal_file
from shared.settings import Settings

FILE = "layout.json"

_VERSIONS = {"mirror": keys.LAYOUT_VERSION, "journal": journal_file.LAYOUT_VERSION}
_DATA_FOLDERS = ("postgres", "redis", "rabbitmq", "journal")
_OUR_QUEUES = re.compile(r"(sync|changes)\.")
_DELAY = re.compile(r"\.retry\.\d+ms\.")  # a delay is a setting and does not belong to the layout


class OtherLayout(Exception):
    """Another version created the data. The message says what differs."""


def check_home(home: Path) -> None:
    """Checks the data of a home. Raises OtherLayout if it does not fit. A home without data fits, and gets the versions
    of this layout before any data, so that a run which is killed in between leaves a home that fits."""
    file = home / FILE
    # lexists, because the folder of PostgreSQL may be a link whose target does not exist.
    if not any(os.path.lexists(home / name) for name in _DATA_FOLDERS):
        draft = file.with_suffix(".new")
        draft.write_text(json.dumps(_VERSIONS) + "\n")
        draft.rename(file)
        return
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        raise OtherLayout(f"{FILE} is missing") from None
    except ValueError as error:
        raise OtherLayout(f"{FILE} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise OtherLayout(f"{FILE} is not a JSON object")
    for store, version in _VERSIONS.items():
        if found.get(store) != version:
            raise OtherLayout(f"the {store} has layout {found.get(store)}, and this version needs layout {version}")


async def check_database(url: str) -> None:
    """Checks the migrations of a database. Raises OtherLayout if they do not fit. An empty database fits."""
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
            raise OtherLayout(f"migration {name} differs from the file that was applied")


def check_queues(management_url: str, amqp_url: str, settings: Settings) -> None:
    """Checks the queues of a broker. Raises OtherLayout if they do not fit, and OSError. Ignores queues whose names do
    not begin like ours."""
    found: Any = ask(management_url, "GET", f"/api/queues/{quote(vhost_of(amqp_url), safe='')}?columns=name")
    known = {_without_delay(queue.name) for queue in [*topology.queues(settings), *topology.logs(settings)]}
    for name in sorted(queue["name"] for queue in found or ()):
        if _OUR_QUEUES.match(name) and _without_delay(name) not in known:
            raise OtherLayout(f"this version has no queue {name}")


def _without_delay(name: str) -> str:
    return _DELAY.sub(".retry.ms.", name)
