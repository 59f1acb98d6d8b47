"""A job: a piece of work in the queue of a bay, perhaps for an order."""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from shared.entities.contract import Id, Label, Lane, Text, Time
from shared.entities.entity import Entity, OnConflict, Table, columns


class Stage(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    DONE = "done"
    CANCELLED = "cancelled"


_NEXT = {
    Stage.QUEUED: (Stage.IN_PROGRESS, Stage.CANCELLED),
    Stage.IN_PROGRESS: (Stage.DONE, Stage.QUEUED, Stage.CANCELLED),
    Stage.DONE: (),
    Stage.CANCELLED: (),
}


def allowed_next(stage: Stage) -> tuple[Stage, ...]:
    """queued → in_progress → done; back to queued from in progress; cancelled from both."""
    return _NEXT[stage]


Minutes = Annotated[int, Meta(ge=0, le=100_000)]


class Job(Struct, frozen=True, kw_only=True):
    id: Id
    restaurant_id: Id
    bay_id: Id
    title: Label
    created_at: Time
    updated_at: Time
    stage: Stage = Stage.QUEUED
    place: Annotated[int, Meta(ge=-(2**53), le=2**53)] = 0
    """Where it stands in its queue: the smallest comes first. Microseconds since the epoch, or between two of them."""
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
    state=Job,
    events=frozenset({"created", "updated", "stage_changed", "deleted", "restored"}),
    lane=Lane.NORMAL,
    on_conflict=OnConflict.TERMINAL_WINS,
    live=lambda job: job.deleted_at is None and job.stage in (Stage.QUEUED, Stage.IN_PROGRESS),
    window_sql="(t.updated_at >= $1 or (t.stage in ('queued', 'in_progress') and t.deleted_at is null))",
    table=Table(
        "jobs",
        tuple(
            columns(
                "bay_id uuid",
                "order_id uuid",
                "title text",
                "stage text",
                "place int8",
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
