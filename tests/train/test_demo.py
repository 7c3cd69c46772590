"""The demo as a whole is run by ``make demo``; here is what a user may do to it meanwhile."""

import os
import signal
import subprocess
import sys

_DEMO = """
import signal, sys
from train.demo import _run
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
print("code", _run([sys.executable, "-c", sys.argv[1]]), flush=True)
"""
_COMMAND = """
import os, sys, time
from pathlib import Path
try:
    while Path(f"/proc/{os.getppid()}/stat").read_text().split()[2] != "S":  # the demo waits for this process
        time.sleep(0.01)
    print("running", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("saving", flush=True)
    time.sleep(0.2)
    sys.exit(3)
"""


def test_ctrl_c_reaches_the_command_which_saves_and_is_waited_for() -> None:
    command = [sys.executable, "-c", _DEMO, _COMMAND]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == "running\n"
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.stdout.read() == "saving\ncode 3\n"
