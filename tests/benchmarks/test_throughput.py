import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.throughput import main
from sharding.manifest import ShardSet

QUICK = ["--size", "32", "--batch-size", "8", "--rounds", "2", "--seconds", "0.05", "--threads", "1"]


def test_compares_backends_and_peers_and_saves_every_round(
    shard_set: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    contestants = ["--backends", "cpu", "synthetic", "--peers", "decode-only", "dali-native"]
    assert main(["--shards", str(shard_set.root), *QUICK, *contestants, "--out", str(out)]) == 0
    loader = json.loads(out.read_text())["results"]["loader"]
    assert list(loader) == ["decode-only, 1 thread", "dali-native, 1 thread", "cpu, 1 thread", "synthetic, 1 thread"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in loader.values())
    assert "92 samples" in capsys.readouterr().out


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads wait for each other at length where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_times_the_train_step_and_says_what_bounds_it(shard_set: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shards", str(shard_set.root), *QUICK, "--backends", "cpu", "--step", "resnet18"]) == 0
    printed = capsys.readouterr().out
    assert "train step: SimCLR, resnet18" in printed
    assert "cpu: bound by the" in printed
    assert "synthetic: bound by the" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shards", "/nowhere"], "/nowhere: no such directory"),
        (["--shards", "memory://nowhere"], "memory://nowhere: no such directory"),
        (["--batch-size", "6"], "multiple of the 4 lanes"),
        (["--rounds", "0"], "--rounds >= 1"),
        (["--seconds", "0"], "--seconds > 0"),
        (["--size", "8"], "views.0: kernel: half of 23"),
    ],
    ids=["shards", "url", "batch", "rounds", "seconds", "size"],
)
def test_wrong_arguments_are_one_clear_message(
    shard_set: ShardSet, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["--shards", str(shard_set.root), *QUICK, "--backends", "cpu", *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.throughput: ")
    assert message in error
