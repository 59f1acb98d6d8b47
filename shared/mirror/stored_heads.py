"""The input of the feed loop for the mirror: the states that PostgreSQL has, or the reason why it has none yet."""

from msgspec import Struct

from shared.entities.contract import Head


class StoredHead(Struct, frozen=True):
    """The head of an entity in PostgreSQL; None if PostgreSQL lacks the entity."""

    restaurant_id: str
    entity: str
    id: str
    head: Head | None


class FeedNote(Struct, frozen=True):
    """A feed position for the mirror (shared/postgres/feed.py)."""

    xid: int
    position: str
    again: bool = False
    """True if the feed begins again, so that the position may be smaller than that of the mirror."""


class FailedState(Struct, frozen=True):
    """A change that PostgreSQL did not take until now. `failure`: JSON, as in `Document`."""

    restaurant_id: str
    entity: str
    id: str
    change_id: str
    failure: bytes
