"""`make chaos`: reads SEED, MINUTES and CLIENTS from the environment; exit code 1 if something was lost or doubled."""

import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos.rig import ChaosRig
from tests.chaos.run import run, show
from tests.chaos.schedule import schedule
from tests.rigs.servers.processes import prepare


async def main() -> int:
    seed = int(os.environ.get("SEED") or random.randrange(1_000_000))
    seconds = 60.0 * float(os.environ.get("MINUTES") or 1)
    clients = int(os.environ.get("CLIENTS") or 6)
    print(f"seed {seed}, {seconds:.0f} s, {clients} clients", flush=True)
    faults = schedule(seed, seconds)
    folder = Path(tempfile.mkdtemp(prefix="ticketrail-chaos-"))
    servers = await asyncio.to_thread(prepare)
    rig = ChaosRig(servers, folder)
    try:
        await asyncio.to_thread(servers.start_all)
        await rig.up()
        proof = await run(rig, seed, faults, seconds, clients=clients)
    finally:
        print(f"logs: {folder}", flush=True)
        if hasattr(rig, "system"):
            await rig.down()
        await asyncio.to_thread(servers.stop_all)
    show(proof, seed, len(faults))
    return 0 if proof.holds else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
