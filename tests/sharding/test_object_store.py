"""A real S3 protocol on loopback: sources, shards, resuming, verifying and repairing behind URLs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from sharding.build import main
from sharding.manifest import ShardError, open_shards
from sharding.storage import Directory
from sharding.verify import main as verify
from tests.sharding.conftest import build_shards, files


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:  # noqa: ARG001
    fsspec.filesystem("s3").mkdir("data")
    return "s3://data"


def contents(url: str) -> dict[str, bytes]:
    directory = Directory.at(url)
    return {name: directory.read(name) for name in sorted(directory.sizes())}


def test_shards_on_s3_are_those_on_disk(bucket: str, parquet: Path, shards: Path) -> None:
    build_shards(parquet, f"{bucket}/same")  # type: ignore[arg-type]
    assert contents(f"{bucket}/same") == files(shards)
    assert open_shards(f"{bucket}/same").index.size.tolist() == open_shards(shards).index.size.tolist()


def test_worker_processes_write_to_s3(bucket: str, parquet: Path, shards: Path) -> None:
    options = ["--lanes", "4", "--shard-mb", "0.02", "--seed", "3", "--workers", "2"]
    command = ["-m", "sharding.build", "--dataset", str(parquet), "--out", f"{bucket}/workers", *options]
    subprocess.run([sys.executable, *command], check=True)
    assert contents(f"{bucket}/workers") == files(shards)


def test_an_interrupted_build_on_s3_goes_on(
    bucket: str, parquet: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{bucket}/resumed"
    write = Directory.publish
    left = [9]

    def failing(self: Directory, name: str) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("connection reset")
        return write(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Directory, "publish", failing)
        with pytest.raises(OSError, match="connection reset"):
            build_shards(parquet, out)  # type: ignore[arg-type]
    with pytest.raises(ShardError, match="unfinished"):
        open_shards(out)
    build_shards(parquet, out)  # type: ignore[arg-type]
    assert contents(out) == files(shards)


def test_source_on_s3(bucket: str, parquet: Path, shards: Path, tmp_path: Path) -> None:
    fsspec.filesystem("s3").put(str(parquet), f"{bucket}/source", recursive=True)
    assert (
        main(["--dataset", f"{bucket}/source", "--out", str(tmp_path / "out"), "--lanes", "4", "--workers", "1"]) == 0
    )
    again = main(["--dataset", f"{bucket}/same", "--out", str(tmp_path / "again"), "--lanes", "4", "--workers", "1"])
    assert again == 0
    assert open_shards(tmp_path / "again").manifest.class_names == open_shards(shards).manifest.class_names
    assert len(open_shards(tmp_path / "out").index) == 60


def test_verify_and_repair_on_s3(bucket: str, parquet: Path, shards: Path) -> None:
    out = f"{bucket}/damaged"
    build_shards(parquet, out)  # type: ignore[arg-type]
    assert verify([out, "--decode", "--workers", "1"]) == 0
    Directory.at(out).write("lane-02/train-000001.tar", bytes(10240))
    assert verify([out, "--workers", "1"]) == 1
    assert verify([out, "--repair", "--workers", "1"]) == 0
    assert contents(out) == files(shards)
