"""A short run of what `make fuzz` does at length: schemathesis against the documents of the running services. The same
examples at every run; what it finds is in the output, with the request that shows it."""

import json
from collections.abc import AsyncIterator

import pytest

from shared.entities.contract import Lane
from shared.messaging import declare, topology
from tests.fuzz.run import fuzz, patient
from tests.rigs.http_client import http_client
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually

SAME_EVERY_TIME = ("--seed=1", "--generation-deterministic")
RUNS = [
    ("orders", "admin", ("--phases=examples,fuzzing", "--max-examples=3")),
    # The boundaries of every field; of the other routes, which are all alike, `make fuzz` has them.
    ("orders", "staff", ("--phases=coverage", "--include-path-regex=^/api/(orders|payments)")),
    ("sync", "admin", ("--phases=examples,fuzzing", "--max-examples=10")),
    ("notifier", "customer", ("--phases=coverage,fuzzing", "--max-examples=10")),
]


@pytest.fixture(scope="module")
async def fuzzed(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """One of its own: it lets itself be asked to sign in as often as one likes."""
    system = System(servers, tmp_path_factory.mktemp("fuzz"), **patient())
    try:
        await system.up()
        yield system
    finally:
        await system.down()


@pytest.mark.parametrize(("service", "role", "arguments"), RUNS, ids=[f"{run[0]}-{run[1]}" for run in RUNS])
async def test_nothing_that_is_sent_brings_an_answer_which_the_document_does_not_have(
    fuzzed: System, service: str, role: str, arguments: tuple[str, ...]
) -> None:
    outcome = await fuzz(fuzzed, service, role, *arguments, *SAME_EVERY_TIME)
    assert outcome.fine, outcome.told
    if role == "admin":
        # Otherwise it would prove little: nearly every operation was done at least once.
        async with http_client(base_url=fuzzed.urls[service]) as client:
            paths = (await client.get("/api-docs/openapi.json")).json()["paths"]
        # What operators do an admin may not, and there is no letter to look at: tests of their own do those.
        paths = {path: item for path, item in paths.items() if not path.startswith("/api/ops/")}
        every = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
        missed = every - outcome.reached("2")
        assert len(missed) <= len(every) // 10, sorted(missed)


async def test_what_was_accepted_then_is_in_both_stores_and_nothing_is_dead(fuzzed: System) -> None:
    async def differences() -> list[object]:
        found = json.loads(await fuzzed.cli("full-sync", "--verify", "--json", check=False))
        assert found["compared"] > 50
        return [*found["differences"], *range(found["pending"])]

    # Each look is a command of its own, of seconds.
    await eventually(differences, within=120, what="both stores to hold the same", until=lambda found: not found)
    async with await declare.connect(fuzzed.rabbitmq_url) as broker, broker.channel() as channel:
        for name in (topology.MIRROR_DEAD, *map(topology.dead_queue, Lane)):
            queue = await channel.declare_queue(name, passive=True)
            assert queue.declaration_result.message_count == 0, name
