from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from sharding.encode import Policy, encode
from sharding.source import Source, SourceError, SourceSpec, open_source
from tests.sharding.conftest import CLASS_NAMES, build_shards, encoded, jpeg, picture, write_parquet


def rows(source: Source) -> list[tuple[bytes, int]]:
    return [source.read(row) for row in range(len(source))]


def open_folder(folder: Path, **options: Any) -> Source:
    return open_source(SourceSpec(str(folder), **options))


def test_parquet_gives_untouched_bytes_labels_and_names(parquet: Path, images: list[bytes]) -> None:
    source = open_folder(parquet)
    assert rows(source) == [(data, row % 3) for row, data in enumerate(images)]
    assert source.class_names == tuple(CLASS_NAMES)
    assert source.probe()[0] == sum(map(len, images)) / len(images)
    assert source.probe() == source.probe()


def test_a_pickled_source_is_small_and_reads_the_same(parquet: Path, images: list[bytes]) -> None:
    pickled = pickle.dumps(open_folder(parquet))
    assert len(pickled) < sum(map(len, images)) / 4
    assert pickle.loads(pickled).read(17) == (images[17], 17 % 3)


def test_image_folder(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "train" / name / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "train" / "dog" / "drawing.png").write_bytes(encoded(picture(9), "PNG"))
    (tmp_path / "train" / "dog" / "empty.jpg").touch()
    source = open_folder(tmp_path)
    assert source.class_names == ("cat", "dog")
    found = rows(source)
    assert sorted(label for _, label in found) == [0] * 3 + [1] * 5
    assert {data for data, _ in found} == {jpeg(0), jpeg(1), jpeg(2), encoded(picture(9), "PNG"), b""}


def test_unlabelled_images_have_label_minus_one(tmp_path: Path) -> None:
    source = open_folder(write_parquet(tmp_path / "source", [jpeg(1), jpeg(2)]))
    assert rows(source) == [(jpeg(1), -1), (jpeg(2), -1)]
    assert source.class_names == ()
    manifest = build_shards(tmp_path / "source", tmp_path / "out", lanes=1)
    assert (manifest.num_samples, manifest.class_names) == (2, ())


@pytest.mark.parametrize("nested", [True, False], ids=["struct", "binary"])
def test_parquet_without_the_hubs_metadata(tmp_path: Path, nested: bool) -> None:
    cell = {"bytes": jpeg(1), "path": "a.jpg"} if nested else jpeg(1)
    pa.parquet.write_table(pa.table({"picture": [cell], "label": [7]}), tmp_path / "train.parquet")
    assert rows(open_folder(tmp_path)) == [(jpeg(1), 7)]


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:  # noqa: A002
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_of_others(tmp_path: Path) -> None:
    members = [(f"n0{k}.{ext}", data) for k in range(6) for ext, data in (("jpg", jpeg(k)), ("cls", b"%d" % k))]
    write_tar(tmp_path / "train-0.tar", members)
    assert rows(open_folder(tmp_path)) == [(jpeg(k), k) for k in range(6)]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_and_odd_member_names_arrive_under_own_keys(tmp_path: Path, format: int) -> None:  # noqa: A002
    """DALI's reader corrupts these names silently; after sharding there are none."""
    bases = ["d" * 90 + "/" + "e" * 120, "with space", "ünï"]
    members = [(f"{b}.{e}", d) for k, b in enumerate(bases) for e, d in (("jpg", jpeg(k)), ("cls", b"%d" % k))]
    write_tar(tmp_path / "train-0.tar", members, format)
    assert rows(open_folder(tmp_path)) == [(jpeg(k), k) for k in range(3)]
    build_shards(tmp_path, tmp_path / "out", lanes=1, shard_mb=1)
    with tarfile.open(tmp_path / "out/lane-00/train-000000.tar") as archive:
        assert sorted(archive.getnames()) == sorted(f"{k:08d}.{e}" for k in range(3) for e in ("jpg", "cls"))


