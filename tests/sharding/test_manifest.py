from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from sharding.manifest import Index, Manifest, ShardError, fingerprint, open_shards
from sharding.source import SourceSpec, open_source
from sharding.storage import Directory
from sharding.verify import verify
from tests.census import census, wait_until


def test_sample_ids_lead_to_the_source_images(shards: Path, parquet: Path, images: list[bytes]) -> None:
    opened = open_shards(shards)
    manifest, index = opened.manifest, opened.index
    assert opened.root == shards
    assert (manifest.num_samples, manifest.num_samples_per_lane, manifest.num_surplus) == (60, 15, 1)
    lanes = np.array([shard.lane for shard in manifest.shards])[index.shard]
    assert lanes.tolist() == np.repeat(np.arange(4), 15).tolist()
    assert sorted([*index.source_row.tolist(), *manifest.surplus_rows]) == list(range(61))
    for row in range(len(index)):
        data = (shards / manifest.shards[index.shard[row]].path).read_bytes()
        start, size = index.offset[row], index.size[row]
        assert data[start : start + size] == images[index.source_row[row]]
        assert index.label[row] == index.source_row[row] % 3
    assert set(zip(index.height.tolist(), index.width.tolist(), strict=True)) == {(48, 64)}
    assert manifest.class_names == open_source(SourceSpec(str(parquet))).class_names


