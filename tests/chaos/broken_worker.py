"""A sync worker that acknowledges each message when it takes it, before it commits the changes.

A kill makes it lose changes, and the proof must report them. `python -m tests.chaos.broken_worker` runs it in place of
the real worker.
"""

from collections.abc import Sequence

from litestar import Litestar

from services.sync import worker
from services.sync.writer import postgres_writer
from services.sync.writer.intake import Intake
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


def create() -> Litestar:
    postgres_writer.Intake = AcknowledgesTooEarly  # type: ignore[attr-defined]
    return worker.create()


if __name__ == "__main__":
    settings = Settings.load()
    serve("tests.chaos.broken_worker:create", host=settings.host, port=settings.worker_port)
