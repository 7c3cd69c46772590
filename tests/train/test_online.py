from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.loader import Batch
from sharding.manifest import open_shards
from tests.processes import run_ranks
from tests.train.runs import settings
from train.config import load_config
from train.engine import checkpoint
from train.engine.loop import StepDone
from train.engine.monitor import read_metrics
from train.methods import Loss
from train.online import Online, has_labels
from train.pretrain import pretrain
from train.processes.distributed import World

_CLASSES, _FEATURES, _IMAGES = 3, 8, 24


def state(done: int, rows: slice = slice(None)) -> StepDone:
    """Representations that depend on the label, with noise."""
    generator = torch.Generator().manual_seed(done)
    labels = torch.randint(_CLASSES, (_IMAGES,), generator=generator)
    h = 2 * F.one_hot(labels, _FEATURES) + 0.5 * torch.randn(_IMAGES, _FEATURES, generator=generator)
    batch = Batch(done, [], labels[rows], torch.arange(_IMAGES)[rows])
    return StepDone(done, False, batch, Loss(torch.zeros(()), {}, h=h[rows]))


def taught(world: World, steps: int = 30, log_every: int = 5) -> dict[str, Any]:
    """What it says at the log points, and its state after them."""
    online = Online(_FEATURES, _CLASSES, log_every, world)
    rows = slice(world.rank * _IMAGES // world.size, (world.rank + 1) * _IMAGES // world.size)
    said = []
    for done in range(1, steps + 1):
        online(state(done, rows))
        if done % log_every == 0:
            said.append({k: float(world.mean(v)) for k, v in online.measure(state(done, rows)).items()})
    return {"said": said, **online.state_dict()}


def test_both_learn_what_representations_tell() -> None:
    said = taught(World())["said"]
    assert "online_knn_percent" not in said[0]  # the bank was empty
    assert said[-1]["online_linear_percent"] > max(90, said[0]["online_linear_percent"])
    assert said[-1]["online_knn_percent"] > 90


def test_the_bank_takes_whole_batches_at_log_points_only() -> None:
    known = taught(World(), steps=14)
    expected = [F.layer_norm(state(done).loss.h, (_FEATURES,)) for done in (10, 5)]  # type: ignore[arg-type]
    assert torch.equal(known["_bank"], torch.cat(expected))


def test_processes_know_what_one_knows() -> None:
    expected = taught(World())
    for found in run_ranks(taught, 2):
        for name in ("_probe", "_bank", "_bank_labels"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
        assert found["said"][-1] == pytest.approx(expected["said"][-1])


def trained(shards: Path, run: Path, *more: str) -> checkpoint.State:
    assert pretrain(load_config(None, settings(shards, run, "run.log_every=2", *more)), World())
    found = checkpoint.load_latest(run)
    assert found is not None
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a) if isinstance(a, dict) else bool(a == b)


def test_training_is_the_same_without_it(shards: Path, tmp_path: Path) -> None:
    by, without = (trained(shards, tmp_path / f"run-{value}", f"run.online={value}") for value in ("true", "false"))
    assert "online" in by
    assert "online" not in without
    assert same(by["method"], without["method"])
    assert same(by["optimizer"], without["optimizer"])
    assert not any("online_linear_percent" in record for record in read_metrics(tmp_path / "run-false"))


def test_a_resumed_run_goes_on_with_what_it_knew(shards: Path, tmp_path: Path) -> None:
    whole = trained(shards, tmp_path / "whole")
    trained(shards, tmp_path / "parts")
    for path in checkpoint.checkpoints(tmp_path / "parts")[1:]:
        path.unlink()  # as if it had been killed after the first one
    assert same(trained(shards, tmp_path / "parts")["online"], whole["online"])
    first, second = (read_metrics(tmp_path / name)[-1] for name in ("whole", "parts"))
    assert first["online_knn_percent"] == second["online_knn_percent"]
    assert first["online_linear_percent"] == second["online_linear_percent"]


def test_images_need_labels(shards: Path) -> None:
    opened = open_shards(str(shards))
    assert has_labels(opened)
    label = opened.index.label.copy()
    label[3] = -1
    assert not has_labels(replace(opened, index=replace(opened.index, label=label)))
