"""`make fuzz`: every service's document with every role, on servers and services of its own, so many examples for each
operation. What is found is printed with the request that shows it; exit code 1."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import RUNS, fuzz, patient
from tests.rigs.servers import prepare_servers
from tests.rigs.system import System


async def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument(
        "--examples", type=int, default=50, help="for each operation, beside the boundaries of its fields"
    )
    parser.add_argument("services", nargs="*", default=sorted({service for service, _ in RUNS}))
    parser.add_argument("--seed", type=int, help="as an earlier run has printed it")
    wanted = parser.parse_args()
    seed = [] if wanted.seed is None else [f"--seed={wanted.seed}"]
    servers = prepare_servers()
    servers.start_all()
    found = []
    try:
        with tempfile.TemporaryDirectory(prefix="ticketrail-fuzz-") as folder:
            system = System(servers, Path(folder), **patient())
            await system.up()
            for service, role in RUNS:
                if service in wanted.services:
                    print(f"\n== {service}, {role or 'without a token'} ==", flush=True)
                    outcome = await fuzz(system, service, role, f"--max-examples={wanted.examples}", *seed)
                    print(outcome.told, flush=True)
                    found += [] if outcome.fine else [f"{service}, {role or 'without a token'}"]
            await system.down()
    finally:
        servers.stop_all()
    print("nothing was found" if not found else f"found something: {'; '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
