"""`ticketrail dlq`: dead letters on the command line, by the same functions as the API.

Exit codes: 0 done; 1 it could not be done, or a replay did not bring every letter through; 2 wrong usage.
"""

import asyncio
import base64
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import click
import msgspec
from msgspec import structs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from services.sync.command_session import connected, run
from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters import store as dead_letter_store
from services.sync.dead_letters.editing import event_in
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.replay_jobs import ReplayJob
from services.sync.dead_letters.requests import DeadLetterFilter
from services.sync.dead_letters.store import DeadLetterGroup, DeadLetterQuery
from services.sync.dead_letters.view import dead_letter_view
from services.sync.difference import difference
from services.sync.operator_session import ROLE, actor, ago, ask, console, json_option, print_json, with_rail
from services.sync.printable import printable
from shared.entities.contract import encode
from shared.errors import NotFound
from shared.postgres.pool import Connection
from shared.settings import Settings

_BARS = " ▁▂▃▄▅▆▇█"
_PIECE = 200


@click.group("dlq")
def dlq_command() -> None:
    """Dead letters: look at them, replay, mend, discard."""


# -- which letters, and how it is printed ------------------------------------------------------------------------


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.option("--queue", help="the dead queue"),
        click.option("--fingerprint", help="what they died of: `dlq groups` lists them"),
        click.option("--reason", help="such as contract_broken"),
        click.option("--entity", help="such as order"),
        click.option("--restaurant", type=click.UUID),
        click.option("--status", type=click.Choice(dead_letter_store.STATUSES), multiple=True),
        click.option("--since", type=click.FloatRange(0), help="failed within so many hours"),
        click.option("--text", help="in the error, the place or the body"),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _query(status: Sequence[str], since: float | None, ids: Sequence[UUID] = (), **filters: Any) -> DeadLetterQuery:
    """By the API's own filter. Here several statuses can be given."""
    failed_from = datetime.now(UTC) - timedelta(hours=since) if since is not None else None
    filters["restaurant_id"] = filters.pop("restaurant")
    query = DeadLetterFilter(from_=failed_from, **filters).query(tuple(str(id_) for id_ in ids))
    return structs.replace(query, statuses=tuple(status))


def _letters(n: int, kind: str = "") -> str:
    return f"{n} {kind}letter{'' if n == 1 else 's'}"


# -- looking -----------------------------------------------------------------------------------------------------


@dlq_command.command("list")
@_filters
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_command(limit: int, as_json: bool, **filters: Any) -> None:
    """List dead letters, the newest failure first."""
    wanted = _query(**filters)
    found = ask(lambda connection: dead_letter_store.page(connection, wanted, limit=limit))
    if as_json:
        print_json(found)
        return
    table = Table("id", "failed", "deaths", "status", "about", "error", box=None, header_style="bold")
    for one in found:
        about = f"{one.entity or '?'} v{one.version}" if one.version else (one.entity or "unreadable")
        cells = (one.id, ago(one.last_failed_at), str(one.deaths), one.status, about, one.error[:90])
        table.add_row(*map(printable, cells))
    console().print(table)
    click.echo(_letters(len(found)) + (" (there may be more: --limit)" if len(found) == limit else ""))


@dlq_command.command("groups")
@_filters
@json_option
def groups_command(as_json: bool, **filters: Any) -> None:
    """Dead letters by what they died of, the most first."""
    wanted = _query(**filters)
    found = ask(lambda connection: dead_letter_store.groups(connection, wanted))
    if as_json:
        print_json(found)
        return
    table = Table("fingerprint", "count", "open", "first", "last", "24 h", "reason", "place", box=None)
    for one in found:
        table.add_row(
            one.fingerprint,
            str(one.count),
            str(one.open),
            ago(one.first_failed_at),
            ago(one.last_failed_at),
            _sparkline(one),
            printable(one.reason),
            printable(one.place),
        )
    console().print(table)


