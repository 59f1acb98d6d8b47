"""The commands of `ticketrail dlq` that act on many dead letters: replay, discard, undo, cancel, jobs. The sync worker
runs their jobs, so a command may end before its job does.

A command shows its plan, asks, makes the job, follows it with a progress bar and prints the outcome of each dead
letter.
"""

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from services.sync.command_options import Number, WholeNumber
from services.sync.command_output import TableColumn, ago, json_option, print_json, print_table
from services.sync.command_session import connected, run
from services.sync.dead_letters import replay_jobs
from services.sync.dead_letters.command_filters import DEAD_LETTER, counted, current, filters, query_of
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.replay_jobs import ReplayJob, ReplayPlan
from services.sync.dead_letters.store import DeadLetterQuery
from services.sync.id_argument import IdArgument
from services.sync.operator_session import ROLE, actor, ask, with_rail
from services.sync.printable import printable
from shared.errors import NotFound
from shared.settings import Settings

_JOB = IdArgument("job", replay_jobs.ids_between)
_JOB_COLUMNS = (
    TableColumn("id", "id"),
    TableColumn("made", optional=1),
    TableColumn("kind"),
    TableColumn("state"),
    TableColumn("total", right=True),
    TableColumn("outcomes", "text"),
    TableColumn("why", "text"),
)
_MAX_LISTED_ITEMS = 20
_FOLLOW_INTERVAL_SECONDS = 0.3
_BAD_OUTCOMES = ("failed", "would_fail")

_rate_option = click.option(
    "--rate",
    type=Number(0.1, 10_000),
    default=50.0,
    show_default=True,
    help="the maximum number of dead letters per second",
)
_yes_option = click.option("--yes", is_flag=True, help="do not ask for confirmation")
_detach_option = click.option("--detach", is_flag=True, help="do not wait until the job ends")


@click.command("replay")
@click.argument("dead_letters", type=DEAD_LETTER, nargs=-1)
@filters
@click.option(
    "--dry-run", is_flag=True, help="write each dead letter in a transaction that is rolled back, and show the result"
)
@_yes_option
@_detach_option
@click.option(
    "--canary/--no-canary", default=True, show_default=True, help="send one dead letter, then ten, then the rest"
)
@_rate_option
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
    **chosen: Any,
) -> None:
    """Replay DEAD_LETTERS, or all open dead letters that match the filters. The command shows the plan, and then starts
    a job in the worker.

    The exit code is 1 if a dead letter was not written, if one of DEAD_LETTERS is not open, or if the job stopped by
    itself."""
    query = query_of(**chosen, ids=dead_letters)
    plan = _planned(query, question=None if dry_run or yes else "Replay them?", as_json=as_json)
    job = _make(query, "dry_run" if dry_run else "replay", why=why, per_second=rate, canary=canary)
    _finish(job, plan, query, detach=detach, as_json=as_json)


@click.command("discard")
@click.argument("dead_letters", type=DEAD_LETTER, nargs=-1)
@filters
@_yes_option
@_detach_option
@_rate_option
@click.option("--why", required=True, help="the reason; it is kept in the audit")
@json_option
def discard_command(
    dead_letters: Sequence[str], yes: bool, detach: bool, rate: float, why: str, as_json: bool, **chosen: Any
) -> None:
    """Discard DEAD_LETTERS, or all open dead letters that match the filters. They can be restored within the retention.

    If readers have seen a change, a new change reverts it. A single dead letter is discarded at once. For more, the
    command shows the plan and starts a job in the worker; `dlq undo JOB` opens its dead letters again."""
    query = query_of(**chosen, ids=dead_letters)
    if query == DeadLetterQuery(ids=query.ids) and len(query.ids) == 1:
        _discard_one(query.ids[0], why, as_json)
        return
    plan = _planned(query, question=None if yes else "Discard them?", as_json=as_json)
    job = _make(query, "discard", why=why, per_second=rate, canary=False)
    _finish(job, plan, query, detach=detach, as_json=as_json)


