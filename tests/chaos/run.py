"""One run: load and faults for some seconds. Then it waits until all services are ready and no change is under way, and
proves that nothing was lost."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence

from tests.chaos.idle import wait_until_idle
from tests.chaos.load import Load
from tests.chaos.proof import Proof, prove
from tests.chaos.rig import ChaosRig
from tests.chaos.schedule import Fault
from tests.chaos.screens import Screens


async def run(rig: ChaosRig, seed: int, faults: Sequence[Fault], seconds: float, *, clients: int = 6) -> Proof:
    """Runs the load with `seed`, and the faults, which end within `seconds`."""
    load, screens = Load(rig, seed, clients=clients), Screens(rig)
    screens.start()
    load.start()
    began = time.monotonic()
    faulty: set[str] = set()
    locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def cause(fault: Fault) -> None:
        await asyncio.sleep(max(0.0, began + fault.starts_at - time.monotonic()))
        # A target has one fault at a time: a server that is killed during its start looks like one that cannot start.
        async with contextlib.AsyncExitStack() as held:
            for target in sorted(fault.targets):  # in one order, so that two faults never wait for each other
                await held.enter_async_context(locks[target])
            print(fault, flush=True)
            faulty.add(fault.target)
            await rig.begin(fault)
            await asyncio.sleep(fault.seconds)
            await rig.end(fault)
            faulty.discard(fault.target)

    async def supervise() -> None:
        while True:
            await asyncio.sleep(1.0)
            rig.restart_ended(except_for=faulty)

    supervising = asyncio.create_task(supervise())
    try:
        try:
            await asyncio.gather(*(cause(fault) for fault in faults))
            await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
        finally:
            await load.stop()
        await rig.all_ready()
        ready = time.monotonic()
        not_idle = ""
        try:
            await wait_until_idle(rig)
        except AssertionError as error:  # the proof runs all the same and names the lost changes
            not_idle = str(error)
        seconds_until_idle = time.monotonic() - ready
        proof = await prove(rig, load, screens)
    finally:
        supervising.cancel()
        await screens.stop()
    with contextlib.suppress(asyncio.CancelledError):
        await supervising  # raises the error of the supervision, if there is one
    proof.seconds_until_idle = round(seconds_until_idle, 1)
    proof.wrong += [not_idle] if not_idle else []
    print(f"replies: {', '.join(f'{count} {what}' for what, count in sorted(load.answers.items()))}")
    for name, times in rig.restarted.items():
        print(f"{name} ended by itself and was restarted {times} times")
    return proof


def show(proof: Proof, seed: int, faults: int) -> None:
    named = {"lost": proof.lost, "doubled": proof.doubled, "wrong": proof.wrong, "unexplained": proof.unexplained}
    for title, lines in named.items():
        for line in lines[:20]:
            print(f"{title}: {line}")
    print(
        f"seed {seed}: {faults} faults, {proof.acknowledged} acknowledged, {len(proof.lost)} lost,"
        f" {len(proof.doubled)} doubled, {len(proof.unexplained)} unexplained, {proof.forks} forks"
        f" ({proof.forked_creations} of creations),"
        f" {len(proof.wrong)} other, {proof.pushed} pushed, idle after {proof.seconds_until_idle} s"
    )
