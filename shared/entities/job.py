"""A job: a piece of work in the queue of a bay, perhaps for an order."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Entity, Keyed, OnConflict, Table, columns


class JobStage(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    DONE = "done"
    CANCELLED = "cancelled"


_NEXT = {
    JobStage.QUEUED: (JobStage.IN_PROGRESS, JobStage.CANCELLED),
    JobStage.IN_PROGRESS: (JobStage.DONE, JobStage.QUEUED, JobStage.CANCELLED),
    JobStage.DONE: (),
    JobStage.CANCELLED: (),
}


def allowed_next(stage: JobStage) -> tuple[JobStage, ...]:
    """Returns the stages that may follow: queued → in_progress → done. A job in progress may return to the queue. A job
    in either of these two stages may be cancelled."""
    return _NEXT[stage]


# A sort key is a decimal fraction without trailing zeros. It consists of the digits of the scheduled time and the
# digits of the creation time, so that jobs with the same scheduled time sort by creation. Another key always fits
# between two keys. A number of fixed size would be exhausted after about twenty moves into the same gap.
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGITS = 16
_MAX_DIGITS = 400
_MIN_GAP = 10**6


def place_at(at: datetime, created: datetime) -> str:
    """Returns the key of a job that is scheduled at a time."""
    return _fraction(_micros(at), created)


def place_beside(place: str, seconds: int, created: datetime) -> str:
    """Returns a key `seconds` after `place` (before it if negative). Other keys still fit between the two."""
    return _fraction(int(place[:_DIGITS].ljust(_DIGITS, "0")) + seconds * 1_000_000, created)


def place_between(low: str, high: str, *, tie_breaker: str) -> str:
    """Returns a key between `low` and `high`. Returns `low` if no key fits between them, because they are equal or
    hundreds of moves have exhausted the gap. `tie_breaker`: a UUID, which gives different keys to jobs that are moved
    into one gap at the same time."""
    for digits in range(_DIGITS, _MAX_DIGITS + 1):
        first, last = (int(text[:digits].ljust(digits, "0")) for text in (low, high))
        if last - first >= _MIN_GAP:
            step = (last - first) // 4
            middle = first + step + 2 * step * int(tie_breaker[:8], 16) // 2**32
            return f"{middle:0{digits}d}".rstrip("0")
    return low


def _micros(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def _fraction(micros: int, created: datetime) -> str:
    most = 10**_DIGITS - 1
    return f"{min(max(micros, 0), most):0{_DIGITS}d}{_micros(created):0{_DIGITS}d}".rstrip("0")


Minutes = Annotated[int, Meta(ge=0, le=100_000)]


class BayJob(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    bay_id: Id
    title: Label
    created_at: Time
    updated_at: Time
    stage: JobStage = JobStage.QUEUED
    place: Annotated[str, Meta(max_length=_MAX_DIGITS, pattern="^[0-9]*$", examples=["1773491400250000"])] = ""
    """Sort key in the bay's queue; the smallest text is first."""
    order_id: Id | None = None
    scheduled_at: Time | None = None
    expected_minutes: Minutes | None = None
    notes: Text | None = None
    assigned_to: Label | None = None
    started_at: Time | None = None
    finished_at: Time | None = None
    deleted_at: Time | None = None
    request_hash: str | None = None
    """SHA-256 of the request that created it, if that had an Idempotency-Key."""


ENTITY = Entity(
    name="job",
    state=BayJob,
    events=frozenset({"created", "updated", "stage_changed", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda job: job.deleted_at is None and job.stage in (JobStage.QUEUED, JobStage.IN_PROGRESS),
    window_sql="(t.updated_at >= $1 or (t.stage in ('queued', 'in_progress') and t.deleted_at is null))",
    keyed=Keyed(mark="", sql="true"),
    table=Table(
        "jobs",
        tuple(
            columns(
                "bay_id uuid",
                "order_id uuid",
                "title text",
                "stage text",
                "place text",
                "scheduled_at timestamptz",
                "expected_minutes int4",
                "notes text",
                "assigned_to text",
                "started_at timestamptz",
                "finished_at timestamptz",
                "created_at timestamptz",
                "updated_at timestamptz",
                "deleted_at timestamptz",
            )
        ),
    ),
)
