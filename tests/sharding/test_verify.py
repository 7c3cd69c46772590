from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.manifest import Index, Manifest, fingerprint
from sharding.storage import Directory, checksum
from sharding.verify import main, verify
from tests.sharding.conftest import build_shards, files, jpeg, write_parquet

Damage = Callable[[Path], object]


def overwrite(name: str, position: int, data: bytes) -> Damage:
    def damage(root: Path) -> None:
        with (root / name).open("r+b") as file:
            file.seek(position)
            file.write(data)

    return damage


def damage_sample(root: Path) -> None:
    """End sample 20's JPEG early."""
    index = Index.load(root)
    name = Manifest.load(root).shards[index.shard[20]].path
    overwrite(name, int(index.offset[20] + index.size[20] - 40), b"\xff\xd9" * 20)(root)


def append(name: str) -> Damage:
    def damage(root: Path) -> None:
        with (root / name).open("ab") as file:
            file.write(bytes(512))

    return damage


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards, tmp_path / "copy")
    return tmp_path / "copy"


SHARD = "lane-01/train-000001"
CASES: dict[str, tuple[Damage, str]] = {
    "missing shard": (lambda root: (root / f"{SHARD}.tar").unlink(), f"{SHARD}.tar: is missing"),
    "longer shard": (append(f"{SHARD}.tar"), f"{SHARD}.tar: expected .* bytes, found"),
    "tar header": (overwrite(f"{SHARD}.tar", 3, b"XX"), f"{SHARD}.tar: sample [0-9]+: its tar header is damaged"),
    "end of archive": (overwrite(f"{SHARD}.tar", 40, b"x"), f"{SHARD}.tar: its checksum is not the manifest's"),
    "sample": (damage_sample, r"train-\d+.tar: sample \d{8}: .*(Premature|Corrupt)"),
    "missing dali index": (lambda root: (root / f"{SHARD}.idx").unlink(), f"{SHARD}.idx: is missing"),
    "dali index": (overwrite(f"{SHARD}.idx", 13, b"9"), f"{SHARD}.idx: does not fit its archive"),
    "missing index": (lambda root: (root / "index.arrow").unlink(), "index.arrow: is missing"),
    "manifest": (overwrite("manifest.json", 30, b"?"), "manifest.json: .*(fingerprint|JSON|damaged)"),
    "copy of the manifest": (overwrite("manifest.copy.json", 30, b"?"), "manifest.copy.json: .*"),
    "index": (overwrite("index.arrow", 900, b"\x07\x07\x07"), "index.arrow: its checksum"),
}


def test_sound_shards_are_sound(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(shards)
    assert main([str(shards), "--decode", "--workers", "2"]) == 0
    assert "60 images in 12 shards: sound" in capsys.readouterr().out
    assert files(shards) == before


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_and_repaired(copy: Path, shards: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = CASES[case]
    damage(copy)
    assert main([str(copy), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert re.search(message, printed)
    assert "problems" in printed
    assert main([str(copy), "--repair", "--workers", "1"]) == 0
    assert "sound" in capsys.readouterr().out
    assert files(copy) == files(shards)


def test_a_stray_archive_is_reported_and_left_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(copy / f"{SHARD}.tar", copy / "lane-00/train-000099.tar")
    assert main([str(copy), "--repair", "--workers", "1"]) == 2
    printed = capsys.readouterr()
    assert "lane-00/train-000099.tar: is not in the manifest" in printed.out
    assert "cannot be repaired; move it away" in printed.err


def test_decode_finds_what_checksums_bless(copy: Path) -> None:
    """An image damaged before it was written, as if the encoder had let it pass."""
    damage_sample(copy)
    manifest = Manifest.load(copy)
    number = int(Index.load(copy).shard[20])
    shards = list(manifest.shards)
    with (copy / shards[number].path).open("rb") as file:
        shards[number] = replace(shards[number], xxh3_128=checksum(file))
    blessed = fingerprint(shards, manifest.num_lanes, manifest.policy, manifest.class_names)
    replace(manifest, shards=tuple(shards), fingerprint=blessed).save(copy)
    assert verify(Directory.at(copy)) == []
    found = verify(Directory.at(copy), decode=True)
    assert [p.path for p in found] == [shards[number].path]
    assert found[0].key == f"{Index.load(copy).source_row[20]:08d}"


def test_other_data_do_not_pass_for_a_repair(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / f"{SHARD}.tar").unlink()
    other = write_parquet(tmp_path / "other", [jpeg(i + 1) for i in range(61)], [0] * 61)
    assert main([str(copy), "--repair", "--workers", "1", "--dataset", str(other)]) == 2
    assert "does not give the same bytes any more" in capsys.readouterr().err
    assert not (copy / f"{SHARD}.tar").exists()


def test_shards_of_damaged_and_levelled_sources_are_repaired(tmp_path: Path) -> None:
    images = [jpeg(i) if i % 10 else jpeg(i)[:-30] for i in range(60)]
    source = write_parquet(tmp_path / "source", images, [0] * 60)
    build_shards(source, tmp_path / "out", max_quarantine=0.2)
    before = files(tmp_path / "out")
    for path in (tmp_path / "out").glob("lane-*/*.tar"):
        path.unlink()
    assert main([str(tmp_path / "out"), "--repair", "--workers", "1"]) == 0
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("name", [f"{SHARD}.tar", f"{SHARD}.idx", "index.arrow", "manifest.json"])
def test_a_pipe_is_named_and_not_read(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert main([str(copy), "--workers", "1"]) == 2
    assert f"{name}: is not a regular file" in capsys.readouterr().err


def test_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert "no such directory" in capsys.readouterr().err
