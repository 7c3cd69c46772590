from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sharding.conftest import files


def test_ray_builds_the_same_shards(parquet: Path, shards: Path, tmp_path: Path) -> None:
    """In a process of its own: Ray leaves threads and open files behind."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'parallax-ssl[ray]'")
    options = ["--out", str(tmp_path / "out"), "--lanes", "4", "--shard-mb", "0.02", "--seed", "3", "--engine", "ray"]
    done = subprocess.run(
        [sys.executable, "-m", "sharding.build", "--dataset", str(parquet), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(shards)


def test_without_ray_the_extra_is_named(parquet: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['ray'] = None; from sharding.build import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--dataset", str(parquet), "--out", str(tmp_path), "--engine", "ray"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'parallax-ssl[ray]'" in done.stderr
    assert "Traceback" not in done.stderr
