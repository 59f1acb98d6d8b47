"""Runs the command `ticketrail` in a process of its own on the servers of a system, also in a terminal of a given
width."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from typing import Any

from msgspec import Struct

from tests.rigs.system import ROOT, System

_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Ended(Struct):
    """An ended process: exit code, stdout and stderr."""

    code: int | None
    out: str
    err: str

    @property
    def printed(self) -> dict[str, Any]:
        """The JSON object on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found


async def ticketrail(system: System, *arguments: str) -> Ended:
    code, out, err = await system.command(*arguments)
    return Ended(code, out, err)


async def in_terminal(system: System, *arguments: str, columns: int) -> str:
    """Returns the output of `ticketrail` in a pseudo-terminal of this width, without styles. The command must exit with
    0."""
    terminal, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in system.env.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.sync.cli", *arguments),
            cwd=ROOT,
            env={**env, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(slave)
    reading = asyncio.to_thread(_read_all, terminal)
    written, (_, err) = await asyncio.gather(reading, process.communicate())
    assert process.returncode == 0, err.decode()
    return "\n".join(line.rstrip() for line in _STYLE.sub("", written).splitlines())


def _read_all(terminal: int) -> str:
    parts = []
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):  # EIO: the process has ended
        while part := file.read(65_536):
            parts.append(part)
    return b"".join(parts).decode()
