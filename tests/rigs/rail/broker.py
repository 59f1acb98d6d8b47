"""RabbitMQ as a list of messages, for tests that need no broker. It confirms every publish; a `gate` in front
of it does not."""

from uuid import uuid4

from shared.entities.contract import Change
from shared.messaging.log import LogEntry
from shared.messaging.position import LogPosition, checksum
from tests.rigs.rail.changes import changes_in


class MemoryBroker:
    connected = True

    def __init__(self) -> None:
        self.log: list[bytes] = []
        """Every message, as the lanes have it."""
        self.stream: list[LogEntry] = []
        """The change log, which a power cut may shorten."""

    async def start(self, *, wait: float = 0.0) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def publish(self, routing_key: str, body: bytes) -> None:
        self.log.append(body)
        position = LogPosition(len(self.stream), checksum(body, uuid4().hex))
        self.stream.append(LogEntry(position, routing_key, body))

    def recorded(self) -> dict[str, Change]:
        """The changes in the lanes by id."""
        return {change.id: change for change in changes_in(*self.log)}

    def proves(self, position: LogPosition) -> bool:
        """Whether the change log has the message of the position."""
        return any(entry.position == position for entry in self.stream)
