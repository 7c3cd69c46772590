import os
from pathlib import Path

import pytest

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
