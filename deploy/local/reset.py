"""`make reset`: removes the data, secrets and logs of a home. Refuses while the system runs.

`make clean` runs it with `--before-clean`, which refuses while any system of this checkout runs, because `make clean`
also removes the `.venv` of that system.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.local import database
from deploy.local.local_settings import ROOT, LocalSettings
from deploy.local.run import lock_after_stop, say
from shared.local_systems import NoSystem, running_systems
from shared.settings_loading import exit_on_bad_settings

_CREATED_BY_RUN = (
    "postgres", "redis", "rabbitmq", "journal", "traces", "logs",
    "demo.json", "layout.json", "run.pids", "secret", "system.env",
)  # fmt: skip


def has_data(home: Path) -> bool:
    # lexists, because the folder of PostgreSQL may be a link whose target does not exist.
    return any(os.path.lexists(home / name) for name in _CREATED_BY_RUN)


def reset(home: Path) -> bool:
    """Removes only the files that `make run` creates, because TICKETRAIL_HOME may be wrong.

    Returns False if the system is running. Waits for a system that is stopping.
    """
    if not home.is_dir():
        return True
    lock_file = lock_after_stop(home)
    if lock_file is None:
        return False
    with lock_file:
        for path in (home / name for name in _CREATED_BY_RUN):
            if path.is_symlink():  # the user of PostgreSQL cannot reach this home, so its data is elsewhere
                if path.readlink().parent == database.OUTSIDE:
                    shutil.rmtree(path.readlink(), ignore_errors=True)
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    return True


def main(arguments: Sequence[str]) -> int:
    with exit_on_bad_settings():
        home = LocalSettings.load().home_path
    if "--before-clean" in arguments:
        try:
            running = [str(system.home) for system in running_systems() if system.checkout == ROOT]
        except NoSystem as error:
            say(f"ticketrail: {error}")
            return 1
        if running:
            say(f"ticketrail: make run is still running on {' and '.join(running)}; stop it first")
            return 1
    found = has_data(home)
    if not reset(home):
        say(f"ticketrail: make run is still running on {home}; stop it first")
        return 1
    say(f"ticketrail: removed the data in {home}" if found else f"ticketrail: there is no data in {home}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
