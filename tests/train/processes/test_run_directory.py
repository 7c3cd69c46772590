import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.census import wait_until
from train.processes.run_directory import run_directory


def test_a_second_run_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with run_directory(tmp_path / "run"), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        run_directory(tmp_path / "run").__enter__()
    with run_directory(tmp_path / "run") as path:
        assert path.is_dir()


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_directory_that_cannot_be_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.dir: .*/file.* cannot be written to"):
        run_directory(tmp_path / name).__enter__()


def test_a_full_disk_is_an_error_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").symlink_to("/dev/full")
    with pytest.raises(ValueError, match=r"run\.dir: .*: no space left; free some"), run_directory(tmp_path) as path:
        (path / "config.yaml").write_text("x")


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(ValueError, match=r"cannot be locked \(No locks available\); choose a different disk"):
        run_directory(tmp_path).__enter__()


_ORPHAN = """
import os, sys, time
from pathlib import Path
from train.processes.run_directory import run_directory
if os.fork() == 0:
    with run_directory(Path(sys.argv[1])):
        print(os.getpid(), flush=True)
        time.sleep(600)
time.sleep(600)
"""


def test_a_worker_whose_launcher_was_killed_is_named_and_its_end_frees_the_directory(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _ORPHAN, tmp_path], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        orphan = int(launcher.stdout.readline())
        launcher.kill()
    try:
        with pytest.raises(ValueError, match=f"by process {orphan} on .* a run whose launcher was killed"):
            run_directory(tmp_path).__enter__()
    finally:
        os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: _is_free(tmp_path))


def _is_free(path: Path) -> bool:
    try:
        with run_directory(path):
            return True
    except ValueError:
        return False
