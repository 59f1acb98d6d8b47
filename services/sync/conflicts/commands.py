"""`ticketrail conflicts`: changes of which only one can stand, on the command line, by the same functions as the API.

Exit codes: 0 done; 1 it could not be done; 2 wrong usage.
"""

import json
from typing import Any
from uuid import UUID

import click
import msgspec
from rich.table import Table

from services.sync.conflicts import store as conflict_store
from services.sync.conflicts.decisions import ConflictDecisions, ShownFork, show
from services.sync.conflicts.store import Side
from services.sync.operator_session import ROLE, actor, ago, ask, console, json_option, print_json, with_rail
from services.sync.printable import printable


@click.group("conflicts")
def conflicts_command() -> None:
    """Changes of which only one can stand: look at both, and decide."""


@conflicts_command.command("list")
@click.option("--restaurant", type=click.UUID)
@click.option("--entity", help="such as order")
@click.option("--all", "everything", is_flag=True, help="those that were decided too")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True)
@json_option
def list_command(restaurant: UUID | None, entity: str | None, everything: bool, limit: int, as_json: bool) -> None:
    """List conflicts, the newest first."""
    found = ask(
        lambda connection: conflict_store.page(
            connection,
            restaurant_id=str(restaurant) if restaurant else None,
            entity=entity,
            is_open=None if everything else True,
            limit=limit,
        )
    )
    if as_json:
        print_json(found)
        return
    table = Table("id", "opened", "about", "entity id", "restaurant", "decided", box=None, header_style="bold")
    for one in found:
        decided = f"{one.resolved_by}: {one.why}" if one.resolved_at else ""
        cells = (one.id, ago(one.opened_at), f"{one.entity} v{one.version}", one.entity_id, one.restaurant_id, decided)
        table.add_row(*map(printable, cells))
    console().print(table)
    click.echo(
        f"{len(found)} conflict{'' if len(found) == 1 else 's'}"
        + (" (there may be more: --limit)" if len(found) == limit else "")
    )


@conflicts_command.command("show")
@click.argument("conflict", type=click.UUID)
@json_option
def show_command(conflict: UUID, as_json: bool) -> None:
    """Show both sides, and what differs between them."""
    seen: ShownFork = ask(lambda connection: show(connection, str(conflict)))
    if as_json:
        print_json(seen)
        return
    about = seen.conflict
    click.echo(f"{about.entity} {about.entity_id} of restaurant {about.restaurant_id}, opened {about.opened_at:%F %T}")
    if about.resolved_at:
        click.echo(printable(f"decided {about.resolved_at:%F %T} by {about.resolved_by}: {about.why}"))
    for name, side in (("winner", seen.winner), ("loser", seen.loser)):
        click.echo(printable(f"{name + ':':8}{_headline(side)}"))
    if seen.head is not None:
        click.echo(f"stands: {seen.head.change_id}  version {seen.head.version}")
    table = Table("differs", "winner", "loser", box=None, header_style="bold")
    for one in msgspec.to_builtins(seen.differs):
        table.add_row(*map(printable, (one["path"], _value(one, "winner"), _value(one, "loser"))))
    console().print(table)


def _headline(side: Side) -> str:
    who = f" by {side.actor}" if side.actor else ""
    return (
        f"{side.change_id}  {side.type}  version {side.version}  from {side.source}{who}"
        f"  accepted {side.accepted_at:%F %T.%f}  trace {side.trace_id or 'unknown'}"
    )


def _value(differs: dict[str, Any], side: str) -> str:
    return json.dumps(differs[side], ensure_ascii=False) if side in differs else ""


@conflicts_command.command("resolve")
@click.argument("conflict", type=click.UUID)
@click.option("--keep", type=click.UUID, required=True, help="the change that holds: one of the two")
@click.option("--why", required=True, help="kept in the audit")
@json_option
def resolve_command(conflict: UUID, keep: UUID, why: str, as_json: bool) -> None:
    """Decide which of the two changes holds. What was changed since then stays; payments of both sides count."""
    done = with_rail(
        lambda *parts: ConflictDecisions(*parts).resolve(
            str(conflict), keep=str(keep), why=why, actor=actor(), role=ROLE
        )
    )
    brought = f", by change {done.resolved_change_id}" if done.resolved_change_id else ""
    print_json(done) if as_json else click.echo(f"resolved: {done.kept_change_id} holds{brought}")


COMMANDS = (conflicts_command,)
