"""The local runner: ports, environment, supervision and leftovers of a killed run."""

import asyncio
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.local import demo, leftovers, run
from deploy.local.child import Child
from deploy.local.local_settings import ROOT, LocalSettings, service_environment
from deploy.local.port_check import HOST, PortTaken, find_free, is_free, require_free
from deploy.local.supervisor import Program, Service, Supervisor
from shared.http import server as http_server

ENV = {"PATH": os.environ["PATH"]}


async def eventually(condition: Callable[[], object], within: float = 60.0) -> None:
    async with asyncio.timeout(within):
        while not condition():  # noqa: ASYNC110  (other processes set no event here)
            await asyncio.sleep(0.01)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which a socket listens."""
    with socket.create_server((HOST, 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., LocalSettings]:
    """Settings from the given environment variables alone."""

    def load(**environment: str) -> LocalSettings:
        for name in [name for name in os.environ if name.startswith("TICKETRAIL_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)  # a folder without a .env file
        return LocalSettings()

    return load


# -- ports
# --------------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_reported_with_its_number_and_its_setting(
    taken: int, settings: Callable[..., LocalSettings]
) -> None:
    ports = settings(TICKETRAIL_NOTIFIER_PORT=str(taken)).ports
    chosen = {"TICKETRAIL_NOTIFIER_PORT": ports["TICKETRAIL_NOTIFIER_PORT"]}
    with pytest.raises(PortTaken, match=rf"port {taken} \(notifier\).*TICKETRAIL_NOTIFIER_PORT"):
        run.require_ports(chosen)


def test_the_port_base_moves_every_port_and_a_port_setting_overrides_it(
    settings: Callable[..., LocalSettings],
) -> None:
    ports = settings(TICKETRAIL_PORT_BASE="21000", TICKETRAIL_REDIS_PORT="6400").ports
    found = {name: port for name, (port, _) in ports.items()}
    assert found.pop("TICKETRAIL_REDIS_PORT") == 6400
    assert sorted(found.values()) == [21001, 21002, 21003, 21004, 21005, 21007, 21008, 21009, 21010]
    assert found["TICKETRAIL_ORDERS_PORT"] == 21001
    defaults = {name: port for name, (port, _) in settings(TICKETRAIL_PORT_BASE="").ports.items()}
    assert not set(defaults.values()) & set(found.values())
    assert defaults["TICKETRAIL_ORDERS_PORT"] == 8001


def test_an_invalid_port_base_is_refused_by_name(settings: Callable[..., LocalSettings]) -> None:
    for wrong in ("many", "70000", "80"):
        with pytest.raises(ValueError, match="port_base"):
            settings(TICKETRAIL_PORT_BASE=wrong)


def test_a_port_used_by_an_outgoing_connection_is_awaited(taken: int) -> None:
    (port,) = find_free(1)
    with socket.create_server((HOST, 0)) as server:
        client = socket.socket()
        client.bind((HOST, port))
        client.connect(server.getsockname())
        peer, _ = server.accept()
        assert not is_free(port)
        with pytest.raises(PortTaken):
            require_free(port, None, "x", within=0.2)

        def close_both() -> None:
            peer.close()
            client.close()

        timer = threading.Timer(0.3, close_both)
        timer.start()
        require_free(port, None, "x")
        timer.join()


def test_two_settings_with_the_same_port_are_reported() -> None:
    (port,) = find_free(1)
    with pytest.raises(PortTaken, match=rf"port {port} .*SECOND"):
        run.require_ports({"FIRST": (port, "one"), "SECOND": (port, "two")})


def test_a_taken_port_is_reported_with_the_command_that_shows_its_process(taken: int) -> None:
    with pytest.raises(PortTaken, match=rf"outgoing connection has this port.*`ss -tanp 'sport = :{taken}'`"):
        require_free(taken, "TICKETRAIL_REDIS_PORT", "Redis")


@pytest.mark.parametrize("wrong", [{"TICKETRAIL_JWT_PUBLIC_KEY": "/no/key.pem"}, {"TICKETRAIL_JWT_ALGORITHM": "RS256"}])
def test_keys_that_a_service_refuses_are_refused_before_anything_starts(
    wrong: dict[str, str], settings: Callable[..., LocalSettings], tmp_path: Path
) -> None:
    settings(**wrong, TICKETRAIL_HOME=str(tmp_path / "home"))
    with pytest.raises(SystemExit, match="TICKETRAIL_JWT_"):
        run.main([])
    assert not (tmp_path / "home").exists()


def test_free_ports_are_distinct_and_below_the_range_of_outgoing_connections(taken: int) -> None:
    ports = find_free(20)
    assert len(set(ports)) == 20
    assert all(is_free(port) for port in ports)
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert not is_free(taken)


# -- environment
# --------------------------------------------------------------------------------------------------------


def test_services_use_the_private_servers_whatever_the_environment_says(
    settings: Callable[..., LocalSettings], tmp_path: Path
) -> None:
    inherited = {
        "PATH": "/bin",
        "TICKETRAIL_REDIS_URL": "redis://elsewhere:6379/0",
        "TICKETRAIL_DATABASE_URL": "postgresql://elsewhere/x",
        "TICKETRAIL_REDIS_PORT": "20001",
        "TICKETRAIL_POSTGRES_PORT": "20002",
        "TICKETRAIL_RABBITMQ_PORT": "20003",
        "TICKETRAIL_RABBITMQ_MANAGEMENT_PORT": "20004",
        "TICKETRAIL_WORKER_PORT": "20005",
    }
    env = service_environment(settings(**inherited), tmp_path, inherited)
    assert env["PATH"] == "/bin"
    assert env["TICKETRAIL_HOME"] == str(tmp_path)
    assert env["TICKETRAIL_REDIS_URL"] == "redis://127.0.0.1:20001/0"
    assert env["TICKETRAIL_DATABASE_URL"] == "postgresql://ticketrail_owner:ticketrail@127.0.0.1:20002/ticketrail"
    for role in ("writer", "api", "ops"):
        assert f"//ticketrail_{role}:ticketrail@127.0.0.1:20002/" in env[f"TICKETRAIL_DATABASE_{role.upper()}_URL"]
    assert env["TICKETRAIL_RABBITMQ_URL"] == "amqp://ticketrail:ticketrail@127.0.0.1:20003/"
    assert env["TICKETRAIL_RABBITMQ_MANAGEMENT_URL"] == "http://ticketrail:ticketrail@127.0.0.1:20004"
    assert env["TICKETRAIL_WORKER_PORT"] == "20005"


def test_the_printed_command_names_the_system_if_it_would_not_find_it_otherwise(
    settings: Callable[..., LocalSettings],
) -> None:
    assert run.system_option(ROOT / ".local", settings()) == ""
    assert run.system_option(Path("/a b"), settings()) == "--system '/a b' "
    backends = settings(TICKETRAIL_REDIS_URL="redis://elsewhere:6379/0")
    assert run.system_option(ROOT / ".local", backends) == f"--system {ROOT}/.local "


def test_git_ignores_a_new_home_and_a_directory_with_files_gets_no_gitignore(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "used").mkdir()
    (tmp_path / "used/letters.txt").touch()
    for name in ("new/home", "empty", "used"):
        run.create_home(tmp_path / name)
        (tmp_path / name / "secret").touch()
    status = ["git", "-C", str(tmp_path), "status", "--porcelain", "--untracked-files=all"]
    shown = subprocess.run(status, check=True, capture_output=True, text=True).stdout
    assert shown.splitlines() == ["?? used/letters.txt", "?? used/secret"]


def test_secrets_are_created_once_per_home_and_only_their_owner_can_read_them(
    settings: Callable[..., LocalSettings], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    first = service_environment(settings(), tmp_path, {})
    again = service_environment(settings(), tmp_path, {})
    other = service_environment(settings(), tmp_path / "other", {})
    name = "TICKETRAIL_JWT_SECRET"
    assert len(first[name]) >= 32
    assert first[name] == again[name] != other[name]
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0


def test_a_secret_that_was_set_is_kept(settings: Callable[..., LocalSettings], tmp_path: Path) -> None:
    chosen = "chosen-by-a-person-and-long-enough-for-it"
    assert service_environment(settings(TICKETRAIL_JWT_SECRET=chosen), tmp_path, {})["TICKETRAIL_JWT_SECRET"] == chosen
    assert not (tmp_path / "secret").exists()


# -- supervision
# --------------------------------------------------------------------------------------------------------


class Messages(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
async def supervise(tmp_path: Path) -> AsyncIterator[Callable[..., Supervisor]]:
    """Yields a function that makes a supervisor of Python snippets (service name=code), and stops all supervisors."""
    made: list[Supervisor] = []

    def make(
        messages: Messages, *, stop_timeout_seconds: float = 7.0, first_pause_seconds: float = 0.01, **snippets: str
    ) -> Supervisor:
        programs: list[Program] = [
            Service(
                name,
                ["-c", code],
                env=ENV,
                cwd=tmp_path,
                log=tmp_path / f"{name}.log",
                stop_timeout_seconds=stop_timeout_seconds,
            )
            for name, code in snippets.items()
        ]
        made.append(Supervisor(programs, say=messages, first_pause_seconds=first_pause_seconds))
        return made[-1]

    yield make
    for supervisor in made:
        await supervisor.stop()


FOREVER = "import time\ntime.sleep(1000)"


async def test_a_killed_service_is_restarted_and_reported_in_one_line(
    supervise: Callable[..., Supervisor],
) -> None:
    messages = Messages()
    supervisor = supervise(messages, orders=FOREVER, notifier=FOREVER)
    await supervisor.start()
    before = supervisor.pids
    os.kill(before["orders"], signal.SIGKILL)
    await eventually(lambda: supervisor.pids["orders"] != before["orders"])
    assert messages == ["orders ended (signal 9, SIGKILL); restarting it in 0.0 s"]
    assert psutil.pid_exists(supervisor.pids["orders"])
    assert supervisor.pids["notifier"] == before["notifier"]


async def test_a_service_that_cannot_start_is_retried_with_doubling_pauses(
    supervise: Callable[..., Supervisor],
) -> None:
    messages = Messages()
    supervisor = supervise(messages, first_pause_seconds=0.1, broken="raise SystemExit(3)")
    await supervisor.start()
    await eventually(lambda: len(messages) == 4)
    assert [line.rsplit(" ", 2)[1] for line in messages] == ["0.1", "0.2", "0.4", "0.8"]
    assert "exit code 3" in messages[0]


async def test_pauses_never_exceed_the_longest_pause(tmp_path: Path) -> None:
    messages = Messages()
    broken = Service("broken", ["-c", "raise SystemExit(3)"], env=ENV, cwd=tmp_path, log=tmp_path / "log")
    supervisor = Supervisor([broken], say=messages, first_pause_seconds=0.1, max_pause_seconds=0.2)
    await supervisor.start()
    await eventually(lambda: len(messages) == 4)
    await supervisor.stop()
    assert [line.rsplit(" ", 2)[1] for line in messages] == ["0.1", "0.2", "0.2", "0.2"]


async def test_stop_does_not_wait_for_the_restart_of_a_service(supervise: Callable[..., Supervisor]) -> None:
    messages = Messages()
    supervisor = supervise(messages, first_pause_seconds=60.0, broken="raise SystemExit(3)")
    await supervisor.start()
    await eventually(lambda: messages)
    async with asyncio.timeout(5):
        await supervisor.stop()


async def test_a_service_that_ignores_sigterm_is_killed_with_its_child_processes(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    stubborn = textwrap.dedent("""
        import pathlib, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        pathlib.Path("worker").write_text(f"{worker.pid}.")
        time.sleep(1000)
    """)
    messages = Messages()
    supervisor = supervise(messages, stop_timeout_seconds=0.5, stubborn=stubborn)
    await supervisor.start()
    worker = tmp_path / "worker"
    await eventually(lambda: worker.exists() and worker.read_text().endswith("."))
    pids = [supervisor.pids["stubborn"], int(worker.read_text()[:-1])]
    assert all(psutil.pid_exists(pid) for pid in pids)
    await supervisor.stop()
    await eventually(lambda: not any(_runs(pid) for pid in pids))
    assert messages == ["stubborn did not end in time and was killed"]


def test_the_notifier_drops_clients_that_do_not_read_before_the_supervisor_kills_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served: list[int] = []
    monkeypatch.setattr(http_server, "serve", lambda *_, kill_after_seconds, **__: served.append(kill_after_seconds))
    runpy.run_module("services.notifier", run_name="__main__")
    assert served[0] < inspect.signature(Service).parameters["stop_timeout_seconds"].default


async def test_workers_of_a_killed_service_end_when_it_is_restarted(
    supervise: Callable[..., Supervisor], tmp_path: Path
) -> None:
    parent = textwrap.dedent("""
        import pathlib, subprocess, sys, time
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        with pathlib.Path("workers").open("a") as file: print(worker.pid, file=file, flush=True)
        time.sleep(1000)
    """)
    supervisor = supervise(Messages(), parent=parent)
    await supervisor.start()
    workers = tmp_path / "workers"
    await eventually(lambda: workers.exists() and workers.read_text().endswith("\n"))
    first = int(workers.read_text())
    os.kill(supervisor.pids["parent"], signal.SIGKILL)
    await eventually(lambda: len(workers.read_text().splitlines()) == 2)
    await eventually(lambda: not _runs(first))


class SlowRestart:
    """A program whose second start lasts until it is stopped; the stop then finds only the ended first process."""

    name, pid = "orders", None

    def __init__(self) -> None:
        self.starts = 0
        self.under_way, self.stopped = threading.Event(), threading.Event()
        self.ended = threading.Event()

    def start(self) -> None:
        self.starts += 1
        if self.starts > 1:
            self.under_way.set()
            assert self.stopped.wait(60)
            self.ended = threading.Event()

    def wait(self) -> int | None:
        self.ended.wait(60)
        return 0

    def stop(self) -> bool:
        self.ended.set()
        self.stopped.set()
        return True


async def test_a_stop_during_the_restart_of_a_service_ends_that_service() -> None:
    orders = SlowRestart()
    supervisor = Supervisor([orders], say=Messages(), first_pause_seconds=0.01)
    await supervisor.start()
    orders.ended.set()
    await eventually(orders.under_way.is_set)
    await asyncio.wait_for(supervisor.stop(), 30)
    assert orders.starts == 2
    assert orders.ended.is_set()


async def test_stop_without_start_and_a_second_stop_do_nothing(supervise: Callable[..., Supervisor]) -> None:
    never = supervise(Messages(), service=FOREVER)
    await never.stop()
    messages = Messages()
    once = supervise(messages, service=FOREVER)
    await once.start()
    await once.stop()
    assert messages == []
    await once.stop()


# -- children
# -----------------------------------------------------------------------------------------------------------


def test_a_child_ends_with_its_killed_runner_even_if_a_finished_thread_started_it(tmp_path: Path) -> None:
    runner = textwrap.dedent(f"""
        import psutil, threading, time
        from pathlib import Path
        from deploy.local.child import Child
        def start():
            child = Child.spawn(["sleep", "1000"], log=Path({str(tmp_path / "log")!r}), env={ENV!r}, cwd=Path("/"))
            while psutil.Process(child.pid).name() != "sleep": time.sleep(0.01)  # setpriv runs first
            pids.append(child.pid)
        pids = []
        thread = threading.Thread(target=start)
        thread.start(); thread.join()
        print(pids[0], flush=True)
        time.sleep(1000)
    """)
    process = subprocess.Popen([sys.executable, "-c", runner], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    try:
        pid = int(process.stdout.readline())
        # The thread that started the child has ended. If its end kills the child, the kill comes within moments.
        with pytest.raises(psutil.TimeoutExpired):
            psutil.Process(pid).wait(0.5)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    _until(lambda: not _runs(pid))


def test_a_frozen_child_and_its_child_processes_stop_until_thawed(tmp_path: Path) -> None:
    child = Child.spawn(["sh", "-c", "sleep 1000 & wait"], log=tmp_path / "log", env=ENV, cwd=tmp_path)
    try:
        _until(lambda: len(psutil.Process(child.pid).children()) == 1)
        tree = [psutil.Process(child.pid), *psutil.Process(child.pid).children()]
        child.freeze()
        _until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in tree))
        child.thaw()
        _until(lambda: all(process.status() != psutil.STATUS_STOPPED for process in tree))
        child.freeze()
        assert child.terminate(within=5)  # a frozen child also ends by SIGTERM, without a kill
        assert not any(_runs(process.pid) for process in tree)
    finally:
        child.kill()


def test_leftovers_of_a_killed_run_are_ended_but_a_reused_pid_is_not(tmp_path: Path) -> None:
    file = tmp_path / "run.pids"
    leftover = subprocess.Popen(["sleep", "1000"])
    unrelated = subprocess.Popen(["sleep", "1000"])
    try:
        leftovers.record(file, {"orders": leftover.pid, "notifier": unrelated.pid})
        # The second pid now belongs to a process with another start time.
        known = json.loads(file.read_text())
        known["notifier"][1] -= 60
        file.write_text(json.dumps(known))
        messages = Messages()
        leftovers.clear(file, messages, within=0.1)
        assert not _runs(leftover.pid)
        assert _runs(unrelated.pid)
        assert messages == ["waiting for processes of an earlier run: orders"]
        assert not file.exists()
    finally:
        for process in (leftover, unrelated):
            process.kill()
            process.wait()


# -- one run per home, and its output
# -----------------------------------------------------------------------------------


def test_a_second_run_on_the_same_home_gets_no_lock(tmp_path: Path) -> None:
    held = run.lock(tmp_path)
    assert held
    assert run.lock(tmp_path) is None
    held.close()
    again = run.lock(tmp_path)
    assert again
    again.close()


def test_a_run_waits_for_an_earlier_run_that_is_stopping(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = run.lock(tmp_path)
    assert held
    run.note_stopping(tmp_path)
    assert run.lock(tmp_path) is None, "the note has released the lock"
    end = threading.Timer(0.5, held.close)
    end.start()
    again = run.lock_after_stop(tmp_path)
    end.join()
    assert again
    assert capsys.readouterr().out == "ticketrail: waiting for an earlier run to stop\n"
    # The note is gone: the new run is not stopping.
    assert run.lock_after_stop(tmp_path) is None
    assert capsys.readouterr().out == ""
    again.close()


def test_a_run_does_not_wait_for_ever_for_an_earlier_run(tmp_path: Path) -> None:
    held = run.lock(tmp_path)
    assert held
    run.note_stopping(tmp_path)
    assert run.lock_after_stop(tmp_path, within=0.1) is None
    held.close()


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_documents_show_the_headline_that_a_run_prints(page: str) -> None:
    assert f"```\n{run.HEADLINE}\n" in (ROOT / page).read_text()


def test_the_printed_lines_carry_a_real_token_once_and_real_ids() -> None:
    shown = demo.Demo(
        orders_url="http://127.0.0.1:1",
        sync_url="http://127.0.0.1:2",
        notifier_url="http://127.0.0.1:3",
        restaurant_id="r",
        restaurant_slug="demo",
        tokens={"staff": "the-token"},
        emails={},
        password="p",
        terminal={"id": "t", "api_key": "k"},
        sync_token="s",
        web_shop_key="w",
        menu_item_ids=["dish-1"],
        table_ids=["table-1"],
        database_url="",
        redis_url="",
        rabbitmq_url="",
        rabbitmq_management_url="",
    )
    token, place, read, follow = (line for _, line in shown.shell_lines("order-1"))
    assert token == "TOKEN=the-token"
    assert "http://127.0.0.1:1/api/orders " in place and "dish-1" in place and "table-1" in place
    assert "http://127.0.0.1:1/api/orders/order-1" in read
    assert follow.startswith("curl -sN http://127.0.0.1:3/api/v1/sync/events")
    assert all('-H "Authorization: Bearer $TOKEN"' in line for line in (place, read, follow))


async def test_event_parser_skips_keep_alives() -> None:
    async def lines() -> AsyncIterator[str]:
        for line in ["event: connected", "data: {}", "", ": keep-alive", "", "id: 1", "data: a", "data: b", ""]:
            yield line

    assert [event async for event in demo.parse_events(lines())] == [
        {"event": "connected", "data": "{}"},
        {"id": "1", "data": "a\nb"},
    ]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(condition: Callable[[], object], within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.01)
