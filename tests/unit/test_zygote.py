"""Forked programs behave like programs that `python -m` starts."""

import os
import signal
from pathlib import Path

import pytest

from tests.rigs import zygote

CLI = "services.sync.cli"


def test_a_forked_command_has_its_own_output_exit_code_and_environment() -> None:
    code, out, err = zygote.run([CLI, "--version"], env=os.environ)
    assert (code, err) == (0, "")
    assert out.startswith("ticketrail, version ")
    code, out, err = zygote.run([CLI, "no-such-command"], env=os.environ)
    assert (code, out) == (2, "")
    assert "no-such-command" in err
    code, _, err = zygote.run([CLI, "status"], env={**os.environ, "TICKETRAIL_NO_SUCH_SETTING": "1"})
    assert code != 0
    assert "TICKETRAIL_NO_SUCH_SETTING" in err


@pytest.mark.parametrize(("how", "returncode"), [("terminate", -signal.SIGTERM), ("kill", -signal.SIGKILL)])
def test_a_forked_program_can_be_ended_and_its_return_code_read(tmp_path: Path, how: str, returncode: int) -> None:
    other = zygote.spawn([CLI, "--version"], log=tmp_path / "other.log", env=os.environ)
    assert other.wait(60) == 0
    assert "ticketrail, version " in other.tail()
    ended = zygote.spawn(["http.server", "0", "--bind", "127.0.0.1"], log=tmp_path / "server.log", env=os.environ)
    assert ended.returncode is None
    if how == "terminate":
        assert ended.terminate(30)
    else:
        ended.kill()
    assert ended.returncode == returncode
