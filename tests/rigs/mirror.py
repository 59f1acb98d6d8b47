"""Helpers for tests of the mirror's connection and scripts: a state to apply, and the head that the mirror has."""

from typing import Any
from uuid import UUID

from shared.entities.contract import Head, encode, now
from shared.entities.order import ENTITY as ORDER
from shared.mirror.connection import MirrorConnection, MirrorInDoubt, MirrorUnavailable
from shared.mirror.mirror import Apply, Mirror
from tests.rigs import builders


async def answers(link: MirrorConnection | Mirror) -> bool:
    try:
        await link.check()
    except (MirrorUnavailable, MirrorInDoubt):
        return False
    return True


def state(version: int, change: int = 1, *, id_: str, restaurant: str, how: str = "reveal", **fields: Any) -> Apply:
    """One state of an order; its notes name the version and the change."""
    notes = f"{version}/{change}"
    order = builders.order(items=0, id=id_, restaurant_id=restaurant, notes=notes, **fields)
    return Apply(ORDER, order, Head(version, str(UUID(int=change))), encode(order), now(), how)


async def head_of(mirror: Mirror, restaurant: str, id_: str) -> Head | None:
    _, (document,) = await mirror.read(restaurant, "order", [id_])
    return document.head if document else None
