import os
import signal
import subprocess
import sys

import pytest

from train.processes import stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with stop.StopRequest() as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        assert request.requested
    assert signal.getsignal(number) is before
    assert f"{number.name}: saving after this step" in capsys.readouterr().err


_TWICE = """
import os, signal, time
from train.processes import stop
with stop.StopRequest() as request:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print(request.requested, flush=True)
    request._since -= 2
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""


def test_a_second_signal_ends_the_process_but_not_the_same_one_passed_on_twice() -> None:
    ended = subprocess.run([sys.executable, "-c", _TWICE], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "True\n")
