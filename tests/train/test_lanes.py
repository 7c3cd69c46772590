"""Lanes on the nodes' own disks: a process needs the shards that it reads, and no others."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from sharding.manifest import ShardSet
from tests.processes import run_ranks
from train.config import load_config
from train.engine.checkpoint import checkpoints
from train.pretrain import pretrain
from train.processes.distributed import World

_SMALL = [
    "data.shards=shards",  # the same path on every node
    "data.num_threads=1",
    "views.size=32",
    "views.kernel=5",
    "encoder.name=resnet18",
    "encoder.width=8",
    "method.hidden=32",
    "method.out=16",
    "optim.steps=3",
    "run.global_batch_size=24",
]


def pretrain_on_node(world: World, nodes: list[str], run: str) -> None:
    os.chdir(nodes[world.rank])
    pretrain(load_config(None, [*_SMALL, f"run.dir={run}"]), world)


def node(shards: ShardSet, root: Path, lanes: list[int]) -> str:
    """A directory with ``shards``, of which it has these lanes only."""
    absent = {f"lane-{lane:02}" for lane in range(4)} - {f"lane-{lane:02}" for lane in lanes}
    shutil.copytree(shards.root, root / "shards", ignore=lambda _, names: absent & set(names))
    return str(root)


def weights(run: Path) -> dict[str, torch.Tensor]:
    (path,) = checkpoints(run)
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["method"]
    return state


def test_half_of_the_lanes_on_each_node_gives_the_same_weights(shard_set: ShardSet, tmp_path: Path) -> None:
    whole = node(shard_set, tmp_path / "whole", [0, 1, 2, 3])
    halves = [node(shard_set, tmp_path / "0", [0, 1]), node(shard_set, tmp_path / "1", [2, 3])]
    run_ranks(pretrain_on_node, 2, [whole, whole], str(tmp_path / "run-whole"))
    run_ranks(pretrain_on_node, 2, halves, str(tmp_path / "run-halves"))
    expected, found = weights(tmp_path / "run-whole"), weights(tmp_path / "run-halves")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_lane_that_a_process_needs_is_named(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(node(shard_set, tmp_path / "node", [0, 1, 2]))
    with pytest.raises(ValueError, match=r"lane-03/train-000000.tar: .*missing \(this process reads lanes 2, 3\)"):
        pretrain(load_config(None, [*_SMALL, f"run.dir={tmp_path / 'run'}"]), World(rank=1, size=2))
