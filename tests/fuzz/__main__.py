"""`make fuzz`: tests the document of every service with every role, on its own servers, with this number of
`--examples` for each operation. Prints every finding with its request. The exit code is 1 if there is any finding."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.fuzz.run import RUNS, fuzz, fuzz_settings
from tests.rigs.servers import prepare_servers
from tests.rigs.system import System


async def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument(
        "--examples",
        type=int,
        default=50,
        help="examples for each operation, besides those at the limits of its fields",
    )
    parser.add_argument("services", nargs="*", default=sorted({service for service, _ in RUNS}))
    parser.add_argument("--seed", type=int, help="the seed that an earlier run printed")
    arguments = parser.parse_args()
    seed = [] if arguments.seed is None else [f"--seed={arguments.seed}"]
    servers = prepare_servers()
    servers.start_all()
    found = []
    try:
        with tempfile.TemporaryDirectory(prefix="ticketrail-fuzz-") as folder:
            system = System(servers, Path(folder), **fuzz_settings())
            await system.up()
            for service, role in RUNS:
                if service in arguments.services:
                    print(f"\n== {service}, {role or 'without a token'} ==", flush=True)
                    outcome = await fuzz(system, service, role, f"--max-examples={arguments.examples}", *seed)
                    print(outcome.output, flush=True)
                    found += [] if outcome.passed else [f"{service}, {role or 'without a token'}"]
            await system.down()
    finally:
        servers.stop_all()
    print("no findings" if not found else f"findings in: {'; '.join(found)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
