import json
from pathlib import Path

import pytest

from benchmarks.training import main
from sharding.manifest import ShardSet
from tests.benchmarks.test_scaling import SMALL


def test_the_step_is_measured_beside_a_plain_loop(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    arguments = ["--shards", str(shard_set.root), "--rounds", "2", "--seconds", "0.01", "--out", str(out)]
    assert main([*SMALL, "method.name=supcon", "optim.name=sgd", *arguments]) == 0
    head, ours, plain = (json.loads(line) for line in out.read_text().splitlines())
    assert "commit" in head["environment"]
    assert (ours["contestant"], plain["contestant"]) == ("ours", "plain")
    assert min(*ours["images_per_second"], *plain["images_per_second"]) > 0
    assert 0.9 < ours["peak_mib"][0] / plain["peak_mib"][0] < 1.1, "they keep the same activations"
    assert plain["peak_mib"][0] > 1
    printed = capsys.readouterr().out
    assert "left out lightly" in printed
    assert "the step alone: supcon, resnet18, batches of 8" in printed
