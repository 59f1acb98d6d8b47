"""The replies of the mirror to a claim; `ClaimReply` is one of them. `Stale` also answers `Mirror.mark`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from msgspec import Struct

from shared.entities.contract import Head, Lane
from shared.entities.entity import at_micros


class Claimed(Struct, frozen=True):
    """The change holds the claim now. `number` is the order number that the claim gave, or empty."""

    number: str


class Cold(Struct, frozen=True):
    """The mirror takes no claims, because the mirror writer has not filled it since it was lost."""


class Busy(Struct, frozen=True):
    """Another change of the entity holds a fresh claim."""


class Stale(Struct, frozen=True):
    """The entity has a stale claim, which is now marked: the caller must finish the change of that claim."""

    change_id: str
    event: bytes
    number: str
    lane: Lane
    """The lane that the owner of the claim has chosen."""


class HeadMoved(Struct, frozen=True):
    """The change was not built on the head. `state` is None if only PostgreSQL has the state of the head."""

    head: Head
    state: bytes | None


class Ask(Struct, frozen=True):
    """The mirror does not know all ids of the last weeks yet: the creation may be a repeat of one that only PostgreSQL
    has."""


class Restamp(Struct, frozen=True):
    """A hold is below the count of its item, or a count is not above all holds. `stamps`: inventory item -> the least
    time that the change may give."""

    stamps: dict[str, datetime]


class StockShort(Struct, frozen=True):
    """The stock is not enough for the change. `left`: (inventory item, amount left) of each item that is short."""

    left: tuple[tuple[str, int], ...]


ClaimReply = Claimed | Cold | Ask | Busy | Stale | HeadMoved | Restamp | StockShort


def claim_reply(reply: Sequence[Any]) -> ClaimReply:
    """Decodes a reply of scripts/claim.lua."""
    match reply[0]:
        case b"late" | b"cold":
            return Cold()
        case b"short":
            return StockShort(tuple((reply[i].decode(), int(reply[i + 1])) for i in range(1, len(reply), 2)))
        case b"restamp":
            return Restamp({reply[i].decode(): at_micros(int(reply[i + 1])) for i in range(1, len(reply), 2)})
        case b"claimed":
            return Claimed((reply[1] or b"").decode())
        case b"ask":
            return Ask()
        case b"busy":
            return Busy()
        case b"stale":
            return stale(reply[1:])
        case _:
            return HeadMoved(Head(int(reply[1]), reply[2].decode()), reply[3])


def stale(reply: Sequence[bytes]) -> Stale:
    """Decodes a stale claim as the scripts reply it."""
    change, event, number, lane = reply
    return Stale(change.decode(), event, number.decode(), Lane(lane.decode()))
