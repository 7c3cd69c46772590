"""Small archives in the layout of ILSVRC2012's: a tar of one tar a class, and a flat tar of validation images."""

import io
import tarfile
from pathlib import Path

import fsspec
import pytest

from sharding.build import main
from sharding.command import UserError
from sharding.manifest import open_shards
from sharding.source import SourceError, SourceSpec, open_source, read_labels
from sharding.verify import main as verify
from tests.sharding.conftest import files, jpeg

WNIDS = ["n01440764", "n01443537", "n01484850"]


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    """5 training images of each of three classes, not in the order of their ids; 6 validation images."""
    folder = tmp_path / "imagenet"
    folder.mkdir()
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": jpeg(10 * WNIDS.index(wnid) + i) for i in range(5)})
        for wnid in reversed(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(1, 7)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(validation))
    (folder / "labels.txt").write_text("".join(f"{WNIDS[i % 3]}\n" for i in range(1, 7)))
    return folder


def test_the_training_archive_gives_the_classes_in_the_order_of_their_ids(archives: Path, tmp_path: Path) -> None:
    source = open_source(SourceSpec(str(archives / "ILSVRC2012_img_train.tar")), tmp_path / "cache")
    assert source.class_names == tuple(WNIDS)
    expected = [(jpeg(10 * label + i), label) for label in (2, 1, 0) for i in range(5)]
    assert [source.read(row) for row in range(len(source))] == expected
    assert source.labels().tolist() == [label for _, label in expected]
    assert source.file_keys()[:2] == ["n01484850_0", "n01484850_1"]


def test_both_splits_are_built_by_one_command_and_repaired(archives: Path, tmp_path: Path) -> None:
    cache = ["--cache", str(tmp_path / "cache"), "--workers", "1"]
    options = ["--labels", str(archives / "labels.txt"), "--out", str(tmp_path / "a"), "--lanes", "2", *cache]
    assert main(["--dataset", str(archives), "--split", "train", "validation", *options]) == 0
    train, validation = (open_shards(tmp_path / "a" / split) for split in ("train", "validation"))
    assert train.manifest.class_names == validation.manifest.class_names == tuple(WNIDS)
    by_row = dict(zip(validation.index.source_row.tolist(), validation.index.label.tolist(), strict=True))
    assert by_row == {row: (row + 1) % 3 for row in range(6)}
    before = files(tmp_path / "a")
    next((tmp_path / "a/validation").glob("lane-*/*.tar")).unlink()
    assert verify([str(tmp_path / "a/validation"), "--repair", *cache]) == 0
    assert files(tmp_path / "a") == before


def test_labels_are_read_as_they_are_published(tmp_path: Path) -> None:
    expected = {"ILSVRC2012_val_00000001": "n01440764", "ILSVRC2012_val_00000002": "n01443537"}
    path = tmp_path / "labels"
    for text in (
        "n01440764\nn01443537\n",
        "mv ILSVRC2012_val_00000001.JPEG n01440764/\nmv ILSVRC2012_val_00000002.JPEG n01443537/\n",
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
        "ILSVRC2012_val_00000002,n01443537 85 1 4 2 n01443537 1 1 2 2 \n",
    ):
        path.write_text(text)
        assert read_labels(path) == expected
    path.write_text("490\n361\n")
    with pytest.raises(SourceError, match="holds numbers of ILSVRC's own"):
        read_labels(path)


def test_an_image_without_a_label_is_named(archives: Path, tmp_path: Path) -> None:
    (archives / "labels.txt").write_text("n01440764\n" * 5)
    spec = SourceSpec(str(archives), split="validation", labels=str(archives / "labels.txt"))
    with pytest.raises(SourceError, match="has no class for the image 'ILSVRC2012_val_00000006'"):
        open_source(spec, tmp_path).labels()


def test_validation_images_without_labels_say_so(archives: Path, tmp_path: Path) -> None:
    source = open_source(SourceSpec(str(archives), split="validation"), tmp_path)
    assert "--labels can give them" in source.no_labels
    assert source.labels().tolist() == [-1] * 6


def test_only_the_archive_of_a_split_is_taken_for_it(archives: Path, tmp_path: Path) -> None:
    """Not the other one of a folder, nor training images a second time as those for validation."""
    (archives / "ILSVRC2012_img_val.tar").unlink()
    train = archives / "ILSVRC2012_img_train.tar"
    for dataset in (archives, train):
        with pytest.raises(UserError, match=r"expected ILSVRC2012_img_val\.tar for the split 'validation', found"):
            open_source(SourceSpec(str(dataset), split="validation"), tmp_path / "cache")
        options = ["--dataset", str(dataset), "--out", str(tmp_path / "out"), "--lanes", "1", "--workers", "1"]
        assert main([*options, "--split", "train", "validation"]) == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


def test_archives_behind_a_url_are_refused_by_name(archives: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(archives), f"{tmp_path}/imagenet", recursive=True)
    for name, found in (("", "train"), ("/ILSVRC2012_img_val.tar", "val")):
        with pytest.raises(SourceError, match=rf"ILSVRC2012_img_{found}\.tar can only be read from a local disk"):
            open_source(SourceSpec(f"memory://{tmp_path}/imagenet{name}"), tmp_path)


def test_a_truncated_or_different_archive_is_refused(archives: Path, tmp_path: Path) -> None:
    train = archives / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    train.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"ILSVRC2012_img_train\.tar: .*unexpected end of data"):
        open_source(SourceSpec(str(train)), tmp_path)
    train.write_bytes(tar({"a.jpg": jpeg(1), "a.cls": b"1"}))
    with pytest.raises(SourceError, match=r"holds 'a\.cls': expected images, or a tar of images for each class"):
        open_source(SourceSpec(str(train)), tmp_path)
    train.write_bytes(whole)
    assert len(open_source(SourceSpec(str(train)), tmp_path)) == 15


@pytest.mark.parametrize("sorted_too", [["val"], []], ids=["by valprep.sh", "Kaggle's"])
def test_extracted_folders_give_the_same_classes(tmp_path: Path, sorted_too: list[str]) -> None:
    """Images of the test set, and Kaggle's validation images, are in no folder of their class."""
    root, solution = tmp_path / "CLS-LOC", tmp_path / "LOC_val_solution.csv"
    for split, name in (("train", "{}_1"), ("val", "ILSVRC2012_val_0000000{}"), ("test", "ILSVRC2012_test_0000000{}")):
        for number, wnid in enumerate(WNIDS):
            folder = root / split / (wnid if split in ["train", *sorted_too] else "")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name.format(wnid if split == 'train' else number)}.JPEG").write_bytes(jpeg(number))
    lines = [f"ILSVRC2012_val_0000000{number},{wnid} 1 2 3 4" for number, wnid in enumerate(WNIDS)]
    solution.write_text("\n".join(["ImageId,PredictionString", *lines]))
    for split, labels in (("train", None), ("train", str(solution)), ("validation", str(solution))):
        source = open_source(SourceSpec(str(root), split=split, labels=labels))
        assert source.class_names == tuple(WNIDS)
        assert [source.read(row) for row in range(3)] == [(jpeg(i), i) for i in range(3)]
        assert source.labels().tolist() == [0, 1, 2]
    assert "--labels" in open_source(SourceSpec(str(root), split="validation")).no_labels
