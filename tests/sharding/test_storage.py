from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import xxhash
from fsspec.implementations.memory import MemoryFileSystem

from sharding.manifest import open_shards
from sharding.storage import Directory, checksum
from tests.sharding.conftest import files


class BucketFileSystem(MemoryFileSystem):
    """Cannot copy, as the hub's buckets (huggingface_hub 2.3)."""

    protocol = "bucket"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("bucket://", "memory://")))

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        raise NotImplementedError(f"{path1} to {path2}")


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)


@pytest.fixture(params=["local", "memory", "bucket"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    return Directory.at(tmp_path / "a/b" if request.param == "local" else f"{request.param}://{tmp_path.name}")


def test_files_are_written_listed_read_and_moved(directory: Directory) -> None:
    assert directory.sizes() == {}
    directory.write("lane-00/x.tar", b"0123456789")
    directory.write("y", b"")
    assert {n: s for n, s in directory.sizes().items() if "/." not in f"/{n}"} == {"lane-00/x.tar": 10, "y": 0}
    assert directory.read("lane-00/x.tar", 2, 5) == b"234"
    directory.rename("lane-00/x.tar", "y")
    assert directory.read("y") == b"0123456789"
    assert not directory.exists("lane-00/x.tar")
    directory.remove("y")
    directory.remove_state()
    assert directory.sizes() == {}


def test_an_error_publishes_nothing_and_keeps_the_old_file(directory: Directory) -> None:
    directory.write("x", b"old")

    def fail() -> None:
        with directory.publish("x") as path:
            path.write_bytes(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert directory.read("x") == b"old"
    assert [name for name in directory.sizes() if "tmp-" in name] == []


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    directory = Directory.at(tmp_path)
    directory.write("x", b"old")
    with directory.publish("x") as path:
        path.write_bytes(b"new")
        assert directory.read("x") == b"old"
        assert path.stat().st_dev == tmp_path.stat().st_dev
    assert directory.read("x") == b"new"


def test_a_lock_keeps_others_out_and_clears_what_was_left(tmp_path: Path) -> None:
    directory = Directory.at(tmp_path)
    (tmp_path / ".build/tmp-killed").mkdir(parents=True)
    (tmp_path / ".build/tmp-killed/half.tar").write_bytes(b"x")
    with directory.lock():
        assert not any("half" in name for name in files(tmp_path))
        with pytest.raises(ValueError, match="another build is writing here"), directory.lock():
            pass
    with directory.lock():
        pass


def test_checksum(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(data)
    with (tmp_path / "x").open("rb") as file:
        assert checksum(file) == xxhash.xxh3_128_hexdigest(data)


@pytest.fixture
def without_credentials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("without_credentials")
def test_a_store_that_cannot_be_reached_is_an_error_with_its_name() -> None:
    with pytest.raises(OSError, match="s3://nobody/shards: cannot be reached: Unable to locate credentials"):
        open_shards("s3://nobody/shards")


def test_buckets_of_the_hub_are_a_directory() -> None:
    directory = Directory.at("hf://buckets/me/data/shards/")
    assert not directory.is_local
    assert directory.path("manifest.json") == "buckets/me/data/shards/manifest.json"
