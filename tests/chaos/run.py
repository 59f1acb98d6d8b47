"""One run: load and faults for some seconds, then all services ready again, no change under way, and the proof."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence

from tests.chaos.load import Load
from tests.chaos.proof import Proof, prove
from tests.chaos.rest import rest
from tests.chaos.rig import Rig
from tests.chaos.schedule import Fault
from tests.chaos.watch import Watch


async def run(rig: Rig, seed: int, faults: Sequence[Fault], seconds: float, *, clients: int = 6) -> Proof:
    """`faults` end within `seconds`; `seed` is the load's."""
    load, watch = Load(rig, seed, clients=clients), Watch(rig)
    watch.start()
    load.start()
    began = time.monotonic()
    faulty: set[str] = set()
    locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def one(fault: Fault) -> None:
        await asyncio.sleep(max(0.0, began + fault.at - time.monotonic()))
        # A server killed during its start would look like a server that cannot start.
        async with locks[fault.target]:
            print(fault, flush=True)
            faulty.add(fault.target)
            await rig.begin(fault)
            await asyncio.sleep(fault.seconds)
            await rig.end(fault)
            faulty.discard(fault.target)

    async def supervise() -> None:
        while True:
            await asyncio.sleep(1.0)
            rig.revive(but=faulty)

    supervising = asyncio.create_task(supervise())
    try:
        try:
            await asyncio.gather(*(one(fault) for fault in faults))
            await asyncio.sleep(max(0.0, began + seconds - time.monotonic()))
        finally:
            await load.stop()
        await rig.all_ready()
        ready = time.monotonic()
        restless = ""
        try:
            await rest(rig)
        except AssertionError as error:  # the proof still names the lost changes
            restless = str(error)
        seconds_to_rest = time.monotonic() - ready
        proof = await prove(rig, load, watch)
    finally:
        supervising.cancel()
        await watch.stop()
    with contextlib.suppress(asyncio.CancelledError):
        await supervising  # raises the error with which it ended, if any
    proof.seconds_to_rest = round(seconds_to_rest, 1)
    proof.wrong += [restless] if restless else []
    print(f"answers: {', '.join(f'{count} {what}' for what, count in sorted(load.answers.items()))}")
    for name, times in rig.revived.items():
        print(f"{name} ended by itself and was started again {times} times")
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
        f" {len(proof.wrong)} other, {proof.pushed} pushed, at rest after {proof.seconds_to_rest} s"
    )
