from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sharding.build import main
from sharding.manifest import open_shards
from sharding.select import select
from sharding.source import Source, SourceError, SourceSpec, open_source
from sharding.verify import main as verify
from tests.sharding.conftest import files, jpeg

NAMES = ["tench, Tinca tinca", "goldfish", "great white shark"]
WNIDS = ["n01440764", "n01443537", "n01484850"]
COUNTS = [20, 30, 50]  # images of each class


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the schema of the hub's ImageNet: names of classes in words, WordNet ids in the names of files."""
    labels = np.repeat(range(3), COUNTS).tolist()
    names = [f"{WNIDS[label]}_{row}_{WNIDS[label]}.JPEG" for row, label in enumerate(labels)]
    cells = [{"bytes": jpeg(row), "path": name} for row, name in enumerate(names)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    root = tmp_path_factory.mktemp("hub")
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features).to_parquet(root / "train.parquet")
    return root


def selected(folder: Path, seed: int = 0, **options: Any) -> Source:
    spec = SourceSpec(str(folder), **options)
    return select(open_source(spec), spec, seed)


def images(source: Source) -> list[tuple[bytes, int]]:
    return [source.read(row) for row in range(len(source))]


def test_a_fraction_is_balanced_and_a_part_of_a_larger_one(folder: Path) -> None:
    tenth, half = (selected(folder, fraction=fraction) for fraction in (0.1, 0.5))
    assert np.bincount(tenth.labels()).tolist() == [2, 3, 5]
    assert np.bincount(half.labels()).tolist() == [10, 15, 25]
    assert set(images(tenth)) < set(images(half))
    assert images(selected(folder, fraction=0.1)) == images(tenth)
    assert images(selected(folder, seed=1, fraction=0.1)) != images(tenth)
    assert np.bincount(selected(folder, fraction=0.001).labels()).tolist() == [1, 1, 1]


def test_so_many_of_each_class_or_an_error(folder: Path) -> None:
    assert np.bincount(selected(folder, per_class=20).labels()).tolist() == [20, 20, 20]
    with pytest.raises(SourceError, match="--per-class 21: class 'tench, Tinca tinca' has 20 images"):
        selected(folder, per_class=21)


@pytest.mark.parametrize("lines", ["n01484850\nn01440764\n", "great white shark\ntench, Tinca tinca\n\n"])
def test_classes_are_chosen_by_wordnet_id_or_name_and_numbered_anew(folder: Path, tmp_path: Path, lines: str) -> None:
    (tmp_path / "classes.txt").write_text(lines)
    source = selected(folder, classes=str(tmp_path / "classes.txt"))
    assert source.class_names == (NAMES[0], NAMES[2])
    assert images(source) == [(jpeg(row), int(row >= 50)) for row in [*range(20), *range(50, 100)]]


def test_a_published_list_of_files_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "1percent.txt").write_text("n01484850_99.JPEG\nn01440764_3.JPEG\n")
    source = selected(folder, subset=str(tmp_path / "1percent.txt"))
    assert images(source) == [(jpeg(3), 0), (jpeg(99), 2)]
    assert source.class_names == tuple(NAMES)


def test_files_of_the_same_name_in_different_folders_are_told_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.jpg").write_bytes(jpeg(number))
    (tmp_path / "list.txt").write_text("dog/1.jpg\n")
    assert images(selected(tmp_path / "images", subset=str(tmp_path / "list.txt"))) == [(jpeg(1), 1)]
    (tmp_path / "list.txt").write_text("1.jpg\n")
    with pytest.raises(SourceError, match=r"such as 'cat/1'.* found 1 that are not, such as '1'"):
        selected(tmp_path / "images", subset=str(tmp_path / "list.txt"))


@pytest.mark.parametrize(
    ("option", "line", "found"),
    [("classes", "goldfish\ncat\n", "'cat'"), ("subset", "n01440764_50.JPEG", "'n01440764_50'")],
)
def test_names_that_are_not_in_the_data_are_refused(
    folder: Path, tmp_path: Path, option: str, line: str, found: str
) -> None:
    (tmp_path / "list.txt").write_text(line)
    options: dict[str, Any] = {option: str(tmp_path / "list.txt")}
    with pytest.raises(SourceError, match=f"--{option} .*list.txt: expected .* found 1 that are not, such as {found}"):
        selected(folder, **options)


def test_a_selection_is_recorded_and_repaired(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("n01443537\nn01484850\n")
    out = tmp_path / "out"
    options = ["--classes", str(tmp_path / "classes.txt"), "--per-class", "10", "--seed", "5", "--workers", "1"]
    assert main(["--dataset", str(folder), "--out", str(out), "--lanes", "2", *options]) == 0
    opened = open_shards(out)
    assert (opened.manifest.source["per_class"], opened.manifest.class_names) == (10, tuple(NAMES[1:]))
    assert np.bincount(opened.index.label).tolist() == [10, 10]
    before = files(out)
    (out / "lane-00/train-000000.tar").unlink()
    assert verify([str(out), "--repair", "--workers", "1"]) == 0
    assert files(out) == before
