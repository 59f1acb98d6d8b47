"""RabbitMQ as a list of messages, for tests that need no broker. It confirms every publish; a `gate` in front
of it does not."""

from shared.entities.contract import Change
from tests.rigs.rail.changes import changes_in


class MemoryBroker:
    connected = True

    def __init__(self) -> None:
        self.log: list[bytes] = []

    async def start(self, *, wait: float = 0.0) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def publish(self, routing_key: str, body: bytes) -> None:
        self.log.append(body)

    def recorded(self) -> dict[str, Change]:
        """The changes in the log by id."""
        return {change.id: change for change in changes_in(*self.log)}
