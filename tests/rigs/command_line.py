"""The `ticketrail` command as a process of its own, on the servers of a system; also in a terminal of a given width."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import termios
from typing import Any

from msgspec import Struct

from tests.rigs.system import System

_STYLE = re.compile(r"\x1b\[[0-9;]*m")


class Ended(Struct):
    code: int | None
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


async def ticketrail(system: System, *arguments: str) -> Ended:
    code, out, err = await system.command(*arguments)
    return Ended(code, out, err)
