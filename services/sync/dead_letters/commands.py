"""`ticketrail dlq`: dead letters on the command line. The commands call the same functions as the API.

Exit codes: 0 success, 1 a failure or a replay that did not write every dead letter, 2 wrong usage.
"""

import base64
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import click
import msgspec

from services.sync.command_options import WholeNumber
from services.sync.command_output import TableColumn, ago, json_option, print_json, print_table
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.command_filters import DEAD_LETTER, counted, current, filters, query_of
from services.sync.dead_letters.edit_command import edit_command
from services.sync.dead_letters.job_commands import JOB_COMMANDS
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.store import DeadLetterGroup
from services.sync.dead_letters.view import dead_letter_view
from services.sync.operator_session import ROLE, actor, ask, with_rail
from services.sync.printable import printable
from shared.entities.contract import encode
from shared.postgres.pool import Connection

_LIST_COLUMNS = (
    TableColumn("id", "id"),
    TableColumn("failed", optional=2),
    TableColumn("deaths", optional=4, right=True),
    TableColumn("status", optional=3),
    TableColumn("queue", optional=1),
    TableColumn("sinks"),
    TableColumn("about", "text"),
    TableColumn("error", "text"),
)
_GROUP_COLUMNS = (
    TableColumn("fingerprint", "id"),
    TableColumn("count", right=True),
    TableColumn("open", right=True),
    TableColumn("first", optional=2),
    TableColumn("last", optional=1),
    TableColumn("24 h", optional=3),
    TableColumn("reason", "text"),
    TableColumn("place", "text"),
)
_BARS = " ▁▂▃▄▅▆▇█"
_EXPORT_PAGE_SIZE = 200


@click.group("dlq")
def dlq_command() -> None:
    """List, show, replay, edit, discard and restore dead letters."""


# -- reading -----------------------------------------------------------------------------------------------------


@dlq_command.command("list")
@filters
@click.option("--limit", type=WholeNumber(1, 10_000), default=50, show_default=True)
@json_option
def list_command(limit: int, as_json: bool, **chosen: Any) -> None:
    """List dead letters, newest failure first."""
    query = query_of(**chosen)
    found = ask(lambda connection: dead_letter_store.page(connection, query, limit=limit))
    if as_json:
        print_json(found)
        return
    rows = []
    for dead_letter in found:
        about = (
            f"{dead_letter.entity or '?'} v{dead_letter.version}"
            if dead_letter.version
            else (dead_letter.entity or "unreadable")
        )
        rows.append(
            (
                dead_letter.id,
                ago(dead_letter.last_failed_at),
                str(dead_letter.deaths),
                dead_letter.status,
                dead_letter.queue,
                ", ".join(dead_letter.sinks),
                about,
                dead_letter.error,
            )
        )
    print_table(_LIST_COLUMNS, rows)
    click.echo(counted(len(found)) + (" (there may be more: --limit)" if len(found) == limit else ""))


@dlq_command.command("groups")
@filters
@json_option
def groups_command(as_json: bool, **chosen: Any) -> None:
    """Group dead letters by cause, largest group first."""
    query = query_of(**chosen)
    found = ask(lambda connection: dead_letter_store.groups(connection, query))
    if as_json:
        print_json(found)
        return
    rows = [
        (
            group.fingerprint,
            str(group.count),
            str(group.open),
            ago(group.first_failed_at),
            ago(group.last_failed_at),
            _sparkline(group),
            group.reason,
            group.place,
        )
        for group in found
    ]
    print_table(_GROUP_COLUMNS, rows)
    click.echo(f"{len(found)} group{'' if len(found) == 1 else 's'}")


