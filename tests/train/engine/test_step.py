from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sharding.command import UserError
from tests.processes import run_ranks
from tests.train.engine.test_gradcache import Separate, batch
from train.engine.step import TrainStep
from train.methods import build_method
from train.methods.simclr import SimCLR, SimCLRConfig
from train.model.draws import Draws
from train.model.encoder import EncoderConfig
from train.optim.optimizers import OptimConfig, build_optimizer
from train.processes.distributed import World


def small_run(optimizer: str) -> tuple[SimCLR, TrainStep]:
    torch.manual_seed(0)
    config = SimCLRConfig(hidden=32, out=16, layers=2)
    method: Any = build_method(config, EncoderConfig(name="resnet18", width=8), World())
    optim = build_optimizer(OptimConfig(name=optimizer), method)
    return method, TrainStep(method, method, optim, torch.float32)


def draws(step: int = 0) -> Draws:
    return Draws(0, step, torch.arange(8))


def views(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_repeated_steps_on_one_batch_lower_the_loss(optimizer: str) -> None:
    _, step = small_run(optimizer)
    rate = {"lars": 2.0, "sgd": 0.1, "adamw": 0.003}[optimizer]
    losses = [step(views(0), draws(), rate, 0.5)[0].item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    step.check(Path("runs/x"), World())


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
def test_non_finite_gradient_stops_all_further_updates(optimizer: str, tmp_path: Path) -> None:
    method, step = small_run(optimizer)
    step(views(0), draws(), 0.1, 0.1)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    poisoned = views(1)
    poisoned[0][0, 0, 0, 0] = float("nan")
    step(poisoned, draws(4), 0.1, 0.2)
    step(views(2), draws(5), 0.1, 0.3)
    for name, p in method.named_parameters():
        assert torch.equal(p, before[name]), name
    with pytest.raises(UserError, match=r"at step 5; no update .* ranks \[0\]; no checkpoint is in"):
        step.check(tmp_path, World())
    (tmp_path / "step-000000003.pt").touch()
    with pytest.raises(UserError, match=r"continue from .*step-000000003\.pt with a lower"):
        step.check(tmp_path, World())


def poisoned_on_rank_1(world: World, averaged: bool, place: str) -> list[str]:
    """What all ranks say, a few steps later, of a value that is not finite: in an image, or in a gradient alone."""
    torch.manual_seed(0)
    method: Any
    method, said = Separate(world).double(), ""
    optimizer = build_optimizer(OptimConfig(name="sgd"), method)
    step = TrainStep(method, world.wrap(method) if averaged else method, optimizer, torch.float64)
    for number in range(4):
        views, made, _ = batch(world)
        if (world.rank, number) == (1, 2):
            if place == "image":
                views[1][0, 0, 0, 0] = torch.nan
            else:
                method.projector[0].weight.register_hook(lambda gradient: gradient * torch.nan)
        step(views, replace(made, step=number), 0.1, 0.5)
    try:
        step.check(Path("runs/x"), world)
    except UserError as error:
        said = str(error)
    return [said]


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize(("place", "where"), [("image", "ranks [1]"), ("gradient", "no rank")])
def test_all_ranks_are_told_the_step_and_whose_embeddings_were_not_finite(
    averaged: bool, place: str, where: str
) -> None:
    """Also where gradients stay on a rank, as those of post-local SGD."""
    for (said,) in run_ranks(poisoned_on_rank_1, 2, averaged, place):
        assert f"at step 3; no update was made since; embeddings did so on {where};" in said


@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16])
def test_short_floats_stay_close_to_float32(short: torch.dtype) -> None:
    losses = []
    for dtype in (torch.float32, short):
        method, step = small_run("sgd")
        step = TrainStep(method, method, step._optimizer, dtype)
        losses.append(step(views(0), draws(), 0.01, 0.1)[0].item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def in_float16(init_scale: float) -> tuple[SimCLR, TrainStep]:
    method, step = small_run("lars")
    step = TrainStep(method, method, step._optimizer, torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
    return method, step


def test_float16_refuses_an_update_halves_the_scale_and_goes_on() -> None:
    method, step = in_float16(2.0**22)
    seen = []
    for number in range(20):
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        loss = step(views(number), draws(number), 0.1, 0.1)
        changed = any(not torch.equal(p, before[name]) for name, p in method.named_parameters())
        assert changed != bool(loss.metrics["refused"]), f"update {number}"
        assert (loss.metrics["gradient_norm"] > 0) == changed, "0 where there is none"
        seen.append((changed, loss.metrics["loss_scale"].item()))
    step.check(Path("runs/x"), World())
    accepted = [changed for changed, _ in seen].index(True)
    assert [scale for _, scale in seen[:accepted]] == [2.0 ** (21 - n) for n in range(accepted)]
    assert seen[accepted + 1] == (True, 2 * seen[accepted][1]), "and grows after two"
    assert [changed for changed, _ in seen].count(False) > accepted, "until it is too large again"


def test_float16_stops_at_a_gradient_that_no_scale_makes_finite() -> None:
    method, step = in_float16(2.0**16)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    poisoned = views(1)
    poisoned[0][0, 0, 0, 0] = float("nan")
    for number in range(25):
        step.check(Path("runs/x"), World())
        step(poisoned, draws(number), 0.1, 0.1)
    step(views(2), draws(25), 0.1, 0.1)
    with pytest.raises(UserError, match="at step 25; no update"):
        step.check(Path("runs/x"), World())
    assert all(torch.equal(p, before[name]) for name, p in method.named_parameters())


def test_clipping_bounds_the_norm_of_the_update() -> None:
    changes = {}
    for clip_norm in (None, 1e-3):
        method, step = small_run("sgd")
        step = TrainStep(method, method, step._optimizer, torch.float32, clip_norm=clip_norm)
        before = torch.cat([p.detach().flatten() for p in method.parameters()])
        loss = step(views(0), draws(), 1.0, 0.1)
        after = torch.cat([p.detach().flatten() for p in method.parameters()])
        changes[clip_norm] = (float((after - before).norm()), float(loss.metrics["gradient_norm"]))
    assert changes[None][0] == pytest.approx(changes[None][1], rel=0.01)
    assert changes[1e-3][0] == pytest.approx(1e-3, rel=0.01)
    assert changes[1e-3][1] == changes[None][1], "what is logged is the norm before clipping"


def test_excluded_parameters_have_their_own_rate() -> None:
    changes = {}
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        method: Any = build_method(SimCLRConfig(hidden=32, out=16), EncoderConfig(name="resnet18", width=8), World())
        optimizer = build_optimizer(OptimConfig(name="sgd", excluded_rate=scale), method)
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        TrainStep(method, method, optimizer, torch.float32)(views(0), draws(), 0.1, 0.1)
        changes[scale] = {name: p.detach() - before[name] for name, p in method.named_parameters()}
    for name, change in changes[1.0].items():
        torch.testing.assert_close(changes[0.25][name], change * (0.25 if change.ndim <= 1 else 1.0))
