"""The `ticketrail` command as a process of its own, on the servers of a system."""

import asyncio
import json
import subprocess
import sys
from typing import Any

from msgspec import Struct

from tests.rigs.system import ROOT, System


class Ended(Struct):
    code: int | None
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


async def ticketrail(system: System, *arguments: str) -> Ended:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.sync.cli", *arguments),
        cwd=ROOT,
        env=system.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    return Ended(process.returncode, out.decode(), err.decode())
