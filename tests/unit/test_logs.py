"""Logging never raises, because the work that logs must go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

from shared.observability.logs import LossyOutput
from tests.rigs.system import ROOT

PROGRAM = """
import logging
import structlog
from shared.observability.logs import configure_logging

configure_logging("orders")
structlog.get_logger("ours").warning("first", number=1)
logging.getLogger("library").warning("second")
"""


def test_a_full_disk_loses_lines_and_breaks_nothing() -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123  (a device, whose every write fails for lack of space)
        ended = subprocess.run(
            [sys.executable, "-c", f"{PROGRAM}\nraise SystemExit(7)"],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            check=False,
            timeout=60,
        )
    assert ended.stderr == b""
    assert ended.returncode == 7


def test_log_lines_are_json_with_the_service() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, cwd=ROOT, check=True, timeout=60)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(line["service"], line["event"]) for line in found] == [("orders", "first"), ("orders", "second")]


def test_warnings_and_uncaught_errors_are_json_lines_too() -> None:
    program = f"""{PROGRAM}
import warnings
warnings.warn("third")
print("fourth", end="", file=sys.stderr)
raise RuntimeError("fifth")
""".replace("import logging\n", "import logging\nimport sys\n", 1)
    ended = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 1
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert {line["service"] for line in found} == {"orders"}
    text = " ".join(line.get("text", line["event"]) for line in found)
    assert all(word in text for word in ("first", "second", "third", "fourth", "RuntimeError: fifth"))


def test_the_first_line_after_a_loss_is_preceded_by_the_number_of_lost_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    full = os.open("/dev/full", os.O_WRONLY)
    kept = os.dup(fd)
    output = LossyOutput(fd, "orders")
    try:
        output.write("one\n")
        os.dup2(full, fd)
        output.write("two\n")
        output.write("three\n")
        os.dup2(kept, fd)
        output.write("four\n")
        output.write("five\n")
    finally:
        for each in (fd, full, kept):
            os.close(each)
    lines = [line for line in path.read_text().splitlines() if line]
    assert [lines[0], *lines[2:]] == ["one", "four", "five"]
    lost = json.loads(lines[1])
    assert (lost["service"], lost["event"], lost["lines"]) == ("orders", "log_lines_lost", 2)