def _sparkline(group: DeadLetterGroup) -> str:
    highest = max(group.trend) or 1
    return "".join(_BARS[min(8, (8 * n + highest - 1) // highest)] for n in group.trend)


@dlq_command.command("show")
@click.argument("dead_letter", type=DEAD_LETTER)
@json_option
def show_command(dead_letter: str, as_json: bool) -> None:
    """Show everything that is known about a dead letter."""
    seen = ask(lambda connection: dead_letter_view(connection, dead_letter, operator=True))
    if as_json:
        print_json(seen)
        return
    click.echo("\n".join(map(printable, _lines(msgspec.to_builtins(seen)))))


def _lines(plain: dict[str, Any]) -> Iterator[str]:
    for name, value in plain["dead_letter"].items():
        if value is not None:
            yield f"{name + ':':18}{value}"
    for attempt in plain["attempts"]:
        yield f"{'attempt:':18}{attempt['at']}  {attempt['reason']}  {attempt['error']}  ({attempt['place']})"
    for action in plain["actions"]:
        yield f"{'action:':18}{action['at']}  {action['action']} by {action['actor']}  {action['why'] or ''}"
    for edit in plain["edits"]:
        for leaf in edit["difference"]:
            yield f"{'edited:':18}{leaf['path']}: {leaf.get('before')} → {leaf.get('after')}"
    for replay in plain["replays"]:
        job, item = replay["job"], replay["item"]
        yield f"{'replay:':18}{job['created_at']}  {job['kind']} {job['id']}: {item['outcome'] or 'waiting'}"
    yield json.dumps(plain["event"], indent=2, ensure_ascii=False) if plain["event"] is not None else plain["body"]


@dlq_command.command("export")
@filters
@click.option("--out", type=click.Path(dir_okay=False), help="a file; default: standard output")
def export_command(out: str | None, **chosen: Any) -> None:
    """Write dead letters with all their fields, one JSON object per line. The body is in base64, exactly as
    received."""
    query = query_of(**chosen)

    async def write(connection: Connection, file: IO[bytes]) -> int:
        # Read one body at a time, because it can have 16 MB. Use one snapshot, because a dead letter that fails again
        # during the export moves to the front of the list, so that the export would miss it.
        written = 0
        before: tuple[datetime, str] | None = None
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            while page := await dead_letter_store.page(connection, query, before=before, limit=_EXPORT_PAGE_SIZE):
                for dead_letter in page:
                    whole = await dead_letter_store.one(connection, dead_letter.id)
                    assert whole is not None
                    plain = msgspec.to_builtins(whole)
                    _write_line(file, encode({**plain, "body": base64.b64encode(whole.body).decode()}) + b"\n")
                    written += 1
                before = (page[-1].last_failed_at, page[-1].id)
        return written

    if out is None:
        ask(lambda connection: write(connection, sys.stdout.buffer))
        return
    # Write to another file and rename it when it is complete, so that a partial export never looks complete. A pipe or
    # a device cannot be renamed.
    target = Path(out).resolve()
    part = target.with_name(f"{target.name}.part") if target.is_file() or not target.exists() else target
    try:
        with part.open("wb") as file:
            written = ask(lambda connection: write(connection, file))
        if part != target:
            part.replace(target)
    except OSError as error:
        raise click.FileError(out, error.strerror) from error
    finally:
        if part != target:
            part.unlink(missing_ok=True)
    click.echo(f"{counted(written)} in {out}")


def _write_line(file: IO[bytes], line: bytes) -> None:
    """Writes one line. Handles errors of the file, because `run` would report them as an unavailable backend."""
    try:
        file.write(line)
        file.flush()
    except BrokenPipeError:  # replace standard output, because the interpreter flushes it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        raise click.FileError(file.name, error.strerror) from error


# -- actions -----------------------------------------------------------------------------------------------------


@dlq_command.command("restore")
@click.argument("dead_letter", type=DEAD_LETTER)
@click.option("--why", help="the reason; it is kept in the audit")
@json_option
def restore_command(dead_letter: str, why: str | None, as_json: bool) -> None:
    """Open a discarded dead letter again."""
    seen = current(dead_letter)

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).restore(
            dead_letter, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    print_json(done) if as_json else click.echo("the dead letter is open again")


for _command in (*JOB_COMMANDS, edit_command):
    dlq_command.add_command(_command)

COMMANDS = (dlq_command,)
