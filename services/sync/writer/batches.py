"""Parses messages of a lane into changes to write, heartbeats to store, and unreadable changes. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from msgspec import Struct

from services.sync.failures.classification import Failure, classify
from services.sync.failures.retry_ladder import FailedChange, single_change_body
from services.sync.writer.upsert import Written
from shared.entities import registry
from shared.entities.contract import Change, Lane, decode_change, now, split_batch
from shared.entities.signal import HEARTBEAT, Signal, signal_in
from shared.messaging import topology


class Message(Protocol):
    @property
    def body(self) -> bytes: ...
    @property
    def headers(self) -> Mapping[str, Any]: ...


class ReceivedChange(Struct, frozen=True):
    """One change, with the message that carried it, so that it can be forwarded by itself."""

    event: bytes
    message: Message
    written: Written

    @property
    def retried(self) -> bool:
        """Whether the change has been on the retry ladder."""
        return topology.ATTEMPT in self.message.headers

    @property
    def name(self) -> tuple[str, str]:
        """(restaurant id, change id)"""
        return (self.written.change.restaurantid, self.written.change.id)

    def failed(self, failure: Failure) -> FailedChange:
        return FailedChange(
            single_change_body(self.event), self.message.headers, failure, now(), self.written.change, self.message
        )


class WriteBatch(Struct):
    lane: Lane
    changes: list[ReceivedChange]
    heartbeats: list[Signal]
    failed: list[FailedChange]
    """Changes that cannot be read. They do not delay the rest of their message."""


def estimate_changes(body: bytes) -> int:
    """Estimates the number of changes in a message body without parsing it. Only limits the size of a batch."""
    return max(1, body.count(b'"entityversion"'))


def parse_batch(lane: Lane, messages: Iterable[Message]) -> WriteBatch:
    """Never raises: unreadable changes are in `failed`."""
    batch = WriteBatch(lane, [], [], [])
    for message in messages:
        try:
            events = split_batch(message.body)
        except Exception as error:  # noqa: BLE001  (any error is a failure of this message)
            batch.failed.append(FailedChange(message.body, message.headers, classify(error), now(), None, message))
            continue
        for event in events:
            change: Change | None = None
            try:
                if (signal := signal_in(event)) is not None:
                    if signal.type == HEARTBEAT and signal.lane == lane:
                        batch.heartbeats.append(signal)
                    continue
                change = decode_change(event)
                entity, state = registry.read(change)
                batch.changes.append(ReceivedChange(event, message, Written(lane, entity, change, state)))
            except Exception as error:  # noqa: BLE001  (any error is a failure of this change)
                batch.failed.append(
                    FailedChange(single_change_body(event), message.headers, classify(error), now(), change, message)
                )
    return batch
