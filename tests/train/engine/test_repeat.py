"""A step done twice: see also tests/train/test_verify.py, where a fault on one of two ranks is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.engine.test_step import draws, small_run, views
from tests.train.runs import settings
from train.config import load_config
from train.engine.checkpoint import checkpoints
from train.engine.monitor import read_metrics
from train.engine.repeat import StepDiffersError
from train.methods import METHODS
from train.methods.simclr import SimCLR
from train.pretrain import pretrain
from train.processes.distributed import World


class Drifts(nn.Module):
    """Another value at each call: in the forward pass, or in the gradient alone."""

    def __init__(self, in_forward: bool) -> None:
        super().__init__()
        self.in_forward, self.calls = in_forward, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        factor = 1 + 1e-3 * self.calls
        if self.in_forward:
            return x * factor
        y = x * 1
        y.register_hook(lambda gradient: gradient * factor)
        return y


@pytest.mark.parametrize(
    ("in_forward", "named"),
    [
        (True, r"step 5, done twice .* first the output of encoder\.1, on rank 0; no update"),
        (False, r"step 5, done twice .* first the gradient of encoder\.0\.backbone\.\S+, on rank 0; no update"),
    ],
)
def test_what_differs_first_is_named_before_the_update(in_forward: bool, named: str) -> None:
    method: Any
    method, step = small_run("sgd")
    method.encoder = nn.Sequential(method.encoder, Drifts(in_forward))
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    with pytest.raises(StepDiffersError, match=named):
        step(views(0), draws(4), 0.1, 0.1, twice=World())
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())


def test_a_run_with_replays_is_the_run_without(shards: Path, tmp_path: Path) -> None:
    losses = []
    for every in (0, 2):
        run = tmp_path / str(every)
        more = ["method.name=mocov2", "optim.steps=3", "method.queue=32", "run.micro_batch_size=12"]
        arguments = [a for a in settings(shards, run, *more) if "temperature" not in a]
        assert pretrain(load_config(None, [*arguments, f"run.replay_every={every}"]), World())
        losses.append([record["loss"] for record in read_metrics(run)])
    assert losses[0] == losses[1]


class Drifting(SimCLR):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.projector.append(Drifts(True))


def test_a_run_ends_at_a_replay_that_differs(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "simclr", f"{__name__}:Drifting")
    assert pretrain(load_config(None, settings(shards, tmp_path / "unnoticed")), World())
    with pytest.raises(StepDiffersError, match=r"step 1, .* first the output of projector\.\d+, on rank 0"):
        pretrain(load_config(None, settings(shards, tmp_path / "run", "run.replay_every=4")), World())
    assert not checkpoints(tmp_path / "run")
