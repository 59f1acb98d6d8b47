"""`ticketrail conflicts`: lists, shows and decides conflicts, by the same functions as the API.

Exit codes: 0 success, 1 failure, 2 wrong usage.
"""

import json
from typing import Any

import click
import msgspec

from services.sync.command_options import WholeNumber
from services.sync.command_output import TableColumn, ago, json_option, print_json, print_table
from services.sync.conflicts import store as conflict_store
from services.sync.conflicts.decisions import ConflictDecisions, ShownFork, show
from services.sync.conflicts.store import Fork, Side
from services.sync.id_argument import RESTAURANT, IdArgument, only_candidate, restaurant_slugs, whole_id
from services.sync.operator_session import ROLE, actor, ask, with_rail
from services.sync.printable import printable
from shared.postgres.pool import Connection

_CONFLICT = IdArgument("conflict", conflict_store.ids_between)
_COLUMNS = (
    TableColumn("id", "id"),
    TableColumn("opened", optional=2),
    TableColumn("about", optional=1),
    TableColumn("entity id", "id"),
    TableColumn("restaurant", "text", optional=3),
    TableColumn("decided", "text", optional=4),
)


@click.group("conflicts")
def conflicts_command() -> None:
    """List, show and decide conflicts. A conflict is two changes of one entity, of which you keep one."""


@conflicts_command.command("list")
@click.option("--restaurant", type=RESTAURANT, help="id, prefix of an id, or slug")
@click.option("--entity", help="the entity, such as order")
@click.option("--all", "everything", is_flag=True, help="include decided conflicts")
@click.option("--limit", type=WholeNumber(1, 10_000), default=50, show_default=True)
@json_option
def list_command(restaurant: str | None, entity: str | None, everything: bool, limit: int, as_json: bool) -> None:
    """List conflicts, newest first."""

    async def look(connection: Connection) -> tuple[list[Fork], dict[str, str]]:
        found = await conflict_store.page(
            connection, restaurant_id=restaurant, entity=entity, is_open=None if everything else True, limit=limit
        )
        return found, await restaurant_slugs(connection, [conflict.restaurant_id for conflict in found])

    found, slugs = ask(look)
    if as_json:
        print_json(found)
        return
    rows = []
    for conflict in found:
        decided = f"{conflict.resolved_by}: {conflict.why}" if conflict.resolved_at else ""
        about, slug = f"{conflict.entity} v{conflict.version}", slugs.get(conflict.restaurant_id, "")
        rows.append((conflict.id, ago(conflict.opened_at), about, conflict.entity_id, slug, decided))
    print_table(_COLUMNS, rows)
    click.echo(
        f"{len(found)} conflict{'' if len(found) == 1 else 's'}"
        + (" (there may be more: --limit)" if len(found) == limit else "")
    )


@conflicts_command.command("show")
@click.argument("conflict", type=_CONFLICT)
@json_option
def show_command(conflict: str, as_json: bool) -> None:
    """Show both sides of a conflict and how they differ."""
    seen: ShownFork = ask(lambda connection: show(connection, conflict))
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
        click.echo(f"head:   {seen.head.change_id}  version {seen.head.version}")
    # Print lines instead of a table, because a narrow terminal would cut the ids in the values.
    for leaf in msgspec.to_builtins(seen.differs):
        click.echo(printable(f"differs: {leaf['path']}"))
        for side_name in ("winner", "loser"):
            click.echo(printable(f"  {side_name + ':':8}{_value(leaf, side_name)}"))


def _headline(side: Side) -> str:
    actor_part = f" by {side.actor}" if side.actor else ""
    return (
        f"{side.change_id}  {side.type}  version {side.version}  from {side.source}{actor_part}"
        f"  accepted {side.accepted_at:%F %T.%f}  trace {side.trace_id or 'unknown'}"
    )


def _value(leaf: dict[str, Any], side: str) -> str:
    return json.dumps(leaf[side], ensure_ascii=False) if side in leaf else "absent"


@conflicts_command.command("resolve")
@click.argument("conflict", type=_CONFLICT)
@click.option("--keep", required=True, help="the change to keep: the id of one of the two, or its beginning")
@click.option("--why", required=True, help="the reason; it is kept in the audit")
@json_option
def resolve_command(conflict: str, keep: str, why: str, as_json: bool) -> None:
    """Decide which of the two changes to keep. Later changes stay, and payments of both sides count."""
    if whole_id(keep) is None:
        fork = ask(lambda connection: conflict_store.one(connection, conflict))
        sides = ((fork.change_id, ""), (fork.other_change_id, ""))
        keep = only_candidate(
            keep, "side of the conflict", [side for side in sides if side[0].startswith(keep.lower())]
        )
    done = with_rail(
        lambda *parts: ConflictDecisions(*parts).resolve(conflict, keep=keep, why=why, actor=actor(), role=ROLE)
    )
    committed = f", enforced by change {done.resolved_change_id}" if done.resolved_change_id else ""
    print_json(done) if as_json else click.echo(f"resolved: change {done.kept_change_id} is kept{committed}")


COMMANDS = (conflicts_command,)
