"""`ticketrail import`: imports the orders of another system."""

import sys
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.sync.command_session import CommandSession, run
from services.sync.id_argument import RESTAURANT
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.importer import Importer, ImportReport, RefusedRow
from services.sync.imports.sources import count, named_source, source_of
from shared.entities.contract import encode
from shared.settings import Settings

_MAX_LISTED = 50


@click.command("import")
@click.argument("source")
@click.option(
    "--restaurant", type=RESTAURANT, help="the restaurant of rows without restaurant_id: id, prefix of an id, or slug"
)
@click.option("--query", help="SQL for a postgres:// source; one column per field, items as JSON")
@click.option("--refused", type=click.File("wb", lazy=False), help="file for refused rows, one JSON object per line")
@click.option("--again", is_flag=True, help="start from the first row, even if an earlier run imported it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def import_command(
    source: str, restaurant: str | None, query: str | None, refused: Any, again: bool, as_json: bool
) -> None:
    """Import existing orders from FILE.jsonl, FILE.csv, or a PostgreSQL database.

    Every user of a machine can read the arguments of a command. So put the URL postgres://… with its password into a
    file or a variable of the environment, and name that: @FILE or env:NAME.

    The import uses the background lane, so that it does not delay new orders. An interrupted import continues where it
    stopped. The exit code is 1 if rows were refused."""
    report, refusals = run(_import(Settings.load(), named_source(source), restaurant, query, again, as_json))
    if refused is not None:
        refused.writelines(encode(row) + b"\n" for row in refusals)
    if as_json:
        click.echo(encode({**_plain(report), "refusals": refusals}).decode())
    else:
        for row in refusals[:_MAX_LISTED]:
            click.echo(f"line {row.line}: {row.reason}")
        if len(refusals) > _MAX_LISTED:
            click.echo(f"… and {len(refusals) - _MAX_LISTED} more; --refused FILE writes all of them")
        click.echo(
            f"{report.created} created, {report.updated} updated, {report.unchanged} unchanged,"
            f" {report.refused} refused, {report.skipped} imported by an earlier run"
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
            report, refusals = await Importer(session.postgres, upserts).run(
                source, restaurant, again=again, progress=lambda report: bar.update(task, completed=report.read)
            )
            bar.update(task, total=report.read, completed=report.read)
    return report, refusals


COMMANDS = (import_command,)
