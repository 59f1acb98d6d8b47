"""`ticketrail dlq`: dead letters on the command line. The commands call the same functions as the API.

Exit codes: 0 success, 1 a failure or a replay that did not write every dead letter, 2 wrong usage.
"""

import asyncio
import base64
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import click
import msgspec
from msgspec import structs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.sync.command_options import Number, Since, WholeNumber
from services.sync.command_output import TableColumn, ago, json_option, print_json, print_table
from services.sync.command_session import connected, run
from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.editing import event_in
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.replay_jobs import ReplayJob
from services.sync.dead_letters.requests import DeadLetterFilter
from services.sync.dead_letters.store import DeadLetterGroup, DeadLetterQuery, FullDeadLetter
from services.sync.dead_letters.view import dead_letter_view
from services.sync.difference import difference
from services.sync.id_argument import RESTAURANT, IdArgument
from services.sync.operator_session import ROLE, actor, ask, with_rail
from services.sync.printable import printable
from shared.entities.contract import encode
from shared.errors import NotFound
from shared.postgres.pool import Connection
from shared.settings import Settings

_DEAD_LETTER = IdArgument("dead letter", dead_letter_store.ids_between)
_REPLAY_JOB = IdArgument("replay job", replay_jobs.ids_between)
_LIST_COLUMNS = (
    TableColumn("id", "id"),
    TableColumn("failed", optional=1),
    TableColumn("deaths", optional=3, right=True),
    TableColumn("status", optional=2),
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
_MAX_LISTED_ITEMS = 20
_FOLLOW_INTERVAL_SECONDS = 0.3


@click.group("dlq")
def dlq_command() -> None:
    """List, show, replay, edit, discard and restore dead letters."""


# -- filters -----------------------------------------------------------------------------------------------------


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--queue", help="the dead-letter queue"),
        click.option("--fingerprint", help="the fingerprint, as `dlq groups` shows it"),
        click.option("--reason", help="the reason, such as contract_broken"),
        click.option("--entity", help="the entity, such as order"),
        click.option("--restaurant", type=RESTAURANT, help="id, prefix of an id, or slug"),
        click.option("--status", type=click.Choice(dead_letter_store.STATUSES), multiple=True),
        click.option("--since", type=Since(), help="only failures since then: 90s, 15m, 2h, 7d, ISO 8601"),
        click.option("--text", help="a text in the error, the place or the body"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _query(status: Sequence[str], since: datetime | None, ids: Sequence[str] = (), **filters: Any) -> DeadLetterQuery:
    """Builds a query with the filter of the API. Unlike the API, the command line accepts several statuses."""
    filters["restaurant_id"] = filters.pop("restaurant")
    query = DeadLetterFilter(from_=since, **filters).query(tuple(ids))
    return structs.replace(query, statuses=tuple(status))


def _count(n: int, kind: str = "") -> str:
    return f"{n} {kind}dead letter{'' if n == 1 else 's'}"


# -- reading -----------------------------------------------------------------------------------------------------


@dlq_command.command("list")
@_filters
@click.option("--limit", type=WholeNumber(1, 10_000), default=50, show_default=True)
@json_option
def list_command(limit: int, as_json: bool, **filters: Any) -> None:
    """List dead letters, newest failure first."""
    query = _query(**filters)
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
                about,
                dead_letter.error,
            )
        )
    print_table(_LIST_COLUMNS, rows)
    click.echo(_count(len(found)) + (" (there may be more: --limit)" if len(found) == limit else ""))


@dlq_command.command("groups")
@_filters
@json_option
def groups_command(as_json: bool, **filters: Any) -> None:
    """Group dead letters by cause, largest group first."""
    query = _query(**filters)
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
@click.argument("dead_letter", type=_DEAD_LETTER)
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
@_filters
@click.option("--out", type=click.Path(dir_okay=False), help="a file; default: standard output")
def export_command(out: str | None, **filters: Any) -> None:
    """Write dead letters with all their fields, one JSON object per line. The body is in base64, exactly as
    received."""
    query = _query(**filters)

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
    click.echo(f"{_count(written)} in {out}")


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


