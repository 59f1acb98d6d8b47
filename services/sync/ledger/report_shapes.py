"""The figures of a report of the ledger."""

from datetime import datetime

from msgspec import Struct

from services.sync.ledger.session import ExpiredRange

PLACES = ("synced", "dead", "retrying", "journaled", "queued", "unexplained")
"""A change counts in the first of these places in which it is found."""


class OpenChange(Struct, frozen=True, kw_only=True):
    """A change that is not in every store."""

    place: str
    """`queued`, `retrying`, `journaled`, `dead`, `unexplained`, `only_in_postgres` or `mirror`."""
    change_id: str
    restaurant_id: str
    subject: str
    version: int
    lane: str = ""
    accepted_at: datetime | None = None
    trace_id: str | None = None
    seen_in: str = "log"
    """`log`, `postgres`, `mirror` or the name of a journal."""


class LeaderState(Struct, frozen=True, kw_only=True):
    """The content of the newest checkpoint, which the leader wrote."""

    age_seconds: float
    log_low: int
    """An offset. Every log entry up to it is in `changes` or is a dead letter."""
    log_at: int
    """Offset of the last entry that was read."""
    open: dict[str, int]
    """Place -> number of changes that one side alone had."""
    resent: int
    republished: int
    unexplained: int
    """The number of changes that PostgreSQL still lacks after they were sent ten times."""


class LedgerReport(Struct, kw_only=True):
    since: datetime | None
    """The time of the checkpoint at which the report begins; None if it begins at the first entry of the log."""
    accepted: int = 0
    synced: int = 0
    queued: int = 0
    retrying: int = 0
    journaled: int = 0
    dead: int = 0
    unexplained: int = 0
    only_in_postgres: int = 0
    """The number of synced changes that the log lacks; the worker publishes them again."""
    open: list[OpenChange]
    """All unexplained changes, and up to 1,000 of each other place, in the order of the log."""
    dead_outcomes: dict[str, int]
    """Status of the dead letter (open, replaying, discarded or edited) -> number of dead changes."""
    mirror_only: list[OpenChange]
    """Changes that the mirror shows as pending for more than a minute and that no other source has. This is only a
    hint: either they were not accepted, or their journal is on another host."""
    unreadable: int
    """The number of events in the log without a valid change id. They are dead letters."""
    journals: dict[str, int]
    """Name of each journal on this host -> number of its entries."""
    expired: list[ExpiredRange]
    """Entries that the retention removed from the log before they were compared. The ledger cannot prove these."""
    leader: LeaderState | None
    """None before the first checkpoint."""
    alarms: list[str]
    """`unexplained`, and `age` if the newest checkpoint is older than five minutes."""
    unavailable: list[str]
    """The sources that were unavailable: management, rabbitmq, postgres, mirror, or the name of a journal."""
    restarted: bool
    """True if a side lost its end during the report, which then began again."""
