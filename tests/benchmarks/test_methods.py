import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def where(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    runs = tmp_path_factory.mktemp("runs")
    return ["--data", str(data), "--runs", str(runs), "--seeds", "3", "--out", str(runs / "results.jsonl")]


@pytest.fixture(scope="module")
def simclr(where: list[str]) -> tuple[dict[str, Any], str, str]:
    """The row of a run, after which one of a different method fails; what was printed, and said of the failure."""
    with redirect_stdout(io.StringIO()) as printed, redirect_stderr(io.StringIO()) as said:
        assert main([*_TINY, "method.loss=ntxent", "--methods", "simclr", "mocov2", *where]) == 2
    (row,) = rows(where)
    return row, printed.getvalue(), said.getvalue()


def rows(where: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(where[-1]).read_text().splitlines()]


def test_a_row_says_what_a_method_was_worth(simclr: tuple[dict[str, Any], str, str]) -> None:
    row, printed, _ = simclr
    assert (row["method"], row["seed"], row["steps"]) == ("simclr", 3, 3)
    assert "run.seed=3" in row["command"]
    assert row["accuracy_percent"].keys() == {"pretrained", "untrained"}
    assert row["peak_memory_mib"] > 100
    assert row["images_per_second"] > 0
    assert row["rankme"] > 1
    assert "commit" in row["environment"]
    assert "simclr" in printed


def test_a_run_that_fails_is_named_after_what_is_done(simclr: tuple[dict[str, Any], str, str]) -> None:
    _, printed, said = simclr
    assert "accuracies" in printed, "of simclr, although mocov2 has no method.loss"
    assert "demo-mocov2.yaml" in said


@pytest.mark.usefixtures("at_once")
def test_without_a_finished_run_there_is_no_file(data: Path, tmp_path: Path) -> None:
    options = ["--methods", "mocov2", "--data", str(data), "--runs", str(tmp_path), "--out", str(tmp_path / "x")]
    assert main(["run.global_batch_size=7", *options]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("at_once")
def test_distill_has_the_simclr_of_its_runs_and_seed(where: list[str], simclr: object) -> None:  # noqa: ARG001
    narrow = "method.teacher={name: resnet18, width: 8}"
    assert main([*_TINY, narrow, "--methods", "distill", *where]) == 0
    assert f"method.weights={where[3]}/simclr-3" in rows(where)[-1]["command"]
