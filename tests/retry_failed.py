"""`python -m tests.retry_failed PYTEST_ARGUMENTS` runs pytest, and then runs the failed tests once more.

A slow machine can stall one test out of thousands. So the failed tests run again in a second pytest process, with no
other tests at the same time. Both outcomes and the path of the first log are printed. A test that fails twice fails the
run. A test that passes at its second try does not; it is listed in SECOND_TRIES as a bug to fix.

The exit code is 0 if every test passed at its first or second try. It is never 0 after a collection error, after a
crash of pytest or of one of its workers, without any test, or with more failures than a stall explains. None of these
is tried again.
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


class Outcome(Struct):
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
        print(f"this is not a failed test, so it is not tried again: {sentence}")
    if not first.repeatable:
        print(f"FAILED with exit code {first.code} and {len(first.failed)} failed tests; log: {first.log}")
        return first.code if first.code > 0 else 1

    print(
        f"\n{len(first.failed)} tests failed and run once more, without the others; log of the first run: {first.log}\n"
    )
    second = _run(first.failed, folder, "second")
    passed_later = [name for name in first.failed if name in second.passed]
    print(f"\nfirst log: {first.log}\nsecond log: {second.log}")
    for name in first.failed:
        print(f"  failed, then {'passed' if name in passed_later else 'failed again'}: {name}")
    if passed_later:
        with (logs / SECOND_TRIES).open("a") as file:
            file.writelines(f"{name}  ({first.log})\n" for name in passed_later)
    return 0 if second.code == 0 and not second.broken and len(passed_later) == len(first.failed) else 1


def _run(arguments: Sequence[str], folder: Path, name: str) -> Outcome:
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
        return Outcome(code or 1, log, broken=["pytest ended without writing its outcomes"])
    return Outcome(code, log, **json.loads(file.read_text()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
