"""Parses messages of a lane into changes to write, heartbeats to store, and unreadable changes. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from msgspec import Struct

from services.sync.failures.classification import Failure, classify
from services.sync.failures.retry_ladder import FailedChange, single_change_body
from services.sync.writer.upsert import DecodedChange
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
    """One change of a message. It keeps the message that carried it, so that a failed change can be forwarded alone."""

    event: bytes
    message: Message
    decoded: DecodedChange

    @property
    def retried(self) -> bool:
        """True if the change comes from the retry ladder."""
        return topology.ATTEMPT in self.message.headers

    @property
    def name(self) -> tuple[str, str]:
        """(restaurant id, change id)"""
        return (self.decoded.change.restaurantid, self.decoded.change.id)

    def failed(self, failure: Failure) -> FailedChange:
        return FailedChange(
            single_change_body(self.event), self.message.headers, failure, now(), self.decoded.change, self.message
        )


class WriteBatch(Struct):
    lane: Lane
    changes: list[ReceivedChange]
    heartbeats: list[Signal]
    failed: list[FailedChange]
    """The changes that cannot be read. The rest of their message is written anyway."""


def estimate_changes(body: bytes) -> int:
    """Estimates the number of changes in a message body without parsing it. The estimate only limits the size of a
    batch."""
    return max(1, body.count(b'"entityversion"'))


def parse_batch(lane: Lane, messages: Iterable[Message]) -> WriteBatch:
    """Parses messages. Never raises: unreadable changes are in `failed`."""
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
                batch.changes.append(ReceivedChange(event, message, DecodedChange(lane, entity, change, state)))
            except Exception as error:  # noqa: BLE001  (any error is a failure of this change)
                batch.failed.append(
                    FailedChange(single_change_body(event), message.headers, classify(error), now(), change, message)
                )
    return batch