def test_members_that_do_not_form_samples_are_refused(tmp_path: Path) -> None:
    """Not adjacent, or with dots in their names: DALI's reader would pair or name them wrongly, in silence."""
    members = [(f"{k}.jpg", jpeg(k)) for k in range(3)] + [(f"{k}.cls", b"1") for k in range(3)]
    for folder, found in (("apart", members), ("dots", [(f"a.{name}", data) for name, data in members])):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "train-0.tar", found)
        with pytest.raises(SourceError, match=r"don't share the same prefix|several image columns"):
            open_folder(tmp_path / folder)


def test_own_shards_can_be_laid_out_again(shards: Path, parquet: Path, tmp_path: Path) -> None:
    source = open_folder(shards)
    assert source.class_names == tuple(CLASS_NAMES)
    original = open_folder(parquet)
    kept = {original.read(row) for row in range(len(original))}
    assert set(rows(source)) < kept
    assert len(source) == 60
    with pytest.raises(SourceError, match="holds the split 'train', not 'validation'; see --split"):
        open_folder(shards, split="validation")
    manifest = build_shards(shards, tmp_path / "out", lanes=3)
    assert (manifest.num_samples_per_lane, manifest.class_names) == (20, tuple(CLASS_NAMES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "dev"),
        ({"image_column": "picture"}, r"--image-column 'picture' is not a column; there are \['image', 'label'\]"),
        ({"label_column": "class"}, "--label-column 'class' is not a column"),
        ({"image_column": "label"}, "holds ClassLabel, not encoded images"),
    ],
)
def test_wrong_names_are_refused_with_the_right_ones(parquet: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        open_folder(parquet, **options).read(0)


def write_labels(folder: Path, values: list, feature: object) -> Path:
    columns = {"image": [{"bytes": jpeg(i), "path": None} for i in range(len(values))], "label": values}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return folder


def test_strings_become_classes_in_alphabetical_order(tmp_path: Path) -> None:
    source = open_folder(write_labels(tmp_path, ["dog", "cat", None, "emu", "cat"], datasets.Value("string")))
    assert source.class_names == ("cat", "dog", "emu")
    assert [label for _, label in rows(source)] == [1, 0, -1, 2, 0]
    assert pickle.loads(pickle.dumps(source)).read(3) == (jpeg(3), 2)


@pytest.mark.parametrize("folder", ["", "n00000001/"], ids=["flat", "folders"])
def test_archives_of_ilsvrc_give_the_wordnet_ids(tmp_path: Path, folder: str) -> None:
    for wnid in ("n00000001", "n00000000"):
        inside = folder and f"{wnid}/"
        write_tar(
            tmp_path / f"{wnid}.tar", [(f"{inside}{wnid}_{i}.JPEG", jpeg(int(wnid[-1]) * 3 + i)) for i in range(3)]
        )
    source = open_folder(tmp_path)
    assert source.class_names == ("n00000000", "n00000001")
    assert sorted(label for _, label in rows(source)) == [0] * 3 + [1] * 3
    assert all(label == [jpeg(i) for i in range(6)].index(data) // 3 for data, label in rows(source))


def test_more_than_a_hundred_images_of_an_archive_are_no_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "n00000001.tar", [(f"n00000001_{i}.JPEG", jpeg(i)) for i in range(120)])
    assert open_folder(tmp_path).class_names == ("n00000001",)


def test_missing_labels_are_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = datasets.List(datasets.ClassLabel(names=CLASS_NAMES))
    folder = write_labels(tmp_path / "source", [[0, 1], [2]], lists)
    build_shards(folder, tmp_path / "out", lanes=1)
    assert "no labels: of the columns ('image' holds Image, 'label' holds List)" in capsys.readouterr().err
    with pytest.raises(
        SourceError,
        match="column 'label' holds List; --label-column needs class labels",
    ):
        open_folder(folder, label_column="label")
    write_tar(tmp_path / "train-0.tar", [(f"ILSVRC2012_val_{i}.JPEG", jpeg(i)) for i in range(2)])
    (tmp_path / "tars").mkdir()
    (tmp_path / "train-0.tar").rename(tmp_path / "tars/train-0.tar")
    source = open_folder(tmp_path / "tars")
    assert "no labels: neither a label column nor names like" in source.no_labels
    assert [label for _, label in rows(source)] == [-1, -1]


@pytest.mark.parametrize("label", [-7, 2**40])
def test_labels_out_of_range_are_refused_with_row_and_column(tmp_path: Path, label: int) -> None:
    source = open_folder(write_labels(tmp_path, [0, -1, label], datasets.Value("int64")))
    assert source.read(1)[1] == -1
    with pytest.raises(SourceError, match=f"row 2: column 'label' holds {label}; labels go from 0"):
        source.read(2)


def test_the_image_column_holds_no_labels(parquet: Path) -> None:
    with pytest.raises(SourceError, match="column 'image' holds Image; --label-column needs"):
        open_folder(parquet, label_column="image")


def test_a_saved_data_set_is_opened(parquet: Path, images: list[bytes], tmp_path: Path) -> None:
    datasets.load_dataset(str(parquet), split="train").save_to_disk(tmp_path / "saved")
    source = open_folder(tmp_path / "saved")
    assert rows(source) == [(data, row % 3) for row, data in enumerate(images)]
    assert source.class_names == tuple(CLASS_NAMES)


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="/none: no such folder"):
        open_folder(tmp_path / "none")


