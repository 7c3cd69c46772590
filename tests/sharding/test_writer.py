from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import xxhash

from sharding.writer import ShardWriter
from tests.sharding.conftest import jpeg


def test_archive_is_plain_ustar_with_adjacent_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        offsets = [writer.add(key, jpeg(key), label=key * 10) for key in (7, 3, 123456789)]
    data = path.read_bytes()
    assert writer.num_bytes == len(data)
    assert len(data) % 10240 == 0
    assert writer.digest == xxhash.xxh3_128_hexdigest(data)
    assert [data[o : o + len(jpeg(k))] for o, k in zip(offsets, (7, 3, 123456789), strict=True)] == [
        jpeg(7), jpeg(3), jpeg(123456789)
    ]  # fmt: skip
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        names = [m.name for m in members]
        assert names[:2] == ["00000007.jpg", "00000007.cls"]
        assert names[4:] == ["123456789.jpg", "123456789.cls"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        cls = archive.extractfile("00000003.cls")
        assert cls is not None
        assert cls.read() == b"30"
    assert data[257:265] == b"ustar\x0000"


def test_index_names_every_member_with_its_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        for key in (1, 2):
            writer.add(key, jpeg(key), label=key)
    lines = writer.index.decode().splitlines()
    assert lines[0] == "v1.2 2"
    with tarfile.open(path) as archive:
        expected = [f"{m.name[-3:]} {m.offset_data} {m.size} {m.name}" for m in archive]
    assert lines[1:] == [" ".join(expected[:2]), " ".join(expected[2:])]


def test_an_error_leaves_no_end_mark(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.tar")
    with pytest.raises(TypeError), writer:
        writer.add(1, "not bytes", 0)  # type: ignore[arg-type]
    assert (tmp_path / "a.tar").stat().st_size == writer.num_bytes == 512


def test_headers_are_those_of_tarfile(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        for key in (0, 99_999_999, 14_000_000_000):
            writer.add(key, bytes(key % 1000 + 1), label=-1)
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        for member in archive:
            assert data[member.offset : member.offset + 512] == member.tobuf(tarfile.USTAR_FORMAT)
