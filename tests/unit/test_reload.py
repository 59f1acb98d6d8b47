"""`make dev`: a change starts the services again that run from the changed file."""

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
def test_a_file_belongs_to_its_service_and_a_shared_one_to_all(changed: list[str], users: list[str]) -> None:
    assert reload.users_of(map(Path, changed), SERVICES) == users


async def test_changed_new_and_removed_files_are_seen_and_others_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "services"
    folder.mkdir()
    (folder / "kept.py").write_text("1")
    (folder / "gone.lua").write_text("1")
    async with aclosing(reload.watch(tmp_path, ["services"], interval=0.05)) as changes:  # type: ignore[type-var]
        next_ = asyncio.ensure_future(anext(changes))
        seen: set[Path] = set()
        wanted = {Path("services/kept.py"), Path("services/new.sql"), Path("services/gone.lua")}
        turn = 0
        async with asyncio.timeout(60):
            while not seen >= wanted:
                turn += 1  # again and again: the first look may come after the first change
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
    assert seen == wanted


async def test_a_restart_that_was_asked_for_is_at_once_and_is_no_death(tmp_path: Path) -> None:
    said: list[str] = []
    service = Service("one", ["-c", "import time; time.sleep(600)"], env={}, cwd=tmp_path, log=tmp_path / "log")
    started = asyncio.Event()
    hour = 3_600.0  # of a pause that is not waited for: the test's own timeout is shorter
    supervisor = Supervisor([service], say=said.append, on_restart=started.set, first_pause=hour)
    await supervisor.start()
    first = supervisor.pids["one"]
    try:
        await supervisor.restart(["one"])
        await asyncio.wait_for(started.wait(), 60)
        assert supervisor.pids["one"] != first
        assert supervisor.restarts["one"] == 0
        assert said == []
    finally:
        await supervisor.stop()


async def test_a_service_that_broke_is_started_at_once_after_the_change_that_repairs_it(tmp_path: Path) -> None:
    script = tmp_path / "service.py"
    script.write_text("raise SystemExit(3)")
    said: asyncio.Queue[str] = asyncio.Queue()
    service = Service("one", [str(script)], env={}, cwd=tmp_path, log=tmp_path / "log")
    started = asyncio.Event()
    supervisor = Supervisor([service], say=said.put_nowait, on_restart=started.set, first_pause=3_600.0)
    await supervisor.start()
    try:
        assert "exit code 3" in await asyncio.wait_for(said.get(), 60)
        script.write_text("import time; time.sleep(600)")
        await supervisor.restart(["one"])
        await asyncio.wait_for(started.wait(), 60)
        assert psutil.Process(supervisor.pids["one"]).status() != psutil.STATUS_ZOMBIE
    finally:
        await supervisor.stop()
