"""`python -m train.evaluate` on checkpoints of a small encoder: what it records, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from pipeline.views import preset
from sharding.build import main as build_shards
from sharding.command import UserError
from sharding.demo import load_demo
from sharding.manifest import ShardSet
from tests.processes import ends_of_ranks
from train.config import load_config
from train.engine import checkpoint
from train.evaluate.__main__ import choose_pairs, main
from train.evaluate.data import choose_images, evaluation_view
from train.evaluate.pictures import Album
from train.methods import build_method
from train.processes.distributed import World
from train.report import evaluated, read_runs


def save(
    run: Path, shards: ShardSet, step: int, change: Callable[[torch.Tensor], object] = torch.Tensor.detach
) -> None:
    overrides = ["encoder=resnet18", "encoder.width=8", "views.size=32", "views.kernel=5"]
    config = load_config(None, [*overrides, f"data.shards={shards.root}"])
    torch.manual_seed(step)
    method = build_method(config.method, config.encoder, World())
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            change(parameter)
    run.mkdir(exist_ok=True)
    plain = {"step": step, "config": config.model_dump(mode="json"), "identity": {}, "optimizer": {}}
    torch.save({**plain, "method": method.state_dict()}, run / f"step-{step:09d}.pt")


@pytest.fixture
def run(tmp_path: Path, shard_set: ShardSet) -> Path:
    save(tmp_path / "run", shard_set, 1)
    return tmp_path / "run"


def demo_shards(root: Path, *, labels: list[int] | None, split: str = "test") -> Path:
    """48 generated images: those of some labels, or without any label."""
    images = load_demo(split, num_images=48)
    kept = images.remove_columns("label") if labels is None else images.filter(lambda row: row["label"] in labels)
    kept.to_parquet(root / "images" / f"{split}-00000-of-00001.parquet")
    arguments = ["--dataset", str(root / "images"), "--split", split, "--out", str(root / "out"), "--lanes", "1"]
    assert build_shards([*arguments, "--workers", "1"]) == 0
    return root / "out"


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_every_evaluation_is_recorded_with_all_that_it_depends_on(run: Path, shard_set: ShardSet) -> None:
    assert main(["--checkpoint", str(run), "knn.k=5", "knn.temperature=0.1", "--untrained"]) == 0
    assert main(["--checkpoint", str(run), "--protocol", "linear", "linear.weight_decay=0.5"]) == 0
    first, second = records(run)
    assert first["settings"]["knn"] == {"preset": None, "k": [5], "temperature": [0.1]}
    assert second["settings"] == {"linear": {"weight_decay": [0.5], "iterations": 200}}
    assert set(first["results"]) == {"pretrained", "untrained"}
    assert set(first["results"]["untrained"]) == {"knn", "linear"}
    assert (first["step"], first["held_out"]) == (1, True)
    for part, count in (("train", 73), ("test", 19)):
        expected = {"shards": str(shard_set.directory), "fingerprint": shard_set.manifest.fingerprint}
        assert first[part] == {**expected, "num_images": count}


def test_several_data_sets_at_once_have_the_results_of_each_alone(
    run: Path, shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each by its own view, beside each other in TensorBoard and in the report."""
    own, other = str(shard_set.root), str(demo_shards(tmp_path / "other", labels=list(range(10))))
    protocols = ["--protocol", "knn", "cluster", "knn.k=5"]
    assert main(["--checkpoint", str(run), "--train", own, "--train", other, *protocols]) == 0
    assert capsys.readouterr().out.count("top-1 %") == 2, "a table each"
    tags = EventAccumulator(str(run / "tensorboard" / "evaluation")).Reload().Tags()["scalars"]
    named = {tag for tag in tags if "NMI" in tag}
    assert named == {f"pretrained/cluster/NMI percent {shards}" for shards in (own, other)}
    assert main(["--checkpoint", str(run), *protocols]) == 0
    assert main(["--checkpoint", str(run), "--train", other, *protocols]) == 0
    first, second, *alone = records(run)
    assert [{**record, "time": ""} for record in (first, second)] == [{**record, "time": ""} for record in alone]
    assert (first["train"]["num_images"], second["train"]["num_images"]) == (73, 38)
    assert first["results"] != second["results"]
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    shown = [row["record"]["test"]["shards"] for row in evaluated(read_runs([run])) if row["name"] == "NMI %"]
    assert shown == [own, other, own, other]


