"""`make reset`: removes the data, secrets and logs of a home. Refuses while the system runs."""

import shutil
import sys
from pathlib import Path

from deploy.local import database
from deploy.local.local_settings import LocalSettings
from deploy.local.run import lock, say
from shared.settings_loading import exit_on_bad_settings

_MADE = (
    "postgres", "redis", "rabbitmq", "journal", "traces", "logs",
    "demo.json", "layout.json", "run.pids", "secret", "sync_token", "system.env",
)  # fmt: skip


def reset(home: Path) -> bool:
    """Returns False if the system runs. Removes only what `make run` creates, in case TICKETRAIL_HOME is wrong."""
    if not home.is_dir():
        return True
    held = lock(home)
    if held is None:
        return False
    with held:
        for thing in (home / name for name in _MADE):
            if thing.is_symlink():  # the user of PostgreSQL cannot reach this home, so the data is elsewhere
                if thing.readlink().parent == database.OUTSIDE:
                    shutil.rmtree(thing.readlink(), ignore_errors=True)
                thing.unlink()
            elif thing.is_dir():
                shutil.rmtree(thing)
            else:
                thing.unlink(missing_ok=True)
    return True


def main() -> int:
    with exit_on_bad_settings():
        home = LocalSettings.load().home_path
    if not reset(home):
        say(f"ticketrail: make run is still running on {home}: stop it first")
        return 1
    say(f"ticketrail: the data in {home} is removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
