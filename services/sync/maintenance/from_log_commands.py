"""`ticketrail replay --from-log`: writes the changes that PostgreSQL lacks after it was restored from a backup."""

import sys
from datetime import datetime

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from services.sync.command_options import Since
from services.sync.command_session import CommandSession, run
from services.sync.maintenance.from_log import LogReplay, LogReplayReport
from services.sync.writer.batch_writer import HoldExpired
from shared.entities.contract import encode, now
from shared.settings import Settings


@click.command("replay")
@click.option("--from-log", is_flag=True, required=True, help="write the changes that the log has and PostgreSQL lacks")
@click.option(
    "--since", type=Since(), help="a moment before the backup was taken: 2h, 7d, ISO 8601; default: the whole log"
)
@click.option("--dry-run", is_flag=True, help="only count what is missing")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def replay_command(from_log: bool, since: datetime | None, dry_run: bool, as_json: bool) -> None:
    """After PostgreSQL was restored from a backup, write the changes that the log has and PostgreSQL lacks.

    The services may run during the replay, and the command may be stopped and repeated. The exit code is 1 if a change
    could not be written and was sent to the retry ladder or the dead-letter queue."""
    report = run(_replay(Settings.load(), since, dry_run, quiet=as_json))
    if as_json:
        click.echo(encode(report).decode())
    else:
        _show(report, dry_run)
    if report.failed:
        sys.exit(1)


async def _replay(settings: Settings, since: datetime | None, dry_run: bool, *, quiet: bool) -> LogReplayReport:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn())
    async with CommandSession(settings) as session:
        with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
            began = now()
            task = bar.add_task("reading the log", total=None, counts="")

            def show(report: LogReplayReport) -> None:
                first, last = report.first or began, report.last or began
                bar.update(
                    task,
                    total=max(1.0, (began - first).total_seconds()),
                    completed=(last - first).total_seconds(),
                    counts=f"{report.read} read, {report.missing} missing, {report.written} written",
                )

            try:
                return await LogReplay(settings, session.postgres, session.publisher, dry_run=dry_run).run(
                    since=since, progress=show
                )
            except HoldExpired as error:
                raise click.ClickException(
                    f"PostgreSQL does not answer; repeat the command when it answers again: {error}"
                ) from error


def _show(report: LogReplayReport, dry_run: bool) -> None:
    if report.first is None:
        return click.echo("the log holds no changes")
    click.echo(f"log: {report.read} changes, from {report.first:%Y-%m-%d %H:%M:%S} UTC on")
    kinds = ", ".join(f"{count} {name}" for name, count in report.entities.most_common())
    click.echo(f"missing: {report.missing}{f' ({kinds})' if kinds else ''}")
    if report.dead:
        click.echo(f"not written: {report.dead} changes that have a dead letter")
    if dry_run:
        return None
    click.echo(f"written: {report.written}, failed: {report.failed}, unreadable: {report.unreadable}")
    return None


COMMANDS = (replay_command,)
