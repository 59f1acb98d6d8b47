"""`ticketrail cleanup` deletes expired data and finishes stale claims; `backup` and `restore` keep PostgreSQL."""

import json
from pathlib import Path

import click

from services.sync.command_output import json_option, print_json
from services.sync.command_session import CommandSession, run
from services.sync.maintenance.backup import make_backup, restore_backup
from services.sync.maintenance.cleanup import Cleanup
from shared.settings import Settings


@click.command("cleanup")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def cleanup_command(as_json: bool) -> None:
    """Delete expired data: tokens, sessions, imports, closed dead letters and traces; finish stale claims."""
    removed = run(_cleanup(Settings.load()))
    click.echo(json.dumps(removed) if as_json else ", ".join(f"{n} {what}" for what, n in removed.items()))


async def _cleanup(settings: Settings) -> dict[str, int]:
    async with CommandSession(settings) as session:
        removed = await Cleanup(settings, session.postgres).clean()
        return {**removed, "claims": await session.rail.claim_finisher.finish_all()}


@click.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@json_option
def backup_command(file: Path, as_json: bool) -> None:
    """Write PostgreSQL into FILE by pg_dump, while the services run.

    A backup lacks what is elsewhere: changes in queues and journals, the change log, and the mirror."""
    made = run(make_backup(Settings.load(), file.absolute()))
    if as_json:
        print_json(made)
    else:
        newest = f", the newest of {made.newest:%Y-%m-%d %H:%M:%S} UTC" if made.newest else ""
        click.echo(f"{made.path}: {made.changes} changes{newest}, {made.bytes} bytes")


@click.command("restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def restore_command(file: Path) -> None:
    """Restore a backup into the database, which must be empty. The services must not run.

    The ledger then brings back every accepted change that the change log has and the backup lacks."""
    applied = run(restore_backup(Settings.load(), file.absolute()))
    click.echo(f"restored; schema: {', '.join(applied) if applied else 'up to date'}")
    click.echo("start the services, then check: ticketrail full-sync --verify; ticketrail ledger --all")


COMMANDS = (cleanup_command, backup_command, restore_command)