def test_data_without_images_is_refused(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": ["a"], "label": [7]}), tmp_path / "train.parquet")
    with pytest.raises(SourceError, match=r"no image column in \['text', 'label'\]; name it with --image-column"):
        open_folder(tmp_path)


def test_several_candidates_are_not_guessed_among(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "left": datasets.Image(),
            "right": datasets.Image(),
            "fine": datasets.ClassLabel(3),
            "x": datasets.ClassLabel(3),
        }
    )
    cell = {"bytes": jpeg(1), "path": None}
    table = {"left": [cell], "right": [cell], "fine": [1], "x": [2]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(SourceError, match=r"several image columns, \['left', 'right'\]"):
        open_folder(tmp_path)
    with pytest.raises(SourceError, match=r"several label columns, \['fine', 'x'\]"):
        open_folder(tmp_path, image_column="left")
    assert open_folder(tmp_path, image_column="left", label_column="x").read(0) == (jpeg(1), 2)


def test_a_file_or_an_empty_folder_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=str(tmp_path)):
        open_folder(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(SourceError, match="is a file") as refused:
        open_folder(tmp_path / "a.parquet")
    assert str(refused.value).count("a.parquet") == 1
    (tmp_path / "all.tar.gz").write_bytes(b"")
    with pytest.raises(SourceError, match=r"all\.tar\.gz: is compressed.*gunzip"):
        open_folder(tmp_path / "all.tar.gz")
    (tmp_path / "all.tar.gz").unlink()
    with pytest.raises(SourceError, match=str(tmp_path)):
        open_folder(tmp_path)


def test_imagenets_schema(imagenet_sample: Path) -> None:
    source = open_folder(imagenet_sample)
    assert len(source.class_names) == 1000
    data, label = source.read(0)
    assert 0 <= label < 1000
    assert encode(data, Policy()).height > 50


def test_videos_and_captions_are_refused_by_name(tmp_path: Path) -> None:
    cell = {"bytes": b"", "path": None}
    features = datasets.Features({"clip": datasets.Video()})
    (tmp_path / "videos").mkdir()
    datasets.Dataset.from_dict({"clip": [cell]}, features=features).to_parquet(tmp_path / "videos/train.parquet")
    with pytest.raises(SourceError, match="column 'clip' holds videos, which are not supported"):
        open_folder(tmp_path / "videos")
    captions = write_labels(tmp_path / "captions", [f"a picture of {i}" for i in range(101)], datasets.Value("string"))
    with pytest.raises(SourceError, match="101 different strings of several words for 101 images: captions"):
        open_folder(captions)
