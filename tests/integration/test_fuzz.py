"""A short run of `make fuzz`: schemathesis tests the running services against their API documents, with the same
examples in every run. The output shows every finding with its request."""

import json
from collections.abc import AsyncIterator

import pytest

from shared.entities.contract import Lane
from shared.messaging import declare, topology
from tests.fuzz.run import fuzz, fuzz_settings
from tests.rigs.http_client import http_client
from tests.rigs.servers import Servers
from tests.rigs.system import System, eventually

DETERMINISTIC = ("--seed=1", "--generation-deterministic")
RUNS = [
    pytest.param("orders", "admin", ("--phases=examples,fuzzing", "--max-examples=3"), id="orders-admin"),
    # This run tests the boundaries of every field. `make fuzz` tests them on the other, similar routes.
    pytest.param(
        *("orders", "staff", ("--phases=coverage", "--include-path-regex=^/api/(orders|payments)")),
        id="orders-staff",
        marks=pytest.mark.slow,
    ),
    pytest.param("sync", "admin", ("--phases=examples,fuzzing", "--max-examples=10"), id="sync-admin"),
    pytest.param(
        "notifier",
        "customer",
        ("--phases=coverage,fuzzing", "--max-examples=10"),
        id="notifier-customer",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(scope="module")
async def fuzzed(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A system for this module only, without limits on sign-ins."""
    system = System(servers, tmp_path_factory.mktemp("fuzz"), **fuzz_settings())
    try:
        await system.up()
        yield system
    finally:
        await system.down()


@pytest.mark.parametrize(("service", "role", "arguments"), RUNS)
async def test_every_reply_is_described_in_the_api_document(
    fuzzed: System, service: str, role: str, arguments: tuple[str, ...]
) -> None:
    outcome = await fuzz(fuzzed, service, role, *arguments, *DETERMINISTIC)
    assert outcome.passed, outcome.output
    if role == "admin":
        # The run proves little unless nearly every operation succeeded at least once.
        async with http_client(base_url=fuzzed.urls[service]) as client:
            paths = (await client.get("/api-docs/openapi.json")).json()["paths"]
        # An admin may not do what operators do, and there is no dead letter here: other tests cover those routes.
        paths = {path: item for path, item in paths.items() if not path.startswith("/api/ops/")}
        every = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
        missed = every - outcome.reached("2")
        assert len(missed) <= len(every) // 10, sorted(missed)


async def test_accepted_changes_are_in_both_stores_and_none_is_dead(fuzzed: System) -> None:
    async def differences() -> list[object]:
        found = json.loads(await fuzzed.cli("full-sync", "--verify", "--json", check=False))
        assert found["compared"] > 50
        return [*found["differences"], *range(found["pending"])]

    # Each call runs a command that takes seconds.
    await eventually(differences, within=120, what="the same content in both stores", until=lambda found: not found)
    async with await declare.connect(fuzzed.rabbitmq_url) as broker, broker.channel() as channel:
        for name in (topology.MIRROR_DEAD, *map(topology.dead_queue, Lane)):
            queue = await channel.declare_queue(name, passive=True)
            assert queue.declaration_result.message_count == 0, name
