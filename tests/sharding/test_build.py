from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest

from sharding.build import main
from sharding.command import UserError
from sharding.encode import Policy
from sharding.engine import processes
from sharding.manifest import open_shards
from sharding.storage import Directory
from sharding.verify import verify
from tests.sharding.conftest import build_shards, encoded, files, jpeg, picture, write_parquet
from tests.sharding.test_jpeg import exif_segment, with_segment


def test_bytes_do_not_depend_on_the_workers(parquet: Path, shards: Path, tmp_path: Path) -> None:
    build_shards(parquet, tmp_path / "two", engine=processes(2))
    assert files(tmp_path / "two") == files(shards)


def test_refused_images_are_listed_and_lanes_stay_equal(tmp_path: Path) -> None:
    images = [jpeg(i) for i in range(50)]
    for row in (4, 11, 12, 13, 40):
        images[row] = images[row][:-40]
    images[20] = b""
    source = write_parquet(tmp_path / "source", images, [0] * 50)
    manifest = build_shards(source, tmp_path / "out", max_quarantine=0.2)
    assert (manifest.num_read, manifest.num_quarantined, manifest.num_samples) == (50, 6, 44)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [line["source_row"] for line in lines] == [4, 11, 12, 13, 20, 40]
    assert [line["key"] for line in lines][:2] == ["00000004", "00000011"]
    assert {line["reason"] for line in lines} == {"Premature end of JPEG file", "empty: 0 bytes"}
    index = open_shards(tmp_path / "out").index
    assert sorted(index.source_row.tolist()) == sorted(set(range(50)) - {4, 11, 12, 13, 20, 40})


def test_every_kind_of_bad_input_ends_in_the_quarantine_or_as_a_plain_jpeg(tmp_path: Path) -> None:
    """What breaks DALI pipelines for good, crashes decoders, or is decoded differently by different ones."""
    bomb = bytearray(encoded(picture(1), "PNG"))
    bomb[16:24] = struct.pack(">II", 50_000, 50_000)
    broken_png = bytearray(encoded(picture(1), "PNG"))
    start = broken_png.index(b"IDAT") + 40
    broken_png[start : start + 20] = bytes(20)
    bad = [b"", b"<!DOCTYPE html>", os.urandom(500), jpeg(1)[:-30], jpeg(1)[:-2], bytes(bomb), bytes(broken_png)]
    odd = [
        encoded(picture(2), "GIF"),
        encoded(picture(3), "PNG"),
        encoded(picture(4), "WEBP"),
        encoded(picture(5).convert("CMYK")),
        encoded(picture(6).convert("RGBA"), "PNG"),
        with_segment(jpeg(7), exif_segment(6)),
        with_segment(jpeg(8), exif_segment(0)),
        encoded(picture(9).convert("L")),
        jpeg(10, progressive=True),
    ]
    source = write_parquet(tmp_path / "source", bad + odd, [0] * 16)
    manifest = build_shards(source, tmp_path / "out", lanes=3, max_quarantine=0.5)
    assert (manifest.num_read, manifest.num_quarantined, manifest.num_samples, manifest.num_surplus) == (16, 7, 9, 0)
    assert sum(manifest.changes.values()) == 7
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [line["source_row"] for line in lines] == list(range(7))
    assert all(line["reason"] for line in lines)
    assert verify(Directory.at(tmp_path / "out"), decode=True) == []


