"""`ticketrail journal`: shows the journal of an instance of the orders service, and publishes its changes if that
instance will not come back."""

import asyncio
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from msgspec import Struct
from rich.text import Text

from services.sync.command_options import WholeNumber
from services.sync.command_output import TableColumn, console, print_table
from services.sync.command_session import run
from shared.entities.contract import Lane, encode, now
from shared.messaging.publisher import InDoubt, NotSent
from shared.observability.tracing import trace_id_of
from shared.rail.assemble import publisher_of
from shared.rail.drain import Drainer
from shared.rail.instance import Lease, NumberTaken
from shared.rail.journal import Journal, JournalBroken
from shared.rail.journal_file import Contents, Damaged, Name, contents, name_of
from shared.rail.journal_salvage import Salvage
from shared.rail.set_aside import files_aside, files_of, is_journal_name, journal_set_aside, readable
from shared.settings import Settings

_MAX_LISTED = 50
_CONNECT_TIMEOUT_SECONDS = 10.0
_MAX_ATTEMPTS = 3
_RETRY_PAUSE_SECONDS = 1.0
_COLUMNS = (
    TableColumn("lane", optional=1),
    TableColumn("change", "id"),
    TableColumn("subject", "id"),
    TableColumn("version", optional=3, right=True),
    TableColumn("age", optional=2, right=True),
    TableColumn("bytes", optional=4, right=True),
)


class WaitingEntry(Struct, frozen=True, kw_only=True):
    lane: str
    change_id: str
    subject: str
    version: int
    restaurant_id: str
    accepted_at: datetime | None
    age_seconds: float | None
    bytes: int
    trace_id: str | None


class DamagedEntry(Struct, frozen=True, kw_only=True):
    """An entry that is not intact. `journal drain` does not publish it."""

    why: str
    lane: str | None
    change_id: str
    subject: str
    trace_id: str | None
    bytes_left: int


class JournalListing(Struct, frozen=True, kw_only=True):
    path: str
    held_by: str | None
    """The process that has the journal open; None if no process has it open."""
    file_damaged: str | None
    """The reason why SQLite cannot read the file, or None. If it cannot, the entries are salvaged from the file."""
    files_aside: list[str]
    count: int
    bytes: int
    lanes: dict[str, int]
    oldest_seconds: float | None
    entries: list[WaitingEntry]
    damaged: list[DamagedEntry]


