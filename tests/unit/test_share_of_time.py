"""Work under `ShareOfTime` runs for at most a tenth of the time."""

import pytest

from services.sync.maintenance.share_of_time import ShareOfTime


class Work:
    """Takes `seconds` on a clock of its own."""

    def __init__(self) -> None:
        self.at = 100.0
        self.seconds = 0.5
        self.runs = 0
        self.error: Exception | None = None

    def clock(self) -> float:
        return self.at

    async def run(self) -> None:
        self.runs += 1
        self.at += self.seconds
        if self.error is not None:
            raise self.error


async def test_long_work_is_followed_by_a_longer_pause() -> None:
    work = Work()
    share = ShareOfTime(work.run, clock=work.clock)
    for _ in range(3):
        await share.run()
    assert work.runs == 1
    # The pause is nine times as long as the work, so 4.4 s is not its end.
    work.at += 4.4
    await share.run()
    assert work.runs == 1
    work.at += 0.2
    work.seconds = 0.001
    await share.run()
    work.at += 0.01
    await share.run()
    assert work.runs == 3, "short work was not repeated in the next round"


async def test_failed_work_is_followed_by_a_pause_too() -> None:
    work = Work()
    work.error = ConnectionError()
    share = ShareOfTime(work.run, clock=work.clock)
    with pytest.raises(ConnectionError):
        await share.run()
    await share.run()
    assert work.runs == 1
    work.at += 4.6
    with pytest.raises(ConnectionError):
        await share.run()
