"""Forecasts the result of a replay: writes the dead letter in a transaction that is rolled back."""

from typing import Literal

from msgspec import Struct

from services.sync.dead_letters.replay_sql import ToReplay, is_written
from services.sync.failures.classification import FailureKind, classify
from services.sync.mirror.mirror_writer import MirrorWriter
from services.sync.writer.upsert import DecodedChange, write_batch
from shared.entities import registry
from shared.entities.contract import BrokenContract, Change, Lane, decode_change, split_batch
from shared.entities.entity import Entity
from shared.entities.signal import signal_in
from shared.postgres import states
from shared.postgres.pool import Connection


class Forecast(Struct, frozen=True):
    outcome: Literal["would_write", "superseded", "would_fail"]
    detail: str


class ForecastUnavailable(Exception):
    """PostgreSQL is unavailable, so there is no forecast."""


class Readable(Struct, frozen=True):
    """The change in a dead letter, decoded."""

    event: bytes
    change: Change
    entity: Entity
    state: object


def read_change(body: bytes) -> Readable | None:
    """Returns the change in the body of a dead letter, or None for a signal or an empty batch. Raises BrokenContract.

    A dead letter holds one change, or a body that cannot be split."""
    for event in split_batch(body):
        if signal_in(event) is None:
            change = decode_change(event)
            return Readable(event, change, *registry.read(change))
    return None


async def forecast(
    connection: Connection, dead_letter: ToReplay, mirror_writer: MirrorWriter, *, timeout_seconds: float
) -> Forecast:
    """Forecasts a replay without any lasting effect. `timeout_seconds`: see `write_batch`. Raises ForecastUnavailable,
    MirrorUnavailable, MirrorInDoubt."""
    try:
        found = read_change(dead_letter.body)
    except BrokenContract as error:
        return _would_fail(error)
    if found is None:
        return Forecast("superseded", "the body has no change")
    if dead_letter.lane is None:
        if await mirror_writer.would_apply(found.event):
            return Forecast("would_write", f"version {found.change.entityversion}, into the mirror")
        return Forecast("superseded", "the mirror has this version or a later one")
    try:
        return await _write(
            connection, DecodedChange(Lane(dead_letter.lane), found.entity, found.change, found.state), timeout_seconds
        )
    except Exception as error:
        failure = classify(error)
        if failure.kind is FailureKind.UNAVAILABLE:
            raise ForecastUnavailable(failure.error) from error
        return _would_fail(error)


def _would_fail(error: Exception) -> Forecast:
    failure = classify(error)
    return Forecast("would_fail", f"{failure.reason}: {failure.error}")


async def _write(connection: Connection, decoded: DecodedChange, timeout_seconds: float) -> Forecast:
    change = decoded.change
    if await is_written(connection, change.restaurantid, change.id):
        return Forecast("superseded", "the change is already written")
    transaction = connection.transaction()
    await transaction.start()
    try:
        outcome = await write_batch(connection, [decoded], timeout_seconds=timeout_seconds)
        found = await states.heads(connection, decoded.entity, change.restaurantid, [change.entity_id])
    finally:
        await transaction.rollback()
    head = found[change.entity_id]
    forks = ", and opens a conflict" if outcome.forks else ""
    if head == change.head:
        return Forecast("would_write", f"version {change.entityversion}{forks}")
    return Forecast(
        "superseded", f"the head is version {head.version}; stored as version {change.entityversion}{forks}"
    )
