"""How long does it take to start: `make run` until it is ready on a warm `.local/`, and the imports of each service?"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.question import BenchmarkPlan, ResultRow, compared
from benchmarks.rig import ROOT, SERVICES, BenchmarkRig
from deploy.local.child import Child
from deploy.local.environment import LocalSettings
from deploy.local.ports import find_free

QUESTION = "start"
_MODULES = {
    "orders": "services.orders.app",
    "worker": "services.sync.worker",
    "sync": "services.sync.api",
    "notifier": "services.notifier.app",
}


def run(rig: BenchmarkRig, plan: BenchmarkPlan) -> list[ResultRow]:
    assert _MODULES.keys() == SERVICES.keys()
    rows = [
        compared(QUESTION, f"imports of {name}", "import time", "ms", [_imports(module) for _ in range(plan.rounds)])
        for name, module in _MODULES.items()
    ]
    with tempfile.TemporaryDirectory(prefix="ticketrail-bench-run-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        taken = [_ready_after(Path(folder)) for _ in range(1 if plan.quick else 3)]
    note = f"the first, which makes the data: {taken[0]:.1f} s"
    return [compared(QUESTION, "make run, warm", "ready after", "s", taken[1:] or taken, note=note), *rows]


def _ready_after(folder: Path) -> float:
    names = list(LocalSettings().ports)
    ports = {name: str(port) for name, port in zip(names, find_free(len(names)), strict=True)}
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TICKETRAIL_")},
        **ports,
        "TICKETRAIL_HOME": str(folder / "home"),
    }
    log = folder / "run.log"
    log.unlink(missing_ok=True)
    child = Child.spawn([sys.executable, "-m", "deploy.local.run"], log=log, env=env, cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while True:
            said = log.read_text() if log.exists() else ""
            if found := re.search(r"Ready after ([\d.]+) s", said):
                return float(found[1])
            if child.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(f"make run does not get ready:\n{said[-2000:]}")
            time.sleep(0.1)
    finally:
        os.kill(child.pid, signal.SIGINT)
        child.terminate(30)


def _imports(module: str) -> float:
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    last = [line for line in said.splitlines() if line.rstrip().endswith(f" {module}")][-1]
    return float(last.split("|")[1]) / 1000