def _one_journal(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")(command)
    command = click.option("--instance", type=WholeNumber(1), help="number of the instance on this host")(command)
    return click.argument("path", required=False, type=click.Path(dir_okay=False, path_type=Path))(command)


@click.group("journal")
def journal_command() -> None:
    """Show a journal, or drain one whose instance will not come back. Give PATH or --instance N."""


@journal_command.command("show")
@_one_journal
@click.option("--limit", type=WholeNumber(0), default=_MAX_LISTED, show_default=True, help="number of entries; 0: all")
def show_command(path: Path | None, instance: int | None, as_json: bool, limit: int) -> None:
    """Show the entries, oldest first. The command changes nothing, and works while the instance runs.

    The exit code is 1 if something in the journal is damaged."""
    found = _read_listing(_path_of(path, instance), limit)
    if as_json:
        click.echo(encode(found).decode())
    else:
        _print(found)
    if found.damaged or found.file_damaged:
        sys.exit(1)


@journal_command.command("drain")
@_one_journal
def drain_command(path: Path | None, instance: int | None, as_json: bool) -> None:
    """Publish all entries, and remove each one after RabbitMQ has confirmed it. The command is refused while the
    instance runs, because a running instance drains its journal itself.

    The exit code is 1 if entries are left, if damaged entries were not published, or if the file was damaged and set
    aside."""
    chosen = _path_of(path, instance)
    if journal_set_aside(chosen.name):
        raise click.ClickException(
            "this file was set aside: its intact entries were moved to the file that replaced it"
        )
    done = run(_drain(Settings.load(), chosen))
    if as_json:
        click.echo(encode(done).decode())
    else:
        lanes = ", ".join(f"{count} {lane}" for lane, count in sorted(done["lanes"].items())) or "none"
        click.echo(f"{done['published']} changes published ({lanes}), {done['left']} left in {done['path']}")
        if done["aside"]:
            click.echo(f"the file was damaged and set aside: {', '.join(done['aside'])}", err=True)
        if done["damaged"]:
            click.echo(f"{done['damaged']} damaged entries were not published; `journal show` names them", err=True)
        if done["error"]:
            click.echo(f"stopped: {done['error']}", err=True)
    if done["left"] or done["damaged"] or done["aside"]:
        sys.exit(1)


def _path_of(path: Path | None, instance: int | None) -> Path:
    if (path is None) is (instance is None):
        raise click.UsageError("give either PATH or --instance")
    chosen = path or Settings.load().numbered(instance or 0).journal_path
    # A file that does not begin like a journal counts as a damaged journal, and `drain` replaces it. Only its name can
    # show that it is a journal. This check comes before anything is opened or locked.
    if not is_journal_name(chosen.name) and not journal_set_aside(chosen.name):
        raise click.ClickException(
            f"{chosen} is not a journal: the file of a journal has a name such as orders-2.sqlite"
        )
    if not files_of(chosen):
        raise click.ClickException(f"no journal: {chosen}")
    return chosen


# -- show ------------------------------------------------------------------------------------------------------------


def _read_listing(path: Path, limit: int) -> JournalListing:
    found, problem = _contents(path)
    at = now()
    entries = [_waiting_entry(lane, event, at) for lane, event in found.entries]
    ages = [entry.age_seconds for entry in entries if entry.age_seconds is not None]
    return JournalListing(
        path=str(path),
        held_by=Lease.holder(path),
        file_damaged=problem,
        files_aside=[file.name for file in files_aside(path)],
        count=len(entries),
        bytes=sum(entry.bytes for entry in entries),
        lanes=dict(Counter(entry.lane for entry in entries)),
        oldest_seconds=max(ages, default=None),
        entries=entries[: limit or None],
        damaged=[_damaged_entry(entry) for entry in found.damaged],
    )


def _contents(path: Path) -> tuple[Contents, str | None]:
    try:
        return contents(readable(path)), None
    except (sqlite3.Error, ValueError) as error:
        salvage = Salvage(readable(path))
        entries = [(Lane(lane), event) for lane, event in salvage.entries()]
        return Contents(entries=entries, damaged=salvage.damaged()), str(error)


def _waiting_entry(lane: Lane, event: bytes, at: datetime) -> WaitingEntry:
    name = name_of(lane, event)
    age = None if name.accepted_at is None else round((at - name.accepted_at).total_seconds(), 1)
    return WaitingEntry(
        lane=lane.value,
        change_id=name.change_id,
        subject=name.subject,
        version=name.version,
        restaurant_id=name.restaurant_id,
        accepted_at=name.accepted_at,
        age_seconds=age,
        bytes=len(event),
        trace_id=trace_id_of(name.traceparent),
    )


def _damaged_entry(entry: Damaged) -> DamagedEntry:
    name = entry.name or Name(entry="", lane=entry.lane or "")
    return DamagedEntry(
        why=entry.why,
        lane=entry.lane,
        change_id=name.change_id,
        subject=name.subject,
        trace_id=trace_id_of(name.traceparent),
        bytes_left=len(entry.event or b""),
    )


def _print(found: JournalListing) -> None:
    screen = console()
    screen.print(
        f"{found.path}: {f'held by {found.held_by}' if found.held_by else 'no process has it open'}", soft_wrap=True
    )
    if found.file_damaged:
        screen.print(_damaged(f"{found.file_damaged}; the entries below were salvaged from it"), soft_wrap=True)
    if found.entries:
        rows = []
        for waiting in found.entries:
            age = "" if waiting.age_seconds is None else f"{waiting.age_seconds:.0f} s"
            change = waiting.change_id or "unreadable"
            rows.append((waiting.lane, change, waiting.subject, str(waiting.version), age, str(waiting.bytes)))
        print_table(_COLUMNS, rows)
    if len(found.entries) < found.count:
        screen.print(f"… and {found.count - len(found.entries)} more; --limit 0 shows all")
    lanes = ", ".join(f"{count} {lane}" for lane, count in sorted(found.lanes.items()))
    oldest = "" if found.oldest_seconds is None else f"; the oldest has waited {found.oldest_seconds:.0f} s"
    screen.print(f"{found.count} changes wait{f' ({lanes})' if lanes else ''}, {found.bytes} bytes{oldest}")
    for bad in found.damaged:
        named = f"change {bad.change_id} of {bad.subject}" if bad.change_id else "an entry without an id"
        screen.print(_damaged(f"{named}: {bad.why}; trace {bad.trace_id or '-'}"), soft_wrap=True)
    for name in found.files_aside:
        screen.print(f"set aside: {name}", soft_wrap=True)


def _damaged(text: str) -> Text:
    return Text.assemble(("damaged", "bold red"), f": {text}")


# -- drain -----------------------------------------------------------------------------------------------------------


async def _drain(settings: Settings, path: Path) -> dict[str, Any]:
    try:
        lease = Lease.of_file(path)
    except NumberTaken as error:
        raise click.ClickException(str(error)) from error
    if lease is None:
        raise click.ClickException(
            f"the instance of this journal runs ({Lease.holder(path)}) and drains the journal itself: {path}"
        )
    with lease:
        before = set(files_aside(path))
        journal = Journal(path, instance=lease.number, max_bytes=settings.journal_max_bytes, lease=lease)
        publisher = publisher_of(settings)
        drainer = Drainer(journal, publisher)
        try:
            await journal.open()
            await publisher.start(wait=_CONNECT_TIMEOUT_SECONDS)
            stopped = await _drain_all(journal, drainer)
        except JournalBroken as broken:
            raise click.ClickException(str(broken)) from broken
        finally:
            await publisher.stop()
            await journal.close()
        return {
            "path": str(path),
            "published": sum(drainer.drained.values()),
            "lanes": {lane.value: count for lane, count in drainer.drained.items() if count},
            "left": journal.depth,
            "damaged": journal.damaged,
            "aside": [file.name for file in sorted(set(files_aside(path)) - before)],
            "error": stopped,
        }


async def _drain_all(journal: Journal, drainer: Drainer) -> str:
    """Publishes all entries. Returns the reason why entries are left, or an empty text if none is left."""
    failures = 0
    while journal.depth:
        try:
            await drainer.drain_some()
            failures = 0
        except (NotSent, InDoubt) as error:
            failures += 1
            if failures == _MAX_ATTEMPTS:
                return f"RabbitMQ does not accept the entries: {error}"
            await asyncio.sleep(_RETRY_PAUSE_SECONDS)
    return ""


COMMANDS = (journal_command,)