def test_reencoding_is_recorded_and_the_same_for_any_worker(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source", [encoded(picture(i, 200, 300)) for i in range(20)], [0] * 20)
    policy = Policy(short_side=64, quality=80)
    manifest = build_shards(source, tmp_path / "one", policy=policy)
    build_shards(source, tmp_path / "two", policy=policy, engine=processes(2))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert (manifest.policy["short_side"], manifest.policy["quality"]) == (64, 80)
    assert manifest.changes == {"resized": 20}
    index = open_shards(tmp_path / "one").index
    assert set(zip(index.height.tolist(), index.width.tolist(), strict=True)) == {(64, 96)}
    assert verify(Directory.at(tmp_path / "one"), decode=True) == []


def test_too_many_refused_images_stop_the_build(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source", [jpeg(i) for i in range(20)] + [b"", b"x"], [0] * 22)
    with pytest.raises(UserError, match=r"cannot be used, more than the 0 .*--max-quarantine"):
        build_shards(source, tmp_path / "out")
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) >= 1
    manifest = build_shards(source, tmp_path / "out", max_quarantine=0.5)
    assert manifest.num_quarantined == 2


def test_all_images_refused_is_one_message(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source", [b"x"] * 8, [0] * 8)
    with pytest.raises(UserError, match=r"only 0 of 8 images can be used.*quarantine\.jsonl"):
        build_shards(source, tmp_path / "out", max_quarantine=1)


def test_a_file_is_no_output(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; --out is a directory"):
        build_shards(parquet, tmp_path / "file")


def test_shards_without_a_manifest_can_be_made_again(shards: Path, parquet: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    (tmp_path / "out/manifest.copy.json").unlink()
    with pytest.raises(UserError, match="with an empty --out makes the same files again"):
        build_shards(parquet, tmp_path / "out")
    build_shards(parquet, tmp_path / "again")
    assert files(tmp_path / "again") == files(shards)


def test_the_same_command_again_changes_nothing(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shards(parquet, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    build_shards(parquet, tmp_path / "out")
    assert "out: already complete, nothing to do" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_a_changed_option_is_refused_by_name(parquet: Path, tmp_path: Path) -> None:
    build_shards(parquet, tmp_path / "out")
    with pytest.raises(UserError, match=r"--lanes 4, now it is 2"):
        build_shards(parquet, tmp_path / "out", lanes=2)


def test_foreign_files_are_not_touched(parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        build_shards(parquet, tmp_path)
    assert files(tmp_path) == {"thesis.txt": b"mine"}


def test_several_splits_are_built_into_folders_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_parquet(tmp_path / "source", [jpeg(i) for i in range(8)], [0] * 8)
    shutil.copy(source / "data/train-00000-of-00001.parquet", source / "data/test-00000-of-00001.parquet")
    options = ["--dataset", str(source), "--out", str(tmp_path / "out"), "--lanes", "2", "--workers", "1"]
    assert main([*options, "--split", "train", "test"]) == 0
    for split in ("train", "test"):
        assert open_shards(tmp_path / "out" / split).manifest.source["split"] == split
        assert (tmp_path / "out" / split / f"lane-00/{split}-000000.tar").exists()
    shutil.rmtree(source)
    assert main([*options, "--split", "train", "test"]) == 0
    assert capsys.readouterr().err.count("already complete, nothing to do") == 2


def test_a_dry_run_estimates_what_the_build_takes(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dataset", str(parquet), "--out", str(tmp_path / "out"), "--lanes", "2", "--shard-mb", "0.05"]
    assert main([*options, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert "61 images of 3 classes" in printed
    for line in ("disk: 0.0 GB in about ", "time: ", "memory: "):
        assert line in printed
    shards = int(re.search("in about ([0-9]+) shards", printed)[1])  # type: ignore[index]
    assert main([*options, "--workers", "1"]) == 0
    assert abs(shards - len(open_shards(tmp_path / "out").manifest.shards)) <= 2


def test_fewer_images_than_lanes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source", [jpeg(i) for i in range(3)], [0] * 3)
    with pytest.raises(UserError, match="3 images cannot fill 4 equal lanes"):
        build_shards(source, tmp_path / "out")
    assert files(tmp_path / "out") in ({}, {".build/lock": b""})


def test_command_reports_what_it_built(parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--dataset", str(parquet), "--out", str(out), "--lanes", "2", "--workers", "1"]) == 0
    assert "60 images in 2 shards" in capsys.readouterr().out
    assert main(["--dataset", str(parquet), "--out", str(out), "--lanes", "3"]) == 2
    assert "--lanes" in capsys.readouterr().err
