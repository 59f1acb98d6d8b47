"""`ticketrail import`: imports the orders of another system."""

import asyncio
import re
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from services.sync.command_output import TableColumn, print_table
from services.sync.command_session import CommandSession, refusal, run
from services.sync.id_argument import RESTAURANT
from services.sync.imports.cells import SIGNS, Decimal
from services.sync.imports.csv_files import SEPARATORS
from services.sync.imports.external_order_upserts import ExternalOrderUpserts
from services.sync.imports.importer import Importer, ImportReport, RefusedRow
from services.sync.imports.sources import ImportSource, SourceOptions, check_source, named_source, source_of
from services.sync.imports.text_files import ENCODINGS
from services.sync.printable import printable
from shared.entities.contract import encode
from shared.errors import TicketrailError
from shared.settings import Settings

_MAX_LISTED = 50
_MAX_LINES = 5
_FORECAST = (
    TableColumn("would be"),
    TableColumn("rows", right=True),
    TableColumn("lines"),
    TableColumn("for example", "text"),
)
_VARIABLE = re.compile(r"'[^']*'|[0-9][0-9,]*")
"""The parts in which two reasons of one kind differ."""


class SeparatorOption(click.ParamType[str]):
    """The separator of columns: comma, semicolon, tab, or the character itself."""

    name = "separator"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        found = SEPARATORS.get(str(value), str(value))
        if len(found) != 1 or found.isalnum() or found in '_"\r\n':
            self.fail("must be comma, semicolon, tab, or one character that is no letter or digit", param, ctx)
        return found


@click.command("import")
@click.argument("source")
@click.option(
    "--restaurant", type=RESTAURANT, help="the restaurant of rows without restaurant_id: id, prefix of an id, or slug"
)
@click.option("--query", help="SQL for a postgres:// source; one column per field, items as JSON")
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS, case_sensitive=False),
    help="the encoding of the file; default: UTF-8, or UTF-16 if it has a byte order mark",
)
@click.option("--separator", type=SeparatorOption(), help="between columns: comma, semicolon, tab or the character")
@click.option(
    "--decimal",
    type=click.Choice(tuple(SIGNS)),
    help="amounts in the columns of a CSV file are in major units, such as 12.50 or 12,50; default: minor units",
)
@click.option("--dry-run", is_flag=True, help="report the outcome of each row without changing anything")
@click.option("--refused", type=click.File("wb", lazy=False), help="file for refused rows, one JSON object per line")
@click.option("--again", is_flag=True, help="start from the first row, even if an earlier run imported it")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, for scripts")
def import_command(
    source: str,
    restaurant: str | None,
    query: str | None,
    encoding: str | None,
    separator: str | None,
    decimal: Decimal | None,
    dry_run: bool,
    refused: Any,
    again: bool,
    as_json: bool,
) -> None:
    """Import existing orders from FILE.jsonl, FILE.csv, or a PostgreSQL database. Files may be packed (FILE.csv.gz).

    Every user of a machine can read the arguments of a command. So put a URL postgres://… with a password into a file
    or an environment variable, and pass @FILE or env:NAME.

    The import uses the background lane, so that it does not delay new orders. An interrupted import continues where it
    stopped. The exit code is 1 if rows were refused. docs/import.md describes the columns."""
    options = SourceOptions(encoding.lower() if encoding else None, separator, decimal)
    try:
        found = source_of(named_source(source), query, options)
    except TicketrailError as error:
        raise refusal(error) from error
    work = _import(Settings.load(), found, restaurant, again=again, dry_run=dry_run, quiet=as_json)
    report, refusals = run(work)
    if refused is not None:
        refused.writelines(encode(row) + b"\n" for row in refusals)
    if as_json:
        click.echo(encode({"dry_run": dry_run, **_plain(report), "refusals": refusals}).decode())
    elif dry_run:
        print_table(_FORECAST, forecast_rows(report, refusals))
    else:
        for row in refusals[:_MAX_LISTED]:
            click.echo(printable(f"line {row.line}: {row.reason}"))
        if len(refusals) > _MAX_LISTED:
            click.echo(f"… and {len(refusals) - _MAX_LISTED} more; --refused FILE writes all of them")
        click.echo(
            f"{report.created} created, {report.updated} updated, {report.unchanged} unchanged,"
            f" {report.refused} refused, {report.skipped} imported by an earlier run"
        )
    if report.refused:
        sys.exit(1)


def forecast_rows(report: ImportReport, refusals: Sequence[RefusedRow]) -> list[tuple[str, str, str, str]]:
    """Returns the rows of the table of a dry run: one for each outcome, and one for each kind of reason."""
    by_kind: dict[str, list[RefusedRow]] = {}
    for row in refusals:
        by_kind.setdefault(_VARIABLE.sub("…", row.reason), []).append(row)
    table = [
        ("new", str(report.created), "", ""),
        ("changed", str(report.updated), "", ""),
        ("same", str(report.unchanged), "", ""),
        ("refused", str(report.refused), "", ""),
    ]
    for rows in sorted(by_kind.values(), key=len, reverse=True):
        lines = ", ".join(str(row.line) for row in rows[:_MAX_LINES]) + (", …" if len(rows) > _MAX_LINES else "")
        table.append(("  because", str(len(rows)), lines, rows[0].reason))
    return table


def _plain(report: ImportReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


async def _import(
    settings: Settings, source: ImportSource, restaurant: str | None, *, again: bool, dry_run: bool, quiet: bool
) -> tuple[ImportReport, list[RefusedRow]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, disable=quiet or not screen.is_terminal) as bar:
        task = bar.add_task(f"checking {source.shown}", total=None)
        found = await asyncio.to_thread(check_source, source, restaurant)
        bar.update(task, description=source.shown, total=found.rows)

        def progress(report: ImportReport) -> None:
            bar.update(task, completed=report.read)

        async with CommandSession(settings) as session:
            upserts = ExternalOrderUpserts(
                session.postgres, session.mirror, session.rail, source="import", window_days=settings.mirror_window_days
            )
            importer = Importer(session.postgres, upserts)
            if dry_run:
                report, refusals = await importer.forecast(found, progress=progress)
            else:
                report, refusals = await importer.run(found, again=again, progress=progress)
        bar.update(task, total=report.read, completed=report.read)
    return report, refusals


COMMANDS = (import_command,)
