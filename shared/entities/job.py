"""A job: a piece of work in the queue of a bay, perhaps for an order."""

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Entity, OnConflict, Table, columns


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
    """queued → in_progress → done; back to queued from in progress; cancelled from both."""
    return _NEXT[stage]


# Sort keys are decimal fractions without trailing zeros: the digits of the time that the job is for, then of the time
# when it was created, so that jobs for one time keep their order. Another key fits between any two; a number of fixed
# size would be exhausted after about twenty moves into the same gap.
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DIGITS = 16
_MAX_DIGITS = 400
_MIN_GAP = 10**6


def place_at(at: datetime, created: datetime) -> str:
    return _fraction(_micros(at), created)


def place_beside(place: str, seconds: int, created: datetime) -> str:
    """The key `seconds` behind `place` (negative: before it), so that other keys fit between them later."""
    return _fraction(int(place[:_DIGITS].ljust(_DIGITS, "0")) + seconds * 1_000_000, created)


def place_between(low: str, high: str, *, share: str) -> str:
    """A key between two keys. `share`: a UUID that separates jobs which are moved into one gap at the same time.
    Returns `low` when both keys are equal, or the gap is exhausted after hundreds of moves."""
    for digits in range(_DIGITS, _MAX_DIGITS + 1):
        first, last = (int(text[:digits].ljust(digits, "0")) for text in (low, high))
        if last - first >= _MIN_GAP:
            step = (last - first) // 4
            middle = first + step + 2 * step * int(share[:8], 16) // 2**32
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


ENTITY = Entity(
    name="job",
    state=BayJob,
    events=frozenset({"created", "updated", "stage_changed", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda job: job.deleted_at is None and job.stage in (JobStage.QUEUED, JobStage.IN_PROGRESS),
    window_sql="(t.updated_at >= $1 or (t.stage in ('queued', 'in_progress') and t.deleted_at is null))",
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
