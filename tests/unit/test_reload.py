"""`make dev`: a changed file restarts the services that use it."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from deploy.local import reload
from deploy.local.supervisor import Service, Supervisor

SERVICES = {"orders": "services/orders", "worker": "services/sync", "api": "services/sync"}


@pytest.mark.parametrize(
    ("changed", "users"),
    [
        (["services/orders/app.py"], ["orders"]),
        (["services/sync/api.py"], ["worker", "api"]),
        (["shared/settings.py"], ["orders", "worker", "api"]),
        (["services/orders/app.py", "services/sync/api.py"], ["orders", "worker", "api"]),
    ],
)
def test_a_service_file_restarts_its_service_and_a_shared_file_restarts_all(
    changed: list[str], users: list[str]
) -> None:
    assert reload.affected_services(map(Path, changed), SERVICES) == users


async def test_changed_new_and_removed_source_files_are_reported_and_other_files_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "services"
    folder.mkdir()
    (folder / "kept.py").write_text("1")
    (folder / "gone.lua").write_text("1")
    async with aclosing(reload.watch(tmp_path, ["services"], interval=0.05)) as changes:
        next_ = asyncio.ensure_future(anext(changes))
        seen: set[Path] = set()
        expected = {Path("services/kept.py"), Path("services/new.sql"), Path("services/gone.lua")}
        turn = 0
        async with asyncio.timeout(60):
            while not seen >= expected:
                # The watcher misses changes that precede its first look, so the test repeats them.
                turn += 1
                (folder / "kept.py").write_text("1" * turn)
                (folder / "note.txt").write_text("1" * turn)
                for name in ("new.sql", "gone.lua"):
                    (folder / name).write_text("1") if turn % 2 else (folder / name).unlink(missing_ok=True)
                done, _ = await asyncio.wait([next_], timeout=0.5)
                if done:
                    seen |= set(next_.result())
                    next_ = asyncio.ensure_future(anext(changes))
        next_.cancel()
        await asyncio.gather(next_, return_exceptions=True)
    assert seen == expected


async def test_a_requested_restart_is_immediate_and_does_not_count_as_a_crash(tmp_path: Path) -> None:
    messages: list[str] = []
    service = Service("one", ["-c", "import time; time.sleep(600)"], env={}, cwd=tmp_path, log=tmp_path / "log")
    started = asyncio.Event()
    hour = 3_600.0  # longer than the timeout of the test, so that the test fails if it waits for the pause
    supervisor = Supervisor([service], say=messages.append, on_restart=started.set, first_pause_seconds=hour)
    await supervisor.start()
    first = supervisor.pids["one"]
    try:
        await supervisor.restart(["one"])
        await asyncio.wait_for(started.wait(), 60)
        assert supervisor.pids["one"] != first
        assert supervisor.restarts["one"] == 0
        assert messages == []
    finally:
        await supervisor.stop()


async def test_a_crashed_service_restarts_at_once_after_a_file_change(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text("raise SystemExit(3)")
    messages: asyncio.Queue[str] = asyncio.Queue()
    service = Service("one", [str(script)], env={}, cwd=tmp_path, log=tmp_path / "log")
    started = asyncio.Event()
    supervisor = Supervisor([service], say=messages.put_nowait, on_restart=started.set, first_pause_seconds=3_600.0)
    await supervisor.start()
    try:
        assert "exit code 3" in await asyncio.wait_for(messages.get(), 60)
        script.write_text("import time; time.sleep(600)")
        await supervisor.restart(["one"])
        await asyncio.wait_for(started.wait(), 60)
        assert psutil.Process(supervisor.pids["one"]).status() != psutil.STATUS_ZOMBIE
    finally:
        await supervisor.stop()
