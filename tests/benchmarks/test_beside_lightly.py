import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.beside_lightly import METHODS, SIDES, VIEWS, _batches, main
from sharding.build import main as build_shards
from sharding.command import UserError
from sharding.demo import load_demo
from sharding.manifest import ShardSet
from train.config import load_config
from train.engine.checkpoint import load

ROOT = Path(__file__).parent.parent.parent
_WITH_LIGHTLY = pytest.mark.skipif(find_spec("lightly") is None, reason="lightly is not installed")


def row(method: str, seed: int, side: str, knn: float) -> dict[str, object]:
    accuracies = {"pretrained": {"knn": knn, "linear": knn + 5}, "untrained": {"knn": 20.0, "linear": 21.0}}
    return {"method": method, "seed": seed, "side": side, "accuracy_percent": accuracies}


def test_what_is_there_is_shown_seed_by_seed_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    found = {"ours": (40.0, 44.0, 42.0), "lightly": (39.0, 42.5, 41.5)}
    lines = [row("barlow", seed, side, values[seed]) for side, values in found.items() for seed in range(3)]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--methods", "barlow", "--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main(options) == 0
    table = capsys.readouterr().out
    assert "42.0 (sd 2.0)" in table
    assert "+1.0 ± 1.2" in table, "of the differences 1, 1.5 and 0.5: t = 4.303, sd = 0.5"
    assert len(out.read_text().splitlines()) == 6
    assert not (tmp_path / "runs").exists()


def test_a_line_that_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text('{"method": "simclr"}\n')
    assert main(["--out", str(out), "--runs", str(tmp_path / "runs")]) == 2
    assert "line 1: not a whole record; passed over; remove it" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_the_recipes_differ_in_the_method_alone(method: str) -> None:
    config, other = (load_config(ROOT / "configs" / f"cifar10-narrow-{name}.yaml") for name in (method, METHODS[0]))
    assert config.method.name == method
    for section in ("data", "views", "encoder", "optim"):
        assert getattr(config, section) == getattr(other, section), section


@_WITH_LIGHTLY
def test_lightly_has_the_settings_of_our_views(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    transforms, made = importlib.import_module("lightly.transforms"), []

    class Kept(transforms.SimCLRTransform):  # type: ignore[name-defined]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(transforms, "SimCLRTransform", Kept)
    config = load_config(None, [f"views={VIEWS}", "run.global_batch_size=4"])
    next(_batches(config, shard_set))
    view, steps = config.views[0], {type(step).__name__: step for step in made[0].transforms[0].transform.transforms}
    jitter = steps["RandomApply"].transforms[0]
    assert steps["RandomResizedCrop"].scale == view.scale
    for name in ("brightness", "contrast", "saturation"):
        assert getattr(jitter, name) == (1 - getattr(view, name), 1 + getattr(view, name)), name
    assert (jitter.hue, steps["RandomApply"].p) == ((-view.hue, view.hue), view.jitter)
    assert (steps["RandomHorizontalFlip"].p, steps["RandomVerticalFlip"].p) == (view.flip, 0)
    assert (steps["RandomGrayscale"].p, steps["GaussianBlur"].prob) == (view.grey, view.blur)
    assert tuple(steps["Normalize"].mean) == view.mean


@_WITH_LIGHTLY
def test_other_views_are_refused(shard_set: ShardSet) -> None:
    with pytest.raises(UserError, match="expected the preset simclr-cifar"):
        next(_batches(load_config(None, ["views=byol"]), shard_set))


def test_it_looks_for_test_images_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_demo("train", num_images=96).to_parquet(tmp_path / "images" / "train-00000-of-00001.parquet")
    arguments = ["--dataset", str(tmp_path / "images"), "--out", str(tmp_path / "train"), "--lanes", "4"]
    assert build_shards([*arguments, "--workers", "1"]) == 0
    options = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "x")]
    assert main(["optim.steps=1", "data.num_threads=1", "run.global_batch_size=24", *options]) == 2
    assert f"{tmp_path}/test" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@_WITH_LIGHTLY
def test_both_sides_are_trained_and_evaluated_alike(tmp_path: Path) -> None:
    for split, count in (("train", 96), ("test", 40)):
        load_demo(split, num_images=count).to_parquet(tmp_path / "images" / split / "train-00000-of-00001.parquet")
        arguments = ["--dataset", str(tmp_path / "images" / split), "--out", str(tmp_path / split), "--lanes", "4"]
        assert build_shards([*arguments, "--workers", "1"]) == 0
    out = tmp_path / "results.jsonl"
    options = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(out), "--methods", "simclr"]
    assert main(["optim.steps=2", "data.num_threads=1", "run.global_batch_size=24", *options, "--seeds", "5"]) == 0
    rows = {line["side"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert rows.keys() == set(SIDES)
    assert rows["ours"]["steps"] == rows["lightly"]["steps"] == 2
    assert rows["ours"]["accuracy_percent"]["untrained"] == rows["lightly"]["accuracy_percent"]["untrained"]
    ours, theirs = (load(tmp_path / "runs" / f"simclr-5-{side}" / "step-000000002.pt")["method"] for side in SIDES)
    assert ours.keys() == theirs.keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "batches are not in the same order"