def _sparkline(group: DeadLetterGroup) -> str:
    most = max(group.trend) or 1
    return "".join(_BARS[min(8, (8 * n + most - 1) // most)] for n in group.trend)


@dlq_command.command("show")
@click.argument("letter", type=click.UUID)
@json_option
def show_command(letter: UUID, as_json: bool) -> None:
    """Show a dead letter with all that is known of it."""

    seen = ask(lambda connection: dead_letter_view(connection, str(letter), operator=True))
    if as_json:
        print_json(seen)
        return
    click.echo("\n".join(map(printable, _lines(msgspec.to_builtins(seen)))))


def _lines(plain: dict[str, Any]) -> Iterator[str]:
    for name, value in plain["letter"].items():
        if value is not None:
            yield f"{name + ':':18}{value}"
    for attempt in plain["attempts"]:
        yield f"{'attempt:':18}{attempt['at']}  {attempt['reason']}  {attempt['error']}  ({attempt['place']})"
    for act in plain["actions"]:
        yield f"{'action:':18}{act['at']}  {act['action']} by {act['actor']}  {act['why'] or ''}"
    for edit in plain["edits"]:
        for one in edit["difference"]:
            yield f"{'edited:':18}{one['path']}: {one.get('before')} → {one.get('after')}"
    yield json.dumps(plain["event"], indent=2, ensure_ascii=False) if plain["event"] is not None else plain["body"]


@dlq_command.command("export")
@_filters
@click.option("--out", type=click.Path(dir_okay=False), help="a file; by default standard output")
def export_command(out: str | None, **filters: Any) -> None:
    """Write letters as JSON lines, each whole, its body in base64 as received."""
    wanted = _query(**filters)

    async def write(connection: Connection, file: IO[bytes]) -> int:
        # One at a time: a body may have 16 MB. As of one moment: what dies again meanwhile would move to the front.
        written = 0
        before: tuple[datetime, str] | None = None
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            while page := await dead_letter_store.page(connection, wanted, before=before, limit=_PIECE):
                for one in page:
                    whole = await dead_letter_store.one(connection, one.id)
                    assert whole is not None
                    plain = msgspec.to_builtins(whole)
                    _put(file, encode({**plain, "body": base64.b64encode(whole.body).decode()}) + b"\n")
                    written += 1
                before = (page[-1].last_failed_at, page[-1].id)
        return written

    if out is None:
        ask(lambda connection: write(connection, sys.stdout.buffer))
        return
    # Whole or not at all: half an export must not be taken for one. A pipe or a device is written as it is.
    target = Path(out).resolve()
    half = target.with_name(f"{target.name}.part") if target.is_file() or not target.exists() else target
    try:
        with half.open("wb") as file:
            written = ask(lambda connection: write(connection, file))
        if half != target:
            half.replace(target)
    except OSError as error:
        raise click.FileError(out, error.strerror) from error
    finally:
        if half != target:
            half.unlink(missing_ok=True)
    click.echo(f"{_letters(written)} in {out}")


def _put(file: IO[bytes], line: bytes) -> None:
    """Told here: further out it would be taken for a backend that does not answer."""
    try:
        file.write(line)
        file.flush()
    except BrokenPipeError:  # who reads it has seen enough; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        raise click.FileError(file.name, error.strerror) from error


# -- acting ------------------------------------------------------------------------------------------------------


@dlq_command.command("replay")
@click.argument("letters", type=click.UUID, nargs=-1)
@_filters
@click.option(
    "--dry-run", is_flag=True, help="execute each in a transaction that is rolled back, and say what would be"
)
@click.option("--yes", is_flag=True, help="do not ask")
@click.option("--detach", is_flag=True, help="do not wait for it")
@click.option("--canary/--no-canary", default=True, show_default=True, help="1, then 10, then the rest")
@click.option("--rate", type=click.FloatRange(0.1, 10_000), default=50.0, show_default=True, help="letters a second")
@click.option("--why", help="kept in the audit")
@json_option
def replay_command(
    letters: Sequence[UUID],
    dry_run: bool,
    yes: bool,
    detach: bool,
    canary: bool,
    rate: float,
    why: str | None,
    as_json: bool,
    **filters: Any,
) -> None:
    """Replay LETTERS, or all that are open and match the filters: plan first, then a job in the worker.

    Exit code 1 when not every letter came through, one that was named is not open, or the job stopped by itself."""
    wanted = _query(**filters, ids=letters)
    if wanted == DeadLetterQuery():
        raise click.UsageError("name letters, or a filter such as --fingerprint or --status open")
    plan = ask(lambda connection: replay_jobs.plan(connection, wanted))
    asks = plan.total > 0 and not dry_run and not yes
    if asks or not as_json:
        # In front of a question also with --json; there the output is for the script alone.
        where = "".join(f"\n  {n:6} to {queue}" for queue, n in plan.queues.items())
        click.echo(f"{_letters(plan.total, 'open ')}{where}", err=as_json)
    for id_ in plan.absent:
        click.echo(f"{id_} is not there, or not open", err=True)
    if asks:
        click.confirm("Replay them?", abort=True, err=as_json)
    job = ask(
        lambda connection: replay_jobs.make(
            connection,
            wanted,
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
    lines = ask(lambda connection: replay_jobs.letters(connection, job.id, limit=500))
    if as_json:
        print_json({"plan": plan, "job": job, "letters": lines})
    else:
        for one in lines[:20]:
            click.echo(printable(f"  {one.letter_id}  {one.outcome or 'waiting'}  {one.detail or ''}"))
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(job.outcomes.items()))
        said = f": {job.message}" if job.message else ""
        click.echo(f"job {job.id}: {job.state}" + (f", {outcomes}" if outcomes else "") + said)
    fewer = bool(wanted.ids) and job.total < len(set(wanted.ids))  # also what was closed while the question stood
    died = not detach and (job.state != "done" or any(job.outcomes.get(bad) for bad in ("failed", "would_fail")))
    if fewer or died:
        sys.exit(1)


async def _follow(settings: Settings, job: ReplayJob, *, quiet: bool) -> ReplayJob:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task(job.kind, total=job.total, state=job.state)
        while not job.ended:
            await asyncio.sleep(0.3)
            async with connected(settings, settings.database_ops_url) as connection:
                found = await replay_jobs.one(connection, job.id)
            if found is None:
                raise NotFound("the job is gone")
            job = found
            under_way = sum(job.outcomes.get(name, 0) for name in ("waiting", "sending", "sent"))
            bar.update(task, completed=job.total - under_way, state=job.state)
    return job


@dlq_command.command("cancel")
@click.argument("job", type=click.UUID)
@json_option
def cancel_command(job: UUID, as_json: bool) -> None:
    """Cancel a replay: nothing more of it is sent."""
    found = ask(lambda connection: replay_jobs.cancel(connection, str(job), actor=actor(), role=ROLE))
    print_json(found) if as_json else click.echo(f"job {found.id}: {found.state}")


@dlq_command.command("edit")
@click.argument("letter", type=click.UUID)
@click.option("--event", type=click.Path(exists=True, dir_okay=False), help="the new event as JSON; else $EDITOR opens")
@click.option("--why", help="kept in the audit")
@json_option
def edit_command(letter: UUID, event: str | None, why: str | None, as_json: bool) -> None:
    """Mend a dead letter by hand: a new change at head + 1. What says whose it is stays as it is."""
    seen = ask(lambda connection: dead_letter_store.one(connection, str(letter)))
    if seen is None:
        raise click.ClickException("no such dead letter")
    original = event_in(seen.body)
    if event is not None:
        text: str | bytes | None = Path(event).read_bytes()
    else:
        text = click.edit(json.dumps(original or {}, indent=2, ensure_ascii=False), extension=".json")
    if text is None:
        raise click.ClickException("nothing was changed")
    try:
        wanted = json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"not JSON: {error}") from error
    if not isinstance(wanted, dict):
        raise click.ClickException("the event is an object")
    if not as_json and original is not None:
        for one in difference(original, wanted):
            click.echo(printable(f"{one['path']}: {one.get('before')} → {one.get('after')}"))

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).edit(
            str(letter), wanted, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    print_json(done) if as_json else click.echo(f"resolved by change {done.replaced_by}")


@dlq_command.command("discard")
@click.argument("letter", type=click.UUID)
@click.option("--why", required=True, help="kept in the audit")
@json_option
def discard_command(letter: UUID, why: str, as_json: bool) -> None:
    """Discard a dead letter. What readers saw of it is taken back; it can be restored within the retention."""
    seen = ask(lambda connection: dead_letter_store.one(connection, str(letter)))
    if seen is None:
        raise click.ClickException("no such dead letter")

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).discard(
            str(letter), revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    taken_back = f", taken back by change {done.replaced_by}" if done.replaced_by else ""
    print_json(done) if as_json else click.echo(f"discarded{taken_back}")


@dlq_command.command("restore")
@click.argument("letter", type=click.UUID)
@click.option("--why", help="kept in the audit")
@json_option
def restore_command(letter: UUID, why: str | None, as_json: bool) -> None:
    """Restore a dead letter that was discarded."""
    seen = ask(lambda connection: dead_letter_store.one(connection, str(letter)))
    if seen is None:
        raise click.ClickException("no such dead letter")

    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).restore(
            str(letter), revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    print_json(done) if as_json else click.echo("open again")


COMMANDS = (dlq_command,)
