"""Maps of images whose neighbours are known: what is drawn, from what, and what is refused."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sharding.command import UserError
from sharding.manifest import ShardSet
from sharding.planes import open_image
from tests.train.evaluate.test_knn import CPU, clusters
from train.evaluate import project
from train.evaluate.features import Features
from train.evaluate.pictures import Album
from train.evaluate.project import Project


def album(shards: ShardSet, folder: Path, step: int = 7) -> Album:
    return Album(folder, "pretrained", step, shards, {"num_threads": 1})


def of_shards(shards: ShardSet) -> Features:
    """Representations of its 92 images that are those of their classes, nearly."""
    labels = torch.from_numpy(shards.index.label.astype(np.int64))
    noise = 0.1 * torch.randn(92, 5, generator=torch.Generator().manual_seed(0))
    return Features(torch.eye(5)[labels.clamp_min(0)] + noise, torch.arange(92), labels)


def columns(made: Album) -> dict[str, list]:
    found: dict[str, list] = json.loads((made.folder / "map.json").read_text())
    return found


def test_the_first_map_is_that_of_the_principal_components() -> None:
    features = clusters(200, 0)
    components, maps = Project(methods="pca").maps(features)
    h = torch.nn.functional.normalize(features.h.double(), dim=1)
    u, s, _ = torch.linalg.svd(h - h.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(maps["pca"]), (u * s)[:, :2].abs(), atol=1e-7)
    assert components.shape == (200, 12)


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_a_map_keeps_classes_together_and_is_the_same_each_time(method: str) -> None:
    if method == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed: pip install 'parallax-ssl[umap]'")
    features = clusters(150, 0, spread=0.2)
    (_, maps), (_, again) = (Project(methods=method, perplexity=10).maps(features) for _ in range(2))
    assert np.array_equal(maps[method], again[method])
    at = torch.from_numpy(maps[method])
    nearest = torch.cdist(at, at).fill_diagonal_(torch.inf).argmin(1)
    assert (features.labels[nearest] == features.labels).float().mean() > 0.98


def test_a_map_has_of_each_image_its_class_and_what_it_shows(shard_set: ShardSet, tmp_path: Path) -> None:
    made = album(shard_set, tmp_path)
    values = Project(methods=("pca", "tsne"), perplexity=10, points=40).draw(of_shards(shard_set), made, CPU)
    assert set(values) == {"pca trustworthiness", "tsne trustworthiness"}
    assert 0.5 < values["pca trustworthiness"] < values["tsne trustworthiness"] <= 1
    found = columns(made)
    assert {len(column) for column in found.values()} == {40}
    assert found["id"] == sorted(set(found["id"]))
    names = shard_set.manifest.class_names
    assert found["class"] == [names[shard_set.index.label[sample]] for sample in found["id"]]
    assert len(set(zip(found["class"], found["color"], strict=True))) == 3
    for sample, address in zip(found["id"][:5], found["thumbnail"], strict=False):
        thumbnail = Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/webp;base64,"))))
        assert thumbnail.size == (48, 48)
        expected = np.asarray(square(shard_set, sample), float)
        assert np.abs(np.asarray(thumbnail, float) - expected).mean() < 12, "WebP is not exact"


def test_a_map_of_a_single_class_has_one_colour_and_no_legend(shard_set: ShardSet, tmp_path: Path) -> None:
    features = of_shards(shard_set)
    alone = features.take(features.labels == 1)
    values = Project(methods=("pca", "tsne"), perplexity=5).draw(alone, made := album(shard_set, tmp_path), CPU)
    assert all(0.5 < value <= 1 for value in values.values())
    assert set(columns(made)["class"]) == {shard_set.manifest.class_names[1]}
    assert len(set(columns(made)["color"])) == 1
    figure = project._figure(columns(made), ["pca", "tsne"])
    assert not figure.legends


def square(shards: ShardSet, sample: int) -> Image.Image:
    """The middle of an image by Pillow."""
    index = shards.index
    path = Path(shards.root) / shards.manifest.shards[int(index.shard[sample])].path
    with path.open("rb") as file:
        file.seek(int(index.offset[sample]))
        image = open_image(file.read(int(index.size[sample]))).convert("RGB")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side)).resize((48, 48), Image.Resampling.BILINEAR)


def test_the_files_of_a_map_need_no_network_and_tensorboard_has_it_too(shard_set: ShardSet, tmp_path: Path) -> None:
    for step, points in ((6, 40), (7, 30)):  # a second evaluation takes the place of the first
        made = album(shard_set, tmp_path, step)
        Project(methods="pca", points=points).draw(of_shards(shard_set), made, CPU)
    page = (made.folder / "map.html").read_text()
    assert not re.search(r"<(?:link|script|img|iframe)[^>]*(?:src|href)=\"(?!data:)", page)
    assert page.count("data:image/webp") == 30
    with Image.open(made.folder / "map.png") as picture:
        assert picture.width >= 900
    (board,) = (tmp_path / "tensorboard" / "map-pretrained").glob("0*/*")
    assert board.parent.name == "00007"
    assert len((board / "tensors.tsv").read_text().splitlines()) == 30
    rows = [line.split("\t") for line in (board / "metadata.tsv").read_text().splitlines()]
    assert rows[0] == ["class", "sample"]
    assert [[name, int(sample)] for name, sample in rows[1:]] == [
        list(pair) for pair in zip(columns(made)["class"], columns(made)["id"], strict=True)
    ]


def test_the_seed_chooses_the_points(shard_set: ShardSet, tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 0, 1):
        made = album(shard_set, tmp_path)
        Project(methods="pca", points=20, seed=seed).draw(of_shards(shard_set), made, CPU)
        chosen.append(columns(made)["id"])
    assert chosen[0] == chosen[1] != chosen[2]


def test_images_without_labels_have_one_colour(shard_set: ShardSet, tmp_path: Path) -> None:
    made, features = album(shard_set, tmp_path), of_shards(shard_set)
    features.labels.fill_(-1)
    Project(methods="pca").draw(features, made, CPU)
    assert set(columns(made)["class"]) == {""}
    assert len(set(columns(made)["color"])) == 1


def test_too_few_images_for_a_map_are_refused() -> None:
    for settings, count, message in (
        ({"perplexity": 30}, 30, r"project\.perplexity: expected more than 30 test images to draw, found 30"),
        ({"methods": "umap", "neighbours": 20}, 20, r"project\.neighbours: expected more than 20 test images"),
        ({"perplexity": 5}, 11, r"project\.points: expected more than 11 test images"),
        ({"perplexity": 50, "points": 40}, 400, r"project\.perplexity: expected more than 50 .*, found 40"),
    ):
        with pytest.raises(UserError, match=message):
            Project(**settings).check(1000, count)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bokeh", None)  # as Python marks what cannot be imported
    with pytest.raises(UserError, match=r"bokeh is not installed; pip install 'parallax-ssl\[report\]'"):
        Project().check(100, 100)
