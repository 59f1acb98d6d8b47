"""`python -m tests.retry_failed PYTEST_ARGUMENTS`: runs pytest, and what failed once more, alone.

A slow machine can stall one test out of thousands. A test that fails is repeated once in a process of its own, with
nothing beside it, and both outcomes and the log of the first are printed. Failing twice fails the run. A test that
passed at the second try does not; it is listed in SECOND_TRIES as a bug to fix.

Exit code 0: every test passed, at the latest at its second try. Never 0: a collection error, a crash of pytest or of
one of its workers, no test at all, or more failures than a stall explains; none of these is repeated.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from tests import outcomes

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".local/ci"
SECOND_TRIES = "second-tries.txt"
_MAX_REPEATED = 20


class Ended(Struct):
    code: int
    log: Path
    passed: list[str] = []
    failed: list[str] = []
    broken: list[str] = []

    @property
    def repeatable(self) -> bool:
        return self.code == 1 and 0 < len(self.failed) <= _MAX_REPEATED and not self.broken


def main(arguments: Sequence[str], *, logs: Path = LOGS) -> int:
    folder = logs / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
    folder.mkdir(parents=True)
    first = _run(arguments, folder, "first")
    if first.code == 0 and not first.broken:
        return 0
    for sentence in first.broken:
        print(f"no failed test, and not repeated: {sentence}")
    if not first.repeatable:
        print(f"FAILED with exit code {first.code} and {len(first.failed)} failed tests; log: {first.log}")
        return first.code if first.code > 0 else 1

    print(f"\n{len(first.failed)} failed and run once more, alone; log of the first run: {first.log}\n")
    second = _run(first.failed, folder, "second")
    healed = [name for name in first.failed if name in second.passed]
    print(f"\nfirst log: {first.log}\nsecond log: {second.log}")
    for name in first.failed:
        print(f"  failed, then {'passed' if name in healed else 'failed again'}: {name}")
    if healed:
        with (logs / SECOND_TRIES).open("a") as file:
            file.writelines(f"{name}  ({first.log})\n" for name in healed)
    return 0 if second.code == 0 and not second.broken and len(healed) == len(first.failed) else 1


def _run(arguments: Sequence[str], folder: Path, name: str) -> Ended:
    log, file = folder / f"{name}.log", folder / f"{name}.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", outcomes.__name__, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, outcomes.FILE_VARIABLE: str(file)},
    )
    assert process.stdout is not None
    with log.open("wb") as copy:
        while piece := os.read(process.stdout.fileno(), 65_536):
            copy.write(piece)
            copy.flush()
            sys.stdout.write(piece.decode(errors="replace"))
            sys.stdout.flush()
    code = process.wait()
    if not file.exists():
        return Ended(code or 1, log, broken=["pytest ended without saying what it came to"])
    return Ended(code, log, **json.loads(file.read_text()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
