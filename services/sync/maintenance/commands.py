"""`ticketrail cleanup`: deletes expired data and finishes stale claims."""

import json

import click

from services.sync.command_session import CommandSession, run
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


COMMANDS = (cleanup_command,)
