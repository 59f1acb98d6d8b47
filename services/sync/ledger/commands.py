"""`ticketrail ledger`: shows the place of every accepted change, and the changes that are in no place."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from services.sync.command_backends import backends_away
from services.sync.command_options import Number, Since
from services.sync.command_output import console
from services.sync.command_session import run
from services.sync.ledger.report import Ledger, take_report
from services.sync.ledger.report_shapes import LeaderState, LedgerReport, OpenChange
from shared.entities.contract import encode
from shared.errors import Unavailable
from shared.mirror.mirror import Mirror
from shared.postgres.pool import Postgres
from shared.rail.assemble import mirror_of
from shared.settings import Settings

_COLUMNS = ("accepted", "synced", "queued", "retrying", "journaled", "dead", "unexplained")
_MAX_LISTED = 50
_EXIT_UNAVAILABLE = 2
_NEEDED = {"postgres", "rabbitmq"}
"""The backends without which there is no report. Without the mirror it only lacks hints."""


@click.command("ledger")
@click.option(
    "--since",
    type=Since(),
    default="1h",
    show_default=True,
    help="begin at the newest checkpoint before: 90s, 15m, 2h, 7d, or a time in ISO 8601",
)
@click.option("--all", "everything", is_flag=True, help="begin at the first entry of the change log")
@click.option("--watch", is_flag=True, help="repeat until Ctrl-C")
@click.option(
    "--interval",
    type=Number(0.2, 3_600),
    default=2.0,
    show_default=True,
    help="seconds between two reports, for --watch",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object; with --watch one per line")
@click.option(
    "--timeout", type=Number(0, 31_536_000), help="seconds after which a change that left its lane is unexplained"
)
def ledger_command(
    since: datetime, everything: bool, watch: bool, interval: float, as_json: bool, timeout: float | None
) -> None:
    """Show the place of every accepted change: accepted = synced + queued + retrying + journaled + dead + unexplained.

    The exit code is 1 if a change is unexplained, and 2 if the report cannot be taken."""
    start = None if everything else since
    try:
        if watch:
            report = _watch(start, interval, as_json, timeout)
        else:
            report = run(_once(start, timeout), quiet=True)
            _show(report, as_json)
    except click.ClickException as error:
        for line in error.message.splitlines():
            click.echo(f"Error: {line}", err=True)
        sys.exit(_EXIT_UNAVAILABLE)
    if report is not None and "unexplained" in report.alarms:
        sys.exit(1)


@asynccontextmanager
async def _backends() -> AsyncIterator[tuple[Settings, Postgres, Mirror]]:
    settings = Settings.load()
    postgres = Postgres(settings.database_ops_url, settings, size=2)
    mirror = mirror_of(settings)
    try:
        yield settings, postgres, mirror
    finally:
        await mirror.close()
        await postgres.close()


async def _once(since: datetime | None, timeout: float | None) -> LedgerReport:
    async with _backends() as (settings, postgres, mirror):
        # A report waits 20 s for a log that it cannot read, and names only the first backend that it misses.
        away = await backends_away(settings)
        if away.keys() & _NEEDED:
            raise Unavailable("\n".join(away.values()))
        return await take_report(settings, postgres, mirror, since=since, timeout_seconds=timeout)


def _watch(since: datetime | None, interval: float, as_json: bool, timeout: float | None) -> LedgerReport | None:
    """Takes reports until Ctrl-C. Returns the last one."""
    last: list[LedgerReport] = []

    async def watch() -> None:
        async with (
            _backends() as (settings, postgres, mirror),
            Ledger(settings, postgres, mirror, since=since, timeout_seconds=timeout) as ledger,
        ):
            with _Lines() if as_json else Live(console=console(), auto_refresh=False) as screen:
                while True:
                    try:
                        report = await ledger.report()
                    except Unavailable as error:
                        screen.update(Text(f"{error}; waiting", "bold yellow"), refresh=True)
                    else:
                        last[:] = [report]
                        screen.update(encode(report).decode() if as_json else _drawn(report), refresh=True)
                    await asyncio.sleep(interval)

    with suppress(KeyboardInterrupt):
        run(watch(), quiet=True)
    return last[0] if last else None


class _Lines:
    """A screen that prints each update as a line."""

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def update(self, line: Any, *, refresh: bool) -> None:
        click.echo(str(line), err=isinstance(line, Text))


def _show(report: LedgerReport, as_json: bool) -> None:
    if as_json:
        click.echo(encode(report).decode())
        return
    drawn = _drawn(report)
    # A table that does not fit becomes wider than the terminal, because a cut id or figure is useless.
    console(min_columns=console().measure(drawn.renderables[0]).maximum).print(drawn)


def _drawn(report: LedgerReport) -> Group:
    table = Table(box=None, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    figures = [Text(str(getattr(report, name))) for name in _COLUMNS]
    if report.unexplained:
        figures[-1].stylize("bold red")
    table.add_row(*figures)
    begin = "the first entry of the log" if report.since is None else f"the checkpoint of {_utc(report.since)}"
    lines = [Text(f"from {begin}; {_leader(report.leader)}")]
    for place in ("unexplained", "only_in_postgres", "queued", "retrying", "journaled"):
        lines += _named(place, [one for one in report.open if one.place == place], report)
    if report.dead_outcomes:
        lines.append(Text("dead: " + ", ".join(f"{n} {what}" for what, n in sorted(report.dead_outcomes.items()))))
    lines += [Text(f"{count} in {name}") for name, count in report.journals.items() if count]
    if report.unreadable:
        lines.append(
            Text(f"{report.unreadable} events in the log have no valid change id; they are among the dead letters")
        )
    lines += [
        Text(f"hint: only the mirror shows change {one.change_id} of {one.subject}, as pending", "yellow")
        for one in report.mirror_only[:_MAX_LISTED]
    ]
    lines += [
        Text(f"expired before it was compared: the log between the offsets {one.after} and {one.before}", "yellow")
        for one in report.expired
    ]
    if "age" in report.alarms:
        lines.append(Text("no worker compares: the newest checkpoint is older than five minutes", "bold red"))
    if report.leader is not None and report.leader.unexplained:
        lines.append(Text(f"{report.leader.unexplained} changes were sent again ten times in vain", "bold red"))
    lines += [Text(f"unavailable: {name}", "yellow") for name in report.unavailable]
    if report.restarted:
        lines.append(Text("the log or PostgreSQL lost its end during the report, which then began again", "yellow"))
    return Group(table, *lines)


def _leader(leader: LeaderState | None) -> str:
    if leader is None:
        return "no worker has written a checkpoint yet"
    return (
        f"the worker has compared the log up to offset {leader.log_low}, {leader.age_seconds:.0f} s ago;"
        f" sent again {leader.resent}, published again {leader.republished}"
    )


def _named(place: str, found: list[OpenChange], report: LedgerReport) -> list[Text]:
    style = "bold red" if place == "unexplained" else "yellow" if place == "only_in_postgres" else ""
    lines = [Text(f"{place.replace('_', ' ')}: {_line(one)}", style) for one in found[:_MAX_LISTED]]
    if (left := getattr(report, place) - len(lines)) > 0:
        lines.append(Text(f"… and {left} more {place.replace('_', ' ')}; --json lists more", style))
    return lines


def _line(one: OpenChange) -> str:
    at = f" accepted {_utc(one.accepted_at)}" if one.accepted_at else ""
    where = "" if one.seen_in in ("log", "postgres") else f", from {one.seen_in}"
    return (
        f"change {one.change_id} of {one.subject} version {one.version}, {one.lane or '-'},{at}{where},"
        f" trace {one.trace_id or '-'}"
    )


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


COMMANDS = (ledger_command,)