def test_sets_to_train_and_to_test_on_stand_at_the_same_place() -> None:
    assert choose_pairs(["a"], [None]) == [("a", None)]
    assert choose_pairs(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    assert choose_pairs(["a"], ["x", "y", "z"]) == [("a", "x"), ("a", "y"), ("a", "z")]
    assert choose_pairs(["a", "b"], [None]) == [("a", None), ("b", None)]
    with pytest.raises(UserError, match="--train, --test: expected as many of each, or one, found 3 and 2"):
        choose_pairs(["a", "b", "c"], ["x", "y"])


ALL = ["knn", "linear", "retrieve", "cluster", "health", "project"]
FEW = ["knn.k=5", "project.perplexity=5"]


def pictures_of(run: Path) -> list[bytes]:
    return [(run / "pictures" / "pretrained" / name).read_bytes() for name in ("map.json", "neighbours.png")]


def test_three_processes_have_the_results_of_one(run: Path, tmp_path: Path) -> None:
    """Also where the representations are made anew; and its pictures."""
    assert main(["--checkpoint", str(run), "--protocol", *ALL, *FEW, "--features", str(tmp_path / "alone")]) == 0
    pictures = pictures_of(run)
    ends = ends_of_ranks(main, 3, tmp_path, ["--checkpoint", str(run), "--protocol", *ALL, *FEW])
    assert [code for code, _ in ends] == [0, 0, 0], ends
    assert [said.count("recall@10") for _, said in ends] == [1, 0, 0], "one table"
    alone, many = (record["results"]["pretrained"] for record in records(run))
    assert list(alone) == ALL
    assert pictures_of(run) == pictures
    for protocol, values in alone.items():
        assert many[protocol] == pytest.approx(values, abs=0.01), protocol


def test_settings_must_belong_to_something(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in {
        ("--protocol", "knn", "linear.iterations=5"): "linear is not among the protocols knn",
        ("--protocol", "kn"): "expected some of knn, linear",
        ("knn.k=0",): "knn.k.0: Input should be greater than or equal to 1, found 0",
        ("knn.kk=5",): "knn.kk: Extra inputs are not permitted, found 5 (settings of knn: preset, k, temperature)",
        ("encoder.width=64",): "encoder.width=64: expected settings of data, views or protocols",
        ("data.num_thread=1",): "did you mean 'num_threads'?",
    }.items():
        assert message in refusal(capsys, run, *words)


def test_protocols_that_need_no_labels_take_unlabelled_images(tmp_path: Path) -> None:
    unlabelled = str(demo_shards(tmp_path / "unlabelled", labels=None))
    found = choose_images(unlabelled, None, labelled=False)
    assert [len(images.ids) for images in found] == [38, 10]


def test_a_damaged_newest_checkpoint_is_passed_over(run: Path, shard_set: ShardSet) -> None:
    save(run, shard_set, 2)
    newest = checkpoint.checkpoints(run)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    assert main(["--checkpoint", str(run), "knn.k=5"]) == 0
    assert [record["step"] for record in records(run)] == [1]


def refusal(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> str:
    assert main(["--checkpoint", str(run), *(arguments or ["knn.k=5"])]) == 2
    assert not (run / "evaluation.jsonl").exists()
    return capsys.readouterr().err


def test_meaningless_images_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(demo_shards(tmp_path / "other", labels=list(range(10))))
    error = refusal(capsys, run, "--test", other)
    assert f"--test {other}: expected the 3 classes of" in error
    assert "(disc, stripes, checks), found 10 classes" in error
    unlabelled = str(demo_shards(tmp_path / "unlabelled", labels=None))
    assert "without a label" in refusal(capsys, run, "--train", unlabelled)
    single = str(demo_shards(tmp_path / "single", labels=[3], split="train"))
    error = refusal(capsys, run, "--train", single, "--test", other)
    assert "expected labelled images of 2 classes or more, found 0 of 5 without a label" in error


def test_too_many_neighbours_or_clusters_are_refused_before_any_work(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for protocol, setting, message in (
        ("knn", "knn.k=74", "knn.k: expected at most 73 neighbours"),
        ("retrieve", "retrieve.k=19", "retrieve.k: expected at most 18 neighbours"),
        ("cluster", "cluster.clusters=20", "cluster.clusters: expected at most the 19 test images"),
    ):
        assert message in refusal(capsys, run, "--protocol", protocol, setting)
    assert not (run / "features").exists()


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "are NaN or infinite"), (0.0, "all images have the same representation")]
)
def test_broken_encoders_are_refused(
    shard_set: ShardSet, tmp_path: Path, value: float, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, shard_set, 1, lambda parameter: parameter.fill_(value))
    assert message in refusal(capsys, tmp_path)


def test_an_undecodable_image_is_left_out_and_named(
    run: Path, damage: Callable[[int], ShardSet], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = damage(17)
    arguments = ["--checkpoint", str(run), "--train", str(shards.root), "--protocol", "knn", "knn.k=5"]
    assert main(arguments) == 0
    assert [record.message.split(" (")[0] for record in caplog.records] == ["left out sample 17"]
    caplog.clear()
    assert main(arguments) == 0
    assert "left out, as they could not be decoded: samples [17]" in caplog.text
    assert "\n\n" not in capsys.readouterr().err, "progress bars leave nothing where no terminal is looking"
    rest = np.arange(len(shards.index)) % 5 != 0
    for record in records(run):
        assert record["train"]["num_images"] == rest.sum() - 1
        assert record["test"]["num_images"] == (~rest).sum()


def test_a_thumbnail_of_an_undecodable_image_is_black(damage: Callable[[int], ShardSet], tmp_path: Path) -> None:
    shards = damage(17)
    album = Album(tmp_path, "pretrained", 1, shards, {"backend": "cpu"})
    tiles = album.thumbnails(torch.tensor([18, 17, 16, 18]), 16)
    assert [bool(tile.any()) for tile in tiles] == [True, False, True, True]
    assert (tiles[0] == tiles[3]).all()


def test_small_images_are_evaluated_whole(shard_set: ShardSet) -> None:
    for size, resize in ((32, 37), (224, 224)):  # the images' short sides are 60 to 139 pixels
        view = evaluation_view(preset("simclr", size=size, kernel=5), shard_set)
        assert (view.size, view.resize, view.crop) == (size, resize, "center")


def test_images_are_resized_for_evaluation_as_for_training(shard_set: ShardSet) -> None:
    for name, interpolation in (("simclr", "bilinear"), ("mae", "bicubic")):
        assert evaluation_view(preset(name), shard_set).interpolation == interpolation
