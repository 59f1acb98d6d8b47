"""Runs `make run` as a user does, with a home and ports of its own."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from deploy.local import reset
from deploy.local.packages import ensure
from deploy.local.port_check import find_free, is_free
from tests.rigs.http_client import http_client
from tests.rigs.system import ROOT, eventually

pytestmark = pytest.mark.timeout(600)

PORTS = (
    "ORDERS_PORT",
    "SYNC_PORT",
    "NOTIFIER_PORT",
    "WORKER_PORT",
    "POSTGRES_PORT",
    "RABBITMQ_PORT",
    "RABBITMQ_MANAGEMENT_PORT",
    "REDIS_PORT",
    "EPMD_PORT",
    "RABBITMQ_DIST_PORT",
)


class Run:
    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home = home
        self.output = home.parent / "output"
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.local.run"], cwd=ROOT, env=env, stdout=output, stderr=output
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def demo(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "demo.json").read_text())
        return found

    async def ready(self, times: int) -> None:
        async def look() -> bool:
            if self.process.poll() is not None:
                pytest.fail(self.text)
            return self.text.count("Ready after") == times

        await eventually(look, within=240, what=f"`Ready after` in the output, {times} times")

    async def stop(self) -> None:
        """Stops the run. All its processes must end and no service may need a kill, even if event streams are open."""
        tree = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self.process.wait, 60)
        left = [
            one for one in tree[1:] if isinstance(one, psutil.Process) and one.is_running() and one.status() != "zombie"
        ]
        assert not left, left
        killed = re.findall(r"(orders|sync|sync-worker|notifier) did not end in time", self.text)
        assert not killed, self.text


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    ensure()
    ports = dict(zip(PORTS, find_free(len(PORTS)), strict=True))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("TICKETRAIL_")}
    return (
        clean
        | {f"TICKETRAIL_{name}": str(port) for name, port in ports.items()}
        # The list of running systems is in TMPDIR. A folder of its own hides other systems of this user.
        | {"TICKETRAIL_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    )


async def command(env: dict[str, str], *arguments: str, **settings: str) -> tuple[int, str, str]:
    """Runs `ticketrail …` with only these settings. Returns (exit code, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.sync.cli", *arguments),
        # The command must not read the .env of this checkout.
        cwd=env["TMPDIR"],
        env={name: value for name, value in env.items() if not name.startswith("TICKETRAIL_")} | settings,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


def free_base() -> int:
    """Returns a port base; the ten ports after it are free."""
    while True:
        (base,) = find_free(1)
        if all(is_free(base + place) for place in range(1, 11)):
            return base


@asynccontextmanager
async def following(run: Run) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
    """Yields a queue of the events that the third printed curl command receives."""
    events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    process = await asyncio.create_subprocess_shell(curl_lines(run)[2], stdout=asyncio.subprocess.PIPE)

    async def read() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            if line.startswith(b"data:"):
                events.put_nowait(json.loads(line[5:]))

    reading = asyncio.create_task(read())
    try:
        await asyncio.wait_for(events.get(), 60)  # the event `connected`
        yield events
    finally:
        reading.cancel()
        if process.returncode is None:
            process.kill()
        await process.wait()


def curl_lines(run: Run) -> list[str]:
    """Returns the three printed curl commands, each after the one printed line with the token."""
    lines = run.text.splitlines()
    (token,) = [line for line in lines if run.demo["tokens"]["staff"] in line]
    # `exec`, so that the process of the shell becomes curl and ends with it.
    return [f"{token}; exec {line}" for line in lines if line.startswith("curl ")][-3:]


async def curl(command: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    found: dict[str, Any] = json.loads(out)
    return found


async def calls_of(page: str, *places: int, run: Run) -> str:
    """Runs shell blocks of a document, by their index, against this system and returns their output. A block that
    follows the event stream is stopped once it is connected."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    block = "\n".join(blocks[place] for place in places)
    for there, here in (
        (".local/demo.json", str(run.home / "demo.json")),
        (".venv/bin/python", sys.executable),
        ("http://127.0.0.1:8001", run.demo["orders_url"]),
        ("http://127.0.0.1:8003", run.demo["notifier_url"]),
    ):
        block = block.replace(there, here)
    assert "127.0.0.1:800" not in block, "the block names a port that was not replaced"
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        block,
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        # The group of the shell and its children can then be ended as a whole.
        start_new_session=True,
        limit=1 << 20,
    )
    assert process.stdout is not None
    printed = b""
    try:
        async with asyncio.timeout(120):
            async for line in process.stdout:
                printed += line
                if line.startswith(b"event: connected"):
                    break
    finally:
        with contextlib.suppress(ProcessLookupError):
            # The signal is SIGTERM, because background processes of a shell script ignore SIGINT.
            os.killpg(process.pid, signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)
    return printed.decode()


async def test_make_run_serves_until_it_is_stopped_and_keeps_its_data(env: dict[str, str], tmp_path: Path) -> None:
    run = Run(tmp_path / "home", env)
    try:
        await run.ready(1)
        for hop in ("accepted", "pushed", "readable", "stored", "synced"):
            assert re.search(rf"\d ms  {hop}", run.text), hop
        place, read, _ = curl_lines(run)
        async with following(run) as events:
            placed = (await curl(place))["data"]
            assert (await curl(read))["success"] is True
            pushed = await asyncio.wait_for(events.get(), 60)
            assert (pushed["eventType"], pushed["orderID"]) == ("order_created", placed["id"])

            killed = run.demo["pids"]["orders"]
            os.kill(killed, signal.SIGKILL)

            async def reported() -> bool:
                return bool(re.search(r"^orders ended .*restarting it", run.text, re.MULTILINE))

            await eventually(reported, what="a line that reports the restart")

            async def restarted() -> bool:
                async with http_client() as client:
                    status = (await client.get(f"{run.demo['orders_url']}/health/ready")).status_code
                # For a moment, a child process of the killed service still answers.
                return status == 200 and run.demo["pids"]["orders"] != killed

            await eventually(restarted, what="a new orders process that is ready")
            await run.stop()  # an event stream is still open

        run = Run(tmp_path / "home", env)
        await run.ready(2)
        async with http_client(headers={"Authorization": f"Bearer {run.demo['tokens']['staff']}"}) as client:
            found = await client.get(f"{run.demo['orders_url']}/api/orders/{placed['id']}")
        assert found.json()["data"]["order_number"] == placed["order_number"]

        quickstart = [
            json.loads(line)
            for line in (await calls_of("docs/quickstart.md", 0, 2, run=run)).splitlines()
            if line.startswith('{"success"')
        ]
        placed_first, read_while_frozen = (answer["data"] for answer in quickstart)
        assert placed_first["durability"] == "broker"
        assert read_while_frozen["sync"]["state"] == "pending", "PostgreSQL was frozen, so it cannot have the order"

        printed = await calls_of("README.md", 0, run=run)
        answers = [json.loads(line) for line in printed.splitlines() if line.startswith('{"success"')]
        assert [answer["success"] for answer in answers] == [True] * 8, printed
        _, read_back, moved, paid, *_ = (answer["data"] for answer in answers)
        assert (read_back["status"], moved["status"], paid["payment_status"]) == ("pending", "received", "paid")
        assert "event: connected" in printed
        await run.stop()
    finally:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(run.process.wait, 60)


@pytest.mark.slow  # it runs `make run` twice
async def test_two_systems_run_side_by_side_and_the_command_line_uses_the_chosen_one(
    env: dict[str, str], tmp_path: Path
) -> None:
    clean = {name: value for name, value in env.items() if not name.startswith("TICKETRAIL_")}
    homes = {name: tmp_path / name / "system" / name for name in ("first", "second")}
    environments = {
        name: clean | {"TICKETRAIL_HOME": str(home), "TICKETRAIL_PORT_BASE": str(free_base())}
        for name, home in homes.items()
    }
    for home in homes.values():
        home.parent.mkdir(parents=True)
    runs = [Run(home, environments[name]) for name, home in homes.items()]
    try:
        await asyncio.gather(*(run.ready(1) for run in runs))
        code, _, errors = await command(env, "status")
        assert code == 1
        for home in homes.values():
            assert str(home) in errors
        assert "--system NAME" in errors

        for name, run in zip(homes, runs, strict=True):
            _, out, _ = await command(env, "--system", name, "status")
            assert out.splitlines()[0] == f"system: {name}, in {homes[name]}, runs"
            assert "unavailable" not in out, out
            chosen = {"TICKETRAIL_HOME": str(homes[name])}
            code, out, errors = await command(env, "ledger", "--json", **chosen)
            assert code == 0, errors
            restaurant = run.demo["restaurant_id"]
            _, token, _ = await command(env, "token", "--restaurant", restaurant, **chosen)
            async with http_client(headers={"Authorization": f"Bearer {token.strip()}"}) as client:
                assert (await client.get(f"{run.demo['orders_url']}/api/orders")).status_code == 200
                other = next(one for one in runs if one is not run).demo["orders_url"]
                assert (await client.get(f"{other}/api/orders")).status_code == 401

        assert not reset.reset(homes["second"]), "reset removed the data of a running system"
        await runs[1].stop()
        code, out, _ = await command(env, "status")  # only the first system still runs
        assert out.splitlines()[0].startswith("system: first")

        connection = await asyncpg.connect(runs[0].demo["database_url"].replace("_writer", "_owner"))
        await connection.execute("update migrations set sha256 = 'older' where name = '0001_the_rail.sql'")
        await connection.close()
        await runs[0].stop()
        older = Run(homes["first"], environments["first"])
        runs.append(older)
        assert await asyncio.to_thread(older.process.wait, 120) == 1
        (sentence,) = [line for line in older.text.splitlines() if line.startswith("ticketrail: ")]
        assert f"`TICKETRAIL_HOME={homes['first']} make reset`" in sentence
        assert "0001_the_rail.sql" in sentence
        assert reset.reset(homes["first"])
        assert sorted(path.name for path in homes["first"].iterdir()) == [".gitignore", "run.lock"]
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(run.process.wait, 60)


@pytest.mark.parametrize("versions", [None, '{"mirror": 0, "journal": 0}'])
async def test_data_of_another_layout_is_refused_before_anything_starts(
    env: dict[str, str], tmp_path: Path, versions: str | None
) -> None:
    home = tmp_path / "home"
    (home / "redis").mkdir(parents=True)
    if versions is not None:
        (home / "layout.json").write_text(versions)
    run = Run(home, env)
    try:
        assert await asyncio.to_thread(run.process.wait, 60) == 1
    finally:
        run.process.kill()
    (sentence,) = [line for line in run.text.splitlines() if line.startswith("ticketrail: ")]
    assert f"`TICKETRAIL_HOME={home} make reset`" in sentence
    assert not list((home / "redis").iterdir())


async def test_a_taken_port_is_named_with_its_setting(env: dict[str, str], tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = Run(tmp_path / "home", env | {"TICKETRAIL_ORDERS_PORT": str(port)})
        assert await asyncio.to_thread(run.process.wait, 60) == 1
    assert str(port) in run.text
    assert "TICKETRAIL_ORDERS_PORT" in run.text
