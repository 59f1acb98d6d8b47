"""`make chaos`: SEED=, MINUTES= and CLIENTS= of the environment; exit code 1 when something was lost or doubled."""

import asyncio
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.load import Load
from tests.chaos.proof import Proof, prove, rest
from tests.chaos.rig import Rig
from tests.chaos.schedule import Fault, schedule
from tests.servers.processes import prepare


async def run(rig: Rig, seed: int, seconds: float, *, clients: int = 6) -> Proof:
    """Load and faults for so long, then everything mended, rest, and the proof."""
    faults = schedule(seed, seconds)
    load = Load(rig, seed, clients=clients)
    load.start()
    began = time.monotonic()

    async def one(fault: Fault) -> None:
        await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
        print(fault, flush=True)
        await rig.strike(fault)
        await asyncio.sleep(fault.seconds)
        await rig.mend(fault)

    async def supervise() -> None:
        down = {fault.target for fault in faults}
        while True:
            await asyncio.sleep(1.0)
            now = time.monotonic() - began
            down = {fault.target for fault in faults if fault.at - 0.5 < now < fault.until + 0.5}
            if not down:
                await rig.revive()

    supervising = asyncio.create_task(supervise())
    try:
        await asyncio.gather(*(one(fault) for fault in faults))
        await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
    finally:
        supervising.cancel()
        await load.stop()
    await rig.revive()
    await rig.all_ready()
    mended = time.monotonic()
    await rest(rig)
    proof = await prove(rig, load)
    proof.seconds_to_rest = round(time.monotonic() - mended, 1)
    print(f"answers: {', '.join(f'{count} {what}' for what, count in sorted(load.answers.items()))}")
    return proof


def show(proof: Proof, seed: int, faults: int) -> None:
    for title, lines in (("lost", proof.lost), ("doubled", proof.doubled), ("wrong", proof.wrong)):
        for line in lines[:20]:
            print(f"{title}: {line}")
    print(
        f"seed {seed}: {faults} faults, {proof.acknowledged} acknowledged, {len(proof.lost)} lost,"
        f" {len(proof.doubled)} doubled, {proof.unexplained} unexplained, {proof.forks} forks,"
        f" {len(proof.wrong)} other, at rest after {proof.seconds_to_rest} s"
    )


async def main() -> int:
    seed = int(os.environ.get("SEED") or random.randrange(1_000_000))
    seconds = 60.0 * float(os.environ.get("MINUTES") or 1)
    clients = int(os.environ.get("CLIENTS") or 6)
    print(f"seed {seed}, {seconds:.0f} s, {clients} clients", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="ticketrail-chaos-"))
    servers = await asyncio.to_thread(prepare)
    rig = Rig(servers, folder)
    try:
        await asyncio.to_thread(servers.start_all)
        await rig.up()
        proof = await run(rig, seed, seconds, clients=clients)
    finally:
        print(f"logs: {folder}", flush=True)
        if hasattr(rig, "system"):
            await rig.down()
        await asyncio.to_thread(servers.stop_all)
    show(proof, seed, len(schedule(seed, seconds)))
    return 0 if proof.holds else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