def test_manifest_survives_a_round_trip(shards: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(shards)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest


@pytest.mark.parametrize("name", ["manifest.json", "index.arrow"])
def test_a_disk_that_does_not_answer_is_named(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before, gate, read = census(), threading.Event(), Directory.read
    monkeypatch.setattr("sharding.command._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(Directory, "read", lambda out, file: (file != name or gate.wait()) and read(out, file))
    thread = threading.Thread(target=open_shards, args=(shards,))
    thread.start()
    wait_until(lambda: f"sharding: {shards}" in (said := capsys.readouterr().err) and "no answer for 0.05 s" in said)
    gate.set()
    thread.join()
    assert census() <= before


def test_the_index_survives_its_file(shards: Path, tmp_path: Path) -> None:
    """A map of it would read zeros now, or end the process with SIGBUS."""
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    index = open_shards(root).index
    os.truncate(root / "index.arrow", 100)
    for field in fields(index):
        np.testing.assert_array_equal(getattr(index, field.name), getattr(Index.load(shards), field.name))


def test_a_large_index_is_mapped_and_looked_at_in_places(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Index.load(shards)
    monkeypatch.setattr("sharding.manifest.MAPPED_BYTES", 0)
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    index = open_shards(root).index
    for field in fields(index):
        np.testing.assert_array_equal(getattr(index, field.name), getattr(expected, field.name))
    _flip_a_bit(root / "index.arrow")  # in the middle, which a map shows at once, and only `verify` notices
    assert any((getattr(index, field.name) != getattr(expected, field.name)).any() for field in fields(index))
    open_shards(root)
    assert [str(problem) for problem in verify(Directory.at(root))]
    _unsorted_index(root)
    with pytest.raises(ShardError, match="sample 7 claims bytes"):
        open_shards(root)


def test_lanes_that_are_not_read_need_not_be_there(shards: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    shutil.rmtree(root / "lane-02")
    assert open_shards(root, [0, 1, 3]).manifest.num_lanes == 4
    with pytest.raises(ShardError, match=r"lane-02/train-000000.tar: .*missing \(this process reads lanes 2, 3\)"):
        open_shards(root, [2, 3])
    with pytest.raises(ShardError, match=r"lane-02/train-000000.tar: .*missing; `python"):
        open_shards(root)


def test_fingerprint_follows_order_and_content_alone(shards: Path) -> None:
    manifest = Manifest.load(shards)
    content: tuple[Any, ...] = (manifest.shards, manifest.num_lanes, manifest.policy, manifest.class_names)
    assert fingerprint(*content) == manifest.fingerprint
    changed = (content[0][::-1], 2, {**manifest.policy, "quality": 1}, content[3][::-1])
    for place, value in enumerate(changed):
        other: list[Any] = [*content[:place], value, *content[place + 1 :]]
        assert fingerprint(*other) != manifest.fingerprint


def _edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def edit(root: Path) -> None:
        raw = json.loads((root / "manifest.json").read_text())
        change(raw)
        (root / "manifest.json").write_text(json.dumps(raw))

    return edit


def _truncate(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])


def _unsorted_index(root: Path) -> None:
    path = root / "index.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    offsets = table.column("offset").to_numpy().copy()
    offsets[7] += 1 << 30
    table = table.set_column(1, table.schema.field("offset"), pa.array(offsets))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    _edit(lambda raw: raw["index"].update(xxh3_128=xxhash.xxh3_128_hexdigest(path.read_bytes())))(root)


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_edit(lambda raw: raw.update(fingerprint="0" * 32)), r"manifest.json: expected the fingerprint 0{32} of its"),
        (_edit(lambda raw: raw["shards"][1].update(xxh3_128="0" * 32)), "its shards have [0-9a-f]{32}: it is damaged"),
        (lambda root: (root / "manifest.json").unlink(), "has no manifest.json"),
        (lambda root: (root / "manifest.json").write_text("{"), "is not JSON"),
        (_edit(lambda raw: raw.update(version=99)), "format version 99"),
        (_edit(lambda raw: raw.pop("layout")), "is damaged at layout: Field required"),
        (_edit(lambda raw: raw.update(num_lanes=4)), "is damaged at num_lanes: Unexpected keyword"),
        (_edit(lambda raw: raw["class_names"].reverse()), "its shards have [0-9a-f]{32}: it is damaged"),
        (_edit(lambda raw: raw["shards"][1].update(nane=1)), r"is damaged at shards.1.nane: "),
        (_edit(lambda raw: raw["shards"][1].pop("lane")), r"is damaged at shards.1.lane: "),
        (_edit(lambda raw: raw.update(num_samples="60")), r"is damaged at num_samples: .* found '60'"),
        (_edit(lambda raw: raw.update(num_samples=60.0)), r"is damaged at num_samples: "),
        (_edit(lambda raw: raw["index"].update(num_bytes="7")), r"is damaged at index.num_bytes: "),
        (_edit(lambda raw: raw.update(shards=None)), r"is damaged at shards: "),
        (
            lambda root: (root / "lane-01/train-000001.tar").unlink(),
            "train-000001.tar: .* it is missing",
        ),
        (
            lambda root: _truncate(root / "lane-02/train-000000.tar", 512),
            "train-000000.tar: expected",
        ),
        (lambda root: _truncate(root / "index.arrow", 8), "index.arrow: expected"),
        (lambda root: _flip_a_bit(root / "index.arrow"), "index.arrow: is damaged: .* --repair` restores it"),
        (_unsorted_index, "sample 7 claims bytes"),
        (shutil.rmtree, "no such directory"),
    ],
    ids=[
        "fingerprint",
        "checksum of a shard",
        "none",
        "json",
        "version",
        "field",
        "unknown field",
        "class names",
        *["unknown", "lacking", "text", "fraction", "text of the index", "null"],
        "missing",
        "truncated",
        "index",
        "bit of the index",
        "offset",
        "nothing",
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    shards: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(shards, root)
    (root / "manifest.copy.json").unlink()
    damage(root)
    with pytest.raises(ShardError, match=message):
        open_shards(root)


def test_opening_shards_does_not_import_pandas(shards: Path) -> None:
    """Which each process of a run would wait for, a second."""
    opens = f"import sys; from sharding.manifest import open_shards; open_shards({str(shards)!r})"
    subprocess.run([sys.executable, "-c", f"{opens}; assert 'pandas' not in sys.modules"], check=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text("{"),
        lambda path: path.write_text(path.read_text().replace("circle", "cirkle")),
    ],
    ids=["missing", "json", "a letter"],
)
def test_the_copy_stands_in_for_a_damaged_manifest(
    shards: Path, tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(shards, root)
    damage(root / "manifest.json")
    assert open_shards(root).manifest == Manifest.load(shards)
    assert (
        "manifest.json: is damaged or missing, its copy is used; `python -m sharding.verify" in capsys.readouterr().err
    )
