"""All entities, one line each."""

from typing import Any

from shared.entities import bay, brand, category, customer, inventory_item, job, menu_item, order, table
from shared.entities.contract import BrokenContract, Change
from shared.entities.entity import Entity, event_of, type_version

ENTITIES: dict[str, Entity] = {
    entity.name: entity
    for entity in (
        order.ENTITY,
        menu_item.ENTITY,
        table.ENTITY,
        category.ENTITY,
        brand.ENTITY,
        bay.ENTITY,
        job.ENTITY,
        customer.ENTITY,
        inventory_item.ENTITY,
    )
}


def read(change: Change) -> tuple[Entity, Any]:
    """Returns the entity of a change, and its validated state after the change, converted to the newest major version
    that this release reads. Raises BrokenContract: `unsupported_version` for a newer one."""
    name, event, _ = event_of(change.type)
    entity = ENTITIES.get(name)
    if entity is None or name != change.entity:
        raise BrokenContract("unknown_type", f"type {change.type!r} with subject {change.subject!r}")
    if type_version(change.type) > entity.reads:
        raise BrokenContract("unsupported_version", f"type {change.type!r} is newer than this service")
    if event not in entity.events:
        raise BrokenContract("unknown_type", f"{name} has no event {event!r}")
    return entity, entity.decode(change)
