"""The wall clock of one process, which a test moves while the process runs. It uses libfaketime. Other processes, the
servers and the monotonic clock keep the real time."""

import functools
from pathlib import Path

from deploy.local import packages


class FakeClock:
    def __init__(self, file: Path) -> None:
        """`file`: keeps the offset; this creates it."""
        self._file = file
        self.set_ahead(0)

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which the process must start."""
        return {
            "LD_PRELOAD": str(_library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",  # seconds until the process reads the file again
            # The runtimes wait on the monotonic clock by system calls, which the library does not see.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DISABLE_SHM": "1",  # a killed process would leave its shared memory behind
            "NO_FAKE_STAT": "1",
        }

    def set_ahead(self, seconds: float) -> None:
        """Sets the clock this far ahead of the real time; a negative number sets it behind. The process has the new
        time after a second."""
        draft = self._file.with_suffix(".new")
        draft.write_text(f"{seconds:+.0f}\n")
        draft.replace(self._file)


@functools.cache
def _library() -> Path:
    return packages.ensure_faketime()
