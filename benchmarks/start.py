"""How long does `make run` take to become ready on existing data, and how long do the imports of a service take?"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.question import BenchmarkPlan, ResultRow, compared
from benchmarks.rig import ROOT, SERVICES, WITHOUT_RATE_LIMITS, BenchmarkRig
from deploy.local.child import Child
from deploy.local.local_settings import LocalSettings
from deploy.local.port_check import find_free

QUESTION = "start"
_READY_TIMEOUT_SECONDS = 120.0
_STOP_TIMEOUT_SECONDS = 30.0
_POLL_INTERVAL_SECONDS = 0.1
_MODULES = {
    "orders": "services.orders.app",
    "worker": "services.sync.worker",
    "sync": "services.sync.api",
    "notifier": "services.notifier.app",
}


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    assert _MODULES.keys() == SERVICES.keys()
    rows = [
        compared(
            QUESTION,
            f"imports of {name}",
            "import time",
            "ms",
            [_import_milliseconds(module) for _ in range(plan.rounds)],
        )
        for name, module in _MODULES.items()
    ]
    with tempfile.TemporaryDirectory(prefix="ticketrail-bench-run-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        taken = [_ready_after(Path(folder)) for _ in range(1 if plan.quick else 3)]
    note = f"the first start, which creates the data: {taken[0]:.1f} s"
    return [compared(QUESTION, "make run, warm", "ready after", "s", taken[1:] or taken, note=note), *rows]


def _ready_after(folder: Path) -> float:
    """Returns the seconds until `make run` reports that it is ready, with its data in `folder`."""
    names = list(LocalSettings.model_construct().ports)  # ignores the environment, because only the names are used
    ports = {name: str(port) for name, port in zip(names, find_free(len(names)), strict=True)}
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")},
        **{f"TICKETRAIL_{name.upper()}": str(value) for name, value in WITHOUT_RATE_LIMITS.items()},
        **ports,
        "TICKETRAIL_HOME": str(folder / "home"),
    }
    log = folder / "run.log"
    log.unlink(missing_ok=True)
    child = Child.spawn([sys.executable, "-m", "deploy.local.run"], log=log, env=env, cwd=ROOT)
    try:
        deadline = time.monotonic() + _READY_TIMEOUT_SECONDS
        while True:
            output = log.read_text() if log.exists() else ""
            if found := re.search(r"Ready after ([\d.]+) s", output):
                return float(found[1])
            if child.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"make run did not become ready:\n{output[-2000:]}")
            time.sleep(_POLL_INTERVAL_SECONDS)
    finally:
        os.kill(child.pid, signal.SIGINT)
        child.terminate(_STOP_TIMEOUT_SECONDS)


def _import_milliseconds(module: str) -> float:
    """Returns the milliseconds that it takes to import the module and everything that the module imports."""
    output = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    last = [line for line in output.splitlines() if line.rstrip().endswith(f" {module}")][-1]
    return float(last.split("|")[1]) / 1000