def _discard_one(dead_letter: str, why: str, as_json: bool) -> None:
    seen = current(dead_letter)
    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).discard(
            dead_letter, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    reverted = f", reverted by change {done.replaced_by}" if done.replaced_by else ""
    print_json(done) if as_json else click.echo(f"discarded{reverted}")


@click.command("undo")
@click.argument("job", type=_JOB)
@_detach_option
@click.option("--why", help="the reason; it is kept in the audit")
@json_option
def undo_command(job: str, detach: bool, why: str | None, as_json: bool) -> None:
    """Open the dead letters again that the discard JOB has closed. Changes that reverted something stay."""
    restore = ask(lambda connection: replay_jobs.undo(connection, job, actor=actor(), role=ROLE, why=why))
    _finish(restore, None, DeadLetterQuery(), detach=detach, as_json=as_json)


@click.command("cancel")
@click.argument("job", type=_JOB)
@json_option
def cancel_command(job: str, as_json: bool) -> None:
    """Cancel a job. Dead letters that are already sent continue."""
    found = ask(lambda connection: replay_jobs.cancel(connection, job, actor=actor(), role=ROLE))
    print_json(found) if as_json else click.echo(f"job {found.id}: {found.state}")


@click.command("jobs")
@click.option("--limit", type=WholeNumber(1, 200), default=20, show_default=True)
@json_option
def jobs_command(limit: int, as_json: bool) -> None:
    """List replays, dry runs, discards and restores, newest first."""
    found = ask(lambda connection: replay_jobs.recent(connection, limit=limit))
    if as_json:
        print_json(found)
        return
    rows = [
        (job.id, ago(job.created_at), job.kind, job.state, str(job.total), _outcomes(job), job.why or "")
        for job in found
    ]
    print_table(_JOB_COLUMNS, rows)


# -- steps ----------------------------------------------------------------------------------------------------------


def _planned(query: DeadLetterQuery, *, question: str | None, as_json: bool) -> ReplayPlan:
    """Prints the plan and asks the question, unless there is nothing to do. Ends the command if the answer is no."""
    if query == DeadLetterQuery():
        raise click.UsageError("give DEAD_LETTERS, or a filter such as --fingerprint or --status open")
    plan = ask(lambda connection: replay_jobs.plan(connection, query))
    confirmed = question if plan.total > 0 else None
    if confirmed or not as_json:
        # With --json a script reads standard output, so the plan and the question go to standard error.
        where = "".join(f"\n  {n:6} to {queue}" for queue, n in plan.queues.items())
        click.echo(f"{counted(plan.total, 'open ')}{where}", err=as_json)
    for id_ in plan.absent:
        click.echo(f"{id_} does not exist or is not open", err=True)
    if confirmed:
        click.confirm(confirmed, abort=True, err=as_json)
    return plan


def _make(query: DeadLetterQuery, kind: str, **options: Any) -> ReplayJob:
    return ask(lambda connection: replay_jobs.make(connection, query, kind=kind, actor=actor(), role=ROLE, **options))


def _finish(job: ReplayJob, plan: ReplayPlan | None, query: DeadLetterQuery, *, detach: bool, as_json: bool) -> None:
    """Follows the job unless the command is detached, and prints it. The exit code is 1 if something is left."""
    if not detach:
        job = run(_follow(Settings.load(), job, quiet=as_json))
    items = ask(lambda connection: replay_jobs.items(connection, job.id, limit=500))
    if as_json:
        print_json({"plan": plan, "job": job, "items": items})
    else:
        for item in items[:_MAX_LISTED_ITEMS]:
            click.echo(printable(f"  {item.dead_letter_id}  {item.outcome or 'waiting'}  {item.detail or ''}"))
        outcomes, message = _outcomes(job), f": {job.message}" if job.message else ""
        click.echo(f"job {job.id}: {job.state}" + (f", {outcomes}" if outcomes else "") + message)
    fewer = bool(query.ids) and job.total < len(set(query.ids))  # others may close dead letters during the question
    failed = not detach and (job.state != "done" or any(job.outcomes.get(bad) for bad in _BAD_OUTCOMES))
    if fewer or failed:
        sys.exit(1)


def _outcomes(job: ReplayJob) -> str:
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(job.outcomes.items()))


async def _follow(settings: Settings, job: ReplayJob, *, quiet: bool) -> ReplayJob:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task(job.kind, total=job.total, state=job.state)
        while not job.ended:
            await asyncio.sleep(_FOLLOW_INTERVAL_SECONDS)
            async with connected(settings, settings.database_ops_url) as connection:
                found = await replay_jobs.one(connection, job.id)
            if found is None:
                raise NotFound("the job does not exist any more")
            job = found
            under_way = sum(job.outcomes.get(name, 0) for name in ("waiting", "sending", "sent"))
            bar.update(task, completed=job.total - under_way, state=job.state)
    return job


JOB_COMMANDS = (replay_command, discard_command, undo_command, cancel_command, jobs_command)
