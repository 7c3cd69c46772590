import json
import math
from pathlib import Path

import pytest

from benchmarks import batch_size
from benchmarks.batch_size import main, reached
from sharding.manifest import ShardSet
from train.engine.monitor import read_metrics

_TINY = ["views.size=32", "views.kernel=7", "encoder.width=8"]
_TINY += ["data.num_threads=1", "optim.warmup_epochs=0", "run.precision=fp32"]


def test_the_target_is_reached_by_the_mean_of_the_last_images() -> None:
    accuracies = [None, 10, 50, 10, 30, 40, 60]
    records = [
        {"step": step, "images_per_second": 512.0, **({} if a is None else {"online_knn_percent": a})}
        for step, a in enumerate(accuracies, 1)
    ]
    assert reached(records, 1024, 0.1, 35) == (6, 12.0, 0.1), "the last two: 40 and 30"
    assert reached(records, 1024, 0.1, 50) == (7, 14.0, 0.1)
    assert reached(records, 4096, 0.1, 45) == (3, 24.0, 0.1), "a batch of more is looked at alone"
    assert reached(records, 1024, 0.1, 51) is None


def test_the_table_has_measured_and_predicted_steps(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(batch_size, "_WINDOW", 8)
    out = tmp_path / "steps.jsonl"
    options = [
        "--config",
        "configs/demo-supervised.yaml",
        "--batches",
        "8",
        "4",
        "--rates",
        "0.001",
        "--target",
        "1",
        "--images",
        "48",
    ]
    options += ["--runs", str(tmp_path / "runs"), "--out", str(out)]
    assert main([*_TINY, f"data.shards={shard_set.root}", *options]) == 0
    head, noise, four, eight = (json.loads(line) for line in out.read_text().splitlines())
    assert "commit" in head["environment"]
    assert (four["batch"], eight["batch"], four["rate"]) == (4, 8, 0.001)
    records = read_metrics(tmp_path / "runs" / "4-0.001")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[-1]["learning_rate"] == pytest.approx(0.001)
    assert four["steps"] == reached(records, 4, 0.001, 1)[0]  # type: ignore[index]
    assert out.with_suffix(".png").stat().st_size > 1000
    factors = [1 + noise["noise_scale"] / batch for batch in (4, 8)]
    least = math.sqrt(four["steps"] / factors[0] * eight["steps"] / factors[1])
    assert f"│ {round(least * factors[0]):>9} │" in capsys.readouterr().out


def test_a_target_that_no_run_reaches_is_named(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--batches", "8", "--rates", "0.001", "--images", "16", "--runs", str(tmp_path)]
    assert main([*_TINY, f"data.shards={shard_set.root}", *options]) == 2
    assert "--target 40.0: no run has reached it; lower it, or raise --images" in capsys.readouterr().err
