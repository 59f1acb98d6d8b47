"""`ticketrail import`: bring the orders of another system in."""

import sys
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.sync.command_session import CommandSession, run
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.importer import Importer, ImportReport, RefusedRow
from services.sync.imports.sources import count, source_of
from shared.entities.contract import encode
from shared.settings import Settings

_SHOWN = 50


@click.command("import")
@click.argument("source")
@click.option("--restaurant", type=click.UUID, help="for rows that name no restaurant_id")
@click.option("--query", help="of a postgres:// source; a column for each field, items as JSON")
@click.option("--refused", type=click.File("wb", lazy=False), help="write refused rows there, a JSON object a line")
@click.option("--again", is_flag=True, help="from the beginning, also when it was done before")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def import_command(source: str, restaurant: Any, query: str | None, refused: Any, again: bool, as_json: bool) -> None:
    """Bring existing orders in: FILE.jsonl, FILE.csv or postgres://…

    Through the background lane, so that new orders are not delayed. What is interrupted goes on where it stopped. Exit
    code 1 when rows were refused."""
    report, why = run(_import(Settings.load(), source, str(restaurant) if restaurant else None, query, again, as_json))
    if refused is not None:
        refused.writelines(encode(one) + b"\n" for one in why)
    if as_json:
        click.echo(encode({**_plain(report), "refusals": why}).decode())
    else:
        for one in why[:_SHOWN]:
            click.echo(f"line {one.line}: {one.reason}")
        if len(why) > _SHOWN:
            click.echo(f"… and {len(why) - _SHOWN} more; --refused FILE has all of them")
        click.echo(
            f"{report.created} created, {report.updated} updated, {report.unchanged} unchanged,"
            f" {report.refused} refused, {report.skipped} done by an earlier run"
        )
    if report.refused:
        sys.exit(1)


def _plain(report: ImportReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


async def _import(
    settings: Settings, name: str, restaurant: str | None, query: str | None, again: bool, quiet: bool
) -> tuple[ImportReport, list[RefusedRow]]:
    source = source_of(name, query)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = quiet or not console.is_terminal
    total = None if quiet else count(source)
    async with CommandSession(settings) as session:
        upserts = ExternalOrderUpserts(
            session.postgres, session.mirror, session.rail, source="import", window_days=settings.mirror_window_days
        )
        with Progress(*columns, console=console, disable=quiet) as bar:
            task = bar.add_task(source.shown, total=total)
            report, why = await Importer(session.postgres, upserts).run(
                source, restaurant, again=again, progress=lambda report: bar.update(task, completed=report.read)
            )
            bar.update(task, total=report.read, completed=report.read)
    return report, why


COMMANDS = (import_command,)
