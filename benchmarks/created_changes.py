"""Builds changes that create entities, for benchmarks that store data without the API."""

from typing import Any

from msgspec import Raw

from shared.entities.change_id import change_id
from shared.entities.contract import Change, ChangeData, encode
from shared.entities.entity import Entity


def created(entity: Entity, state: Any, *, source: str = "orders", actor: str | None = None) -> Change:
    """Returns the change that creates an entity with `state`, as the services record it."""
    after = encode(state)
    return Change(
        id=change_id(state.id, 1, after),
        source=source,
        type=entity.type("created"),
        subject=f"{entity.name}/{state.id}",
        time=state.created_at,
        restaurantid=state.restaurant_id,
        priority=entity.lane.priority,
        entityversion=1,
        actor=actor,
        data=ChangeData(after=Raw(after)),
    )