@dlq_command.command("replay")
@click.argument("dead_letters", type=_DEAD_LETTER, nargs=-1)
@_filters
@click.option(
    "--dry-run", is_flag=True, help="write each dead letter in a transaction that is rolled back, and show the result"
)
@click.option("--yes", is_flag=True, help="do not ask for confirmation")
@click.option("--detach", is_flag=True, help="do not wait until the job ends")
@click.option(
    "--canary/--no-canary", default=True, show_default=True, help="send one dead letter, then ten, then the rest"
)
@click.option(
    "--rate",
    type=Number(0.1, 10_000),
    default=50.0,
    show_default=True,
    help="the maximum number of dead letters per second",
)
@click.option("--why", help="the reason; it is kept in the audit")
@json_option
def replay_command(
    dead_letters: Sequence[str],
    dry_run: bool,
    yes: bool,
    detach: bool,
    canary: bool,
    rate: float,
    why: str | None,
    as_json: bool,
    **filters: Any,
) -> None:
    """Replay DEAD_LETTERS, or all open dead letters that match the filters. The command shows the plan, and then starts
    a job in the worker.

    The exit code is 1 if a dead letter was not written, if one of DEAD_LETTERS is not open, or if the job stopped by
    itself."""
    query = _query(**filters, ids=dead_letters)
    if query == DeadLetterQuery():
        raise click.UsageError("give DEAD_LETTERS, or a filter such as --fingerprint or --status open")
    plan = ask(lambda connection: replay_jobs.plan(connection, query))
    needs_confirmation = plan.total > 0 and not dry_run and not yes
    if needs_confirmation or not as_json:
        # With --json a script reads standard output, so the plan and the question go to standard error.
        where = "".join(f"\n  {n:6} to {queue}" for queue, n in plan.queues.items())
        click.echo(f"{_count(plan.total, 'open ')}{where}", err=as_json)
    for id_ in plan.absent:
        click.echo(f"{id_} does not exist or is not open", err=True)
    if needs_confirmation:
        click.confirm("Replay them?", abort=True, err=as_json)
    job = ask(
        lambda connection: replay_jobs.make(
            connection,
            query,
            kind="dry_run" if dry_run else "replay",
            actor=actor(),
            role=ROLE,
            why=why,
            per_second=rate,
            canary=canary,
        )
    )
    if not detach:
        job = run(_follow(Settings.load(), job, quiet=as_json))
    items = ask(lambda connection: replay_jobs.items(connection, job.id, limit=500))
    if as_json:
        print_json({"plan": plan, "job": job, "items": items})
    else:
        for item in items[:_MAX_LISTED_ITEMS]:
            click.echo(printable(f"  {item.dead_letter_id}  {item.outcome or 'waiting'}  {item.detail or ''}"))
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(job.outcomes.items()))
        message = f": {job.message}" if job.message else ""
        click.echo(f"job {job.id}: {job.state}" + (f", {outcomes}" if outcomes else "") + message)
    fewer = bool(query.ids) and job.total < len(set(query.ids))  # others may close dead letters during the question
    failed = not detach and (job.state != "done" or any(job.outcomes.get(bad) for bad in ("failed", "would_fail")))
    if fewer or failed:
        sys.exit(1)


async def _follow(settings: Settings, job: ReplayJob, *, quiet: bool) -> ReplayJob:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task(job.kind, total=job.total, state=job.state)
        while not job.ended:
            await asyncio.sleep(_FOLLOW_INTERVAL_SECONDS)
            async with connected(settings, settings.database_ops_url) as connection:
                found = await replay_jobs.one(connection, job.id)
            if found is None:
                raise NotFound("the replay job does not exist any more")
            job = found
            under_way = sum(job.outcomes.get(name, 0) for name in ("waiting", "sending", "sent"))
            bar.update(task, completed=job.total - under_way, state=job.state)
    return job


@dlq_command.command("cancel")
@click.argument("job", type=_REPLAY_JOB)
@json_option
def cancel_command(job: str, as_json: bool) -> None:
    """Cancel a replay. Dead letters that are already sent continue."""
    found = ask(lambda connection: replay_jobs.cancel(connection, job, actor=actor(), role=ROLE))
    print_json(found) if as_json else click.echo(f"job {found.id}: {found.state}")


def _current(dead_letter: str) -> FullDeadLetter:
    """Returns the dead letter with its current revision, which the action must name."""
    found = ask(lambda connection: dead_letter_store.one(connection, dead_letter))
    if found is None:
        raise click.ClickException("no such dead letter")
    return found


@dlq_command.command("edit")
@click.argument("dead_letter", type=_DEAD_LETTER)
@click.option(
    "--event",
    type=click.Path(exists=True, dir_okay=False),
    help="a JSON file with the event; by default $EDITOR opens the event",
)
@click.option("--why", help="the reason; it is kept in the audit")
@json_option
def edit_command(dead_letter: str, event: str | None, why: str | None, as_json: bool) -> None:
    """Repair a dead letter. The event that you give becomes a new change at head version + 1.

    Restaurant and subject cannot be edited."""
    seen = _current(dead_letter)
    original = event_in(seen.body)
    if event is not None:
        text: str | bytes | None = Path(event).read_bytes()
    else:
        text = click.edit(json.dumps(original or {}, indent=2, ensure_ascii=False), extension=".json")
    if text is None:
        raise click.ClickException("you changed nothing")
    try:
        edited = json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"the event is not JSON: {error}") from error
    if not isinstance(edited, dict):
        raise click.ClickException("the event must be a JSON object")
    if not as_json and original is not None:
        for leaf in difference(original, edited):
            click.echo(printable(f"{leaf['path']}: {leaf.get('before')} → {leaf.get('after')}"))

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).edit(
            dead_letter, edited, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    print_json(done) if as_json else click.echo(f"resolved by change {done.replaced_by}")


@dlq_command.command("discard")
@click.argument("dead_letter", type=_DEAD_LETTER)
@click.option("--why", required=True, help="the reason; it is kept in the audit")
@json_option
def discard_command(dead_letter: str, why: str, as_json: bool) -> None:
    """Discard a dead letter; it can be restored within the retention.

    If readers have seen its change, a new change reverts it."""
    seen = _current(dead_letter)

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).discard(
            dead_letter, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    reverted = f", reverted by change {done.replaced_by}" if done.replaced_by else ""
    print_json(done) if as_json else click.echo(f"discarded{reverted}")


@dlq_command.command("restore")
@click.argument("dead_letter", type=_DEAD_LETTER)
@click.option("--why", help="the reason; it is kept in the audit")
@json_option
def restore_command(dead_letter: str, why: str | None, as_json: bool) -> None:
    """Open a discarded dead letter again."""
    seen = _current(dead_letter)

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).restore(
            dead_letter, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    print_json(done) if as_json else click.echo("the dead letter is open again")


COMMANDS = (dlq_command,)
