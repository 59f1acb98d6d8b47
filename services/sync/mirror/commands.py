"""`ticketrail full-sync`: compares the mirror with PostgreSQL and repairs the mirror."""

import sys
from typing import Any

import click

from services.sync.command_session import CommandSession, run
from services.sync.mirror.full_sync import Difference, FullSync
from shared.entities.contract import encode
from shared.settings import Settings

_MAX_SHOWN = 50


@click.command("full-sync")
@click.option("--verify", is_flag=True, help="only compare; the exit code is 1 if something differs")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def full_sync_command(verify: bool, as_json: bool) -> None:
    """Compare the mirror with PostgreSQL, print the differences, and repair the mirror."""
    differences: list[Difference] = []
    found = run(_full_sync(Settings.load(), repair=not verify, report=differences.append))
    if as_json:
        click.echo(
            encode(
                {
                    "compared": found.compared,
                    "pending": found.pending,
                    "repaired": found.repaired,
                    "differences": differences,
                }
            ).decode()
        )
    else:
        for difference in differences[:_MAX_SHOWN]:
            click.echo(
                f"{difference.what:8}  {difference.entity} {difference.id}  restaurant {difference.restaurant_id}"
            )
        if len(differences) > _MAX_SHOWN:
            click.echo(f"… and {len(differences) - _MAX_SHOWN} more; --json lists all of them")
        click.echo(
            f"{found.compared} compared: {len(differences)} differ"
            + (f" ({', '.join(f'{n} {what}' for what, n in sorted(found.differences.items()))})" if differences else "")
            + f", {found.pending} pending, {found.repaired} repaired"
        )
    if verify and differences:
        sys.exit(1)


async def _full_sync(settings: Settings, *, repair: bool, report: Any) -> Any:
    async with CommandSession(settings) as session:
        return await FullSync(settings, session.postgres, session.mirror).run(repair=repair, report=report)


COMMANDS = (full_sync_command,)
