"""A sync worker that acknowledges each message when it takes it, before it commits the changes. Its ledger repairs
nothing.

A kill makes it lose changes, and the proof must report them. `python -m tests.chaos.broken_worker` runs it in place of
the real worker.
"""

from collections.abc import Mapping, Sequence

from services.sync import worker
from services.sync.ledger import ledger_loop
from services.sync.ledger.repairs import Repairs
from services.sync.ledger.sides import LogOnly
from services.sync.writer import postgres_writer
from services.sync.writer.intake import Intake
from shared.http.response_headers import ResponseHeaders
from shared.http.server import serve
from shared.messaging.subscription import Delivery
from shared.settings import Settings


class AcknowledgesTooEarly(Intake):
    async def take(self) -> list[Delivery]:
        taken = await super().take()
        await super().settle(taken)
        return taken

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Does nothing: `take` has acknowledged them already."""


class RepairsNothing(Repairs):
    async def resend(self, wanted: Mapping[str, LogOnly]) -> list[str]:
        return []


def create() -> ResponseHeaders:
    ledger_loop.Repairs = RepairsNothing  # type: ignore[attr-defined]
    postgres_writer.Intake = AcknowledgesTooEarly  # type: ignore[attr-defined]
    return worker.create()


if __name__ == "__main__":
    settings = Settings.load()
    serve(
        "tests.chaos.broken_worker:create",
        service="sync-worker",
        host=settings.host,
        port=settings.worker_port,
        connections=1_000,
    )
