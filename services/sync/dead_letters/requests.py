"""Bodies and queries of the routes in routes.py. Unknown fields are refused."""

from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from msgspec import Meta, Struct

from services.sync.dead_letters.store import DeadLetterQuery
from services.sync.request_fields import Name, Why
from shared.entities.contract import Time, in_range
from shared.errors import InvalidInput

_MAX_IDS = 1_000


class DeadLetterStatus(StrEnum):
    OPEN = "open"
    REPLAYING = "replaying"
    RESOLVED = "resolved"
    DISCARDED = "discarded"


class DeadLetterFilter(Struct, forbid_unknown_fields=True, kw_only=True, rename={"from_": "from"}):
    queue: Name | None = None
    fingerprint: Name | None = None
    reason: Name | None = None
    entity: Name | None = None
    entity_id: UUID | None = None
    change_id: UUID | None = None
    restaurant_id: UUID | None = None
    from_: Annotated[Time, Meta(description="the earliest time of the last failure")] | None = None
    to: Time | None = None
    status: DeadLetterStatus | None = None
    text: Annotated[Name, Meta(min_length=1, description="a text in the error, place or body")] | None = None

    def query(self, ids: tuple[str, ...] = ()) -> DeadLetterQuery:
        """Returns the filter in the form of the store. Raises InvalidInput."""
        for name, at in (("from", self.from_), ("to", self.to)):
            if at is not None and not in_range(at):
                raise InvalidInput("must be a time between 1970 and 2200", field=name)
        return DeadLetterQuery(
            ids=ids,
            queue=self.queue,
            fingerprint=self.fingerprint,
            reason=self.reason,
            entity=self.entity,
            entity_id=str(self.entity_id) if self.entity_id else None,
            change_id=str(self.change_id) if self.change_id else None,
            restaurant_id=str(self.restaurant_id) if self.restaurant_id else None,
            failed_from=self.from_,
            failed_to=self.to,
            statuses=self._statuses(),
            text=self.text,
        )

    def _statuses(self) -> tuple[str, ...]:
        return (self.status.value,) if self.status else ()


class DeadLetterGroupsQuery(DeadLetterFilter, kw_only=True, rename={"from_": "from"}):
    status: list[DeadLetterStatus] | None = None  # type: ignore[assignment]

    def _statuses(self) -> tuple[str, ...]:
        return tuple(status.value for status in self.status or ())


class DeadLettersQuery(DeadLetterGroupsQuery, kw_only=True, rename={"from_": "from"}):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200, description="next_cursor of the previous page")] | None = None


class ReplayRequest(DeadLetterFilter, kw_only=True, rename={"from_": "from"}):
    """A replay of the open dead letters that `ids` or the filter select. A `dry_run` writes nothing."""

    ids: Annotated[list[UUID], Meta(max_length=_MAX_IDS)] = []
    dry_run: bool = False
    canary: Annotated[
        bool, Meta(description="send one dead letter, then ten, then the rest; stop if one of them fails again")
    ] = True
    per_second: Annotated[float, Meta(gt=0, le=10_000)] = 50.0
    why: Why | None = None


class DiscardRequest(DeadLetterFilter, kw_only=True, rename={"from_": "from"}):
    """A discard of the open dead letters that `ids` or the filter select."""

    ids: Annotated[list[UUID], Meta(max_length=_MAX_IDS)] = []
    per_second: Annotated[float, Meta(gt=0, le=10_000)] = 50.0
    why: Why


class UndoJob(Struct, forbid_unknown_fields=True, kw_only=True):
    why: Why | None = None


class EditDeadLetter(Struct, forbid_unknown_fields=True, kw_only=True):
    """The repair of a dead letter. `event` has a `type`, the `restaurantid` and `subject` of the dead letter, and the
    whole state in `data.after`."""

    revision: Annotated[int, Meta(ge=1, description="the revision of the dead letter when you read it")]
    event: dict[str, Any]
    why: Why | None = None


class DiscardDeadLetter(Struct, forbid_unknown_fields=True, kw_only=True):
    revision: Annotated[int, Meta(ge=1)]
    why: Why


class RestoreDeadLetter(Struct, forbid_unknown_fields=True, kw_only=True):
    revision: Annotated[int, Meta(ge=1)]
    why: Why | None = None


class ReplayJobsQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Annotated[str, Meta(max_length=200)] | None = None


class ReplayItemsQuery(Struct, forbid_unknown_fields=True, kw_only=True):
    outcome: Name | None = None
    after: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 200
