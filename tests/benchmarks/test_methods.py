import json
from pathlib import Path

import pytest

from benchmarks.methods import main
from sharding.build import main as build_shards
from sharding.demo import load_demo
from train.config import load_config
from train.methods import METHODS

ROOT = Path(__file__).parent.parent.parent
_TINY = ["optim.steps=3", "run.global_batch_size=24", "encoder.width=8", "run.log_every=1", "data.num_threads=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 96), ("test", 40)):
        load_demo(split, num_images=count).to_parquet(folder / "images" / split / "train-00000-of-00001.parquet")
        arguments = ["--dataset", str(folder / "images" / split), "--out", str(folder / split)]
        assert build_shards([*arguments, "--lanes", "4", "--workers", "1"]) == 0
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_demo_recipe(method: str) -> None:
    config = load_config(ROOT / "configs" / f"demo-{method}.yaml")
    assert config.method.name == method
    assert (config.optim.name, config.run.global_batch_size) == ("adamw", 128)


def test_a_row_says_what_a_method_was_worth(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.jsonl"
    options = ["--methods", "simclr", "--seeds", "3", "--data", str(data), "--runs", str(tmp_path), "--out", str(out)]
    assert main([*_TINY, *options]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["method"], row["seed"], row["steps"]) == ("simclr", 3, 3)
    assert "run.seed=3" in row["command"]
    assert row["accuracy_percent"].keys() == {"pretrained", "untrained"}
    assert row["peak_memory_mib"] > 100
    assert row["images_per_second"] > 0
    assert row["rankme"] > 1
    assert "commit" in row["environment"]
    assert "simclr" in capfd.readouterr().out


def test_a_run_that_fails_is_named(data: Path, tmp_path: Path) -> None:
    options = ["--methods", "mocov2", "--data", str(data), "--runs", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(["run.global_batch_size=7", *options]) == 2
    assert not (tmp_path / "x").exists()


def test_distill_has_the_simclr_of_its_runs_and_seed_and_what_is_done_is_shown(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, where = tmp_path / "x", ["--data", str(data), "--runs", str(tmp_path), "--seeds", "3"]
    narrow = "method.teacher={name: resnet18, width: 8}"
    assert main([*_TINY, "method.loss=ntxent", "--methods", "simclr", "mocov2", *where, "--out", str(out)]) == 2
    assert "accuracies" in capfd.readouterr().out, "of simclr, although mocov2 has no method.loss"
    assert main([*_TINY, narrow, "--methods", "distill", *where, "--out", str(out)]) == 0
    assert f"method.weights={tmp_path}/simclr-3" in json.loads(out.read_text().splitlines()[-1])["command"]
