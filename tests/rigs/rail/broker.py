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
        self.lanes: list[bytes] = []
        """Every message: the lanes lose none."""
        self.log: list[LogEntry] = []
        """The change log, which may lose its end."""

    async def start(self, *, wait: float = 0.0) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def publish(self, routing_key: str, body: bytes) -> None:
        self.lanes.append(body)
        position = LogPosition(len(self.log), checksum(body, str(uuid4())))
        self.log.append(LogEntry(position, routing_key, body))

    def recorded(self) -> dict[str, Change]:
        """The changes in the lanes by id."""
        return {change.id: change for change in changes_in(*self.lanes)}

    def lose_end(self, messages: int) -> None:
        """The change log loses its last messages, as after a power cut. Others get their offsets."""
        del self.log[-messages:]

    def proves(self, position: LogPosition) -> bool:
        """Returns whether the change log has the message of a position."""
        return any(entry.position == position for entry in self.log)
