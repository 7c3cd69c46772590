"""The demo as a whole is run by ``make demo``; here is what a user may do to it meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_PRETRAINS = f"""#!{sys.executable}
import os, sys, time
from pathlib import Path
waiting = os.getppid()
try:
    while Path(f"/proc/{{waiting}}/stat").read_text().split()[2] != "S":  # make waits for this process
        time.sleep(0.01)
    print(os.environ["OMP_NUM_THREADS"], *sys.argv[1:3], flush=True)
    time.sleep(20)
except KeyboardInterrupt:
    print("saving", flush=True)
    time.sleep(0.2)
    print("saved", "and waited for" * (os.getppid() == waiting), flush=True)
    sys.exit(3)
"""


@pytest.mark.parametrize(("threads", "expected"), [([], "1"), (["OMP_NUM_THREADS=3"], "3")])
def test_ctrl_c_reaches_the_command_which_saves_and_is_waited_for(
    threads: list[str], expected: str, tmp_path: Path
) -> None:
    """The Makefile's own lines, with programs in .venv's place: `python` says 2 to everything, `torchrun` saves."""
    for name, text in (("python", "#!/bin/sh\necho 2"), ("torchrun", _PRETRAINS)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    # As in a terminal: without what a make that runs the tests has set, and with SIGINT, which background jobs ignore.
    clean = ["env", "--default-signal=INT", "--unset=MAKEFLAGS", "--unset=OMP_NUM_THREADS", *threads]
    command = [*clean, "make", "--silent", "demo", "INSTALLED=", f"BIN={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as demo:
        assert demo.stdout is not None
        assert demo.stdout.readline() == "2\n"  # the shards are made
        assert demo.stdout.readline() == f"{expected} --standalone --nproc_per_node=2\n"
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.stdout.read() == "saving\nsaved and waited for\n"
    assert demo.returncode != 0
