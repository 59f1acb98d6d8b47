"""Drafts, and changes as states for the mirror."""

from typing import Any

from shared.entities import registry
from shared.entities.contract import Change, Head, decode_change, encode, split_batch
from shared.entities.entity import Entity
from shared.mirror.mirror import Apply
from shared.rail.draft import Draft
from shared.rail.head import Standing

State = tuple[Head, Any]
"""A state of an entity with its head, such as the base of a new change."""


def draft(entity: Entity, state: Any, base: State | None = None) -> Draft:
    """A creation, or an update of `base`. The time of the change is `state.updated_at`."""
    standing = Standing(*base, encode(base[1])) if base else None
    event = "updated" if base else "created"
    return Draft(entity=entity, event=event, state=state, base=standing, at=state.updated_at, source="orders")


def applied(change: Change, how: str = "reveal") -> Apply:
    entity, state = registry.read(change)
    return Apply(entity, state, change.head, bytes(change.data.after), change.time, how)


def changes_in(*messages: bytes) -> list[Change]:
    return [decode_change(event) for message in messages for event in split_batch(message)]
