"""`ticketrail dlq edit`: replaces a dead letter by an event of the operator.

If the body of the dead letter is an event, the operator edits this event. If it is not, nothing says what the message
was about: the command asks for restaurant, type and entity, begins with an event of the fields that this type needs,
shows what the edit will do, and asks before it does it.
"""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import click

from services.sync.command_output import json_option, print_json
from services.sync.dead_letters.command_filters import DEAD_LETTER, current
from services.sync.dead_letters.editing import Effect, event_in, event_types, new_event
from services.sync.dead_letters.repairs import DeadLetterRepairs
from services.sync.dead_letters.store import FullDeadLetter
from services.sync.dead_letters.view import shown_body
from services.sync.difference import difference
from services.sync.id_argument import RESTAURANT
from services.sync.operator_session import ROLE, actor, with_rail
from services.sync.printable import printable

_MAX_SHOWN_BYTES = 2_000


@click.command("edit")
@click.argument("dead_letter", type=DEAD_LETTER)
@click.option(
    "--event",
    type=click.Path(exists=True, dir_okay=False),
    help="a JSON file with the event; by default $EDITOR opens the event",
)
@click.option("--restaurant", type=RESTAURANT, help="for a body that is not an event: id, prefix of an id, or slug")
@click.option("--type", "type_", help="for a body that is not an event, such as ticketrail.table.updated.v1")
@click.option("--yes", is_flag=True, help="do not ask for confirmation")
@click.option("--why", help="the reason; it is kept in the audit")
@json_option
def edit_command(
    dead_letter: str,
    event: str | None,
    restaurant: str | None,
    type_: str | None,
    yes: bool,
    why: str | None,
    as_json: bool,
) -> None:
    """Repair a dead letter. The event that you give becomes a new change at head version + 1.

    If the body is an event, its restaurant and subject cannot be edited. If it is not, the command asks for them and
    for the type, and shows what it will do before it asks for confirmation."""
    seen = current(dead_letter)
    original = event_in(seen.body)
    given = None if event is None else _object(Path(event).read_bytes())
    if original is None:
        _show_body(seen, err=as_json)
        edited = _named(seen, given, restaurant, type_, err=as_json)
        if given is None:
            edited = _edited(edited)
        effect = with_rail(lambda *parts: DeadLetterRepairs(*parts).effect(dead_letter, edited))
        click.echo(printable(_sentence(effect)), err=as_json)
        if not yes:
            click.confirm("Commit this change?", abort=True, err=as_json)
    else:
        edited = _edited(original) if given is None else given
        if not as_json:
            for leaf in difference(original, edited):
                click.echo(printable(f"{leaf['path']}: {leaf.get('before')} → {leaf.get('after')}"))
    done = with_rail(
        lambda *parts: DeadLetterRepairs(*parts).edit(
            dead_letter, edited, revision=seen.revision, why=why, actor=actor(), role=ROLE
        )
    )
    print_json(done) if as_json else click.echo(f"resolved by change {done.replaced_by}")


def _edited(event: dict[str, Any]) -> dict[str, Any]:
    """Opens the event in $EDITOR and returns what the operator has saved."""
    text = click.edit(json.dumps(event, indent=2, ensure_ascii=False), extension=".json")
    if text is None:
        raise click.ClickException("you changed nothing")
    return _object(text)


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise click.ClickException(f"the event is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.ClickException("the event must be a JSON object")
    return found


def _show_body(seen: FullDeadLetter, *, err: bool) -> None:
    _, text, cut = shown_body(seen.body, _MAX_SHOWN_BYTES)
    click.echo(f"The body of {len(seen.body)} bytes is not an event{', and begins with' if cut else ''}:", err=err)
    click.echo("\n".join(printable(f"  {line}") for line in (text or "").splitlines()), err=err)


def _named(
    seen: FullDeadLetter, given: dict[str, Any] | None, restaurant: str | None, type_: str | None, *, err: bool
) -> dict[str, Any]:
    """Returns the event with restaurant, type and subject. Asks for those that neither the event nor the options name.
    Without an event, returns one with the fields that its type needs."""
    event = dict(given or {})
    if restaurant is not None or "restaurantid" not in event:
        event["restaurantid"] = restaurant or click.prompt(
            "Restaurant (id, prefix of an id, or slug)", type=RESTAURANT, default=seen.restaurant_id, err=err
        )
    known = click.Choice(event_types())
    if type_ is not None or "type" in event:
        event["type"] = known.convert(type_ or event["type"], None, None)
    else:
        event["type"] = click.prompt(
            "Type, such as ticketrail.table.updated.v1", type=known, default=seen.type, show_choices=False, err=err
        )
    if "subject" not in event:
        entity = str(event["type"]).split(".")[1]
        id_ = click.prompt(
            f"Id of the {entity} (a new one by default)",
            type=click.UUID,
            default=seen.entity_id or str(uuid4()),
            err=err,
        )
        event["subject"] = f"{entity}/{id_}"
    return event if given is not None else new_event(event["restaurantid"], event["type"], event["subject"])


def _sentence(effect: Effect) -> str:
    what = f"{effect.subject} of restaurant {effect.restaurant_id}"
    if effect.head is None:
        return f"This creates {what} by {effect.type}, at version 1."
    return f"This changes {what} by {effect.type}, from version {effect.head} to {effect.head + 1}."
