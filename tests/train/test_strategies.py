"""Runs whose processes work together in different ways: killed and continued they are the same, to the bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from tests.train.runs import settings_of
from train.config import Config, load_config
from train.engine.checkpoint import checkpoints, load, step_of
from train.optim.optimizers import acting
from train.pretrain import build, optimizer_of, pretrain
from train.processes.distributed import World
from train.processes.fsdp import local

STRATEGIES = {
    "powersgd": ("simclr", ["run.gradient_compression=powersgd", "run.powersgd_start=2", "run.bucket_mb=1"]),
    "fp16": ("simclr", ["run.precision=fp16", "run.micro_batch_size=6"]),
    "fsdp": ("byol", ["run.parallel=fsdp", "optim.name=lars", "run.precision=fp64"]),
    "local": ("byol", ["run.local_sgd_period=3", "run.local_sgd_start=2", "run.local_sgd_group=local"]),
}
THREE = {
    "ddp": [],
    "noise": ["run.noise_scale=true"],
    "powersgd": STRATEGIES["powersgd"][1],
    "replayed": ["run.replay_every=1"],
    "static": ["run.static_graph=true"],
}
MORE = ["run.checkpoint_every=1", "run.keep_checkpoints=9", "optim.steps=6", "run.bucket_mb=1"]


def arguments_of(strategy: str, shards: Path, run: Path) -> list[str]:
    method, how = STRATEGIES[strategy]
    return settings_of(method, shards, run, *MORE, *how)


def interrupted(world: World, runs: dict[str, list[str]]) -> None:
    """Each run, and again from its third step on."""
    for arguments in runs.values():
        config = load_config(None, arguments)
        for rest in (slice(3, None), slice(0)):
            pretrain(config, world)
            if world.is_main and rest.stop is None:
                (config.run.dir / "step-000000006.pt").rename(config.run.dir / "whole.pt")
                for path in checkpoints(config.run.dir)[rest]:
                    path.unlink()
            world.barrier()


def interrupted_and_held(world: World, runs: dict[str, list[str]]) -> list[int]:
    """And `held_bytes` of the run in shards."""
    interrupted(world, runs)
    return held_bytes(world, load_config(None, [*runs["fsdp"], "optim.name=adamw"]))


def held_bytes(world: World, config: Config) -> list[int]:
    """Of a rank's trained parameters and AdamW's state of them, and what they are without shards."""
    method = build(config, world)
    optimizer = optimizer_of(config, method, world)
    parameters = [p for p in method.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = [local(p) for p in parameters]
    held += [t for state in acting(optimizer).state.values() for name, t in state.items() if name != "step"]
    return [sum(t.nbytes for t in held), 3 * sum(p.nbytes for p in parameters)]


@pytest.fixture(scope="module")
def both(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[list[int]]]:
    root = tmp_path_factory.mktemp("strategies")
    started = {name: arguments_of(name, shards, root / name) for name in STRATEGIES}
    ranks = run_ranks(interrupted_and_held, 2, started)
    return {name: root / name for name in STRATEGIES}, ranks


@pytest.fixture
def runs(both: tuple[dict[str, Path], list[list[int]]]) -> dict[str, Path]:
    return both[0]


def states(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return load(run / "whole.pt"), load(checkpoints(run)[-1])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else bool(a == b)


def test_on_three_processes_an_interrupted_run_is_the_whole_one(shards: Path, tmp_path: Path) -> None:
    """Where the order in which ranks are added shows; of two it does not."""
    started = {name: settings_of("simclr", shards, tmp_path / name, *MORE, *more) for name, more in THREE.items()}
    run_ranks(interrupted, 3, started)
    for name in THREE:
        whole, continued = states(tmp_path / name)
        assert same(whole["method"], continued["method"]), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_interrupted_run_is_the_whole_one(strategy: str, runs: dict[str, Path]) -> None:
    whole, continued = states(runs[strategy])
    assert step_of(checkpoints(runs[strategy])[-1]) == 6
    for part in ("method", "optimizer", "ranks", "scaler"):
        assert same(whole.get(part), continued.get(part)), part


def test_on_other_processes_their_own_state_is_left_out_and_a_line_says_so(
    runs: dict[str, Path], shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["powersgd"], run)
    checkpoints(run)[-1].unlink()
    pretrain(load_config(None, arguments_of("powersgd", shards, run)), World())
    assert "is left out: it is of {'processes': 2, 'run.gradient_compression': 'powersgd'" in caplog.text
    assert "ranks" not in load(checkpoints(run)[-1])


def test_shards_are_saved_whole_and_continued_by_a_single_process(
    runs: dict[str, Path], shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["fsdp"], run)
    checkpoints(run)[-1].unlink()
    pretrain(load_config(None, arguments_of("fsdp", shards, run)), World())
    expected, found = load(runs["fsdp"] / "whole.pt"), load(checkpoints(run)[-1])
    torch.testing.assert_close(found["method"], expected["method"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["optimizer"]["state"], expected["optimizer"]["state"], rtol=1e-6, atol=1e-12)


def test_a_rank_holds_its_share_of_parameters_and_of_the_optimizers_state(
    both: tuple[dict[str, Path], list[list[int]]],
) -> None:
    (first, total), (second, _) = both[1]
    assert first + second == total
    assert 0.45 * total < first < 0.55 * total


def test_post_local_sgd_averages_weights_and_teachers_when_they_are_due(runs: dict[str, Path]) -> None:
    """After steps 3 to 5 of gradients of their own; the checkpoint's weights are the averages all along."""
    moving = ["encoder.backbone.conv1.weight", "teacher_encoder.backbone.conv1.weight"]
    for step, equal in ((3, False), (4, False), (5, True)):
        state = load(runs["local"] / f"step-{step:09}.pt")
        first, second = (state["ranks"]["states"][rank]["method"] for rank in (0, 1))
        for name in moving:
            assert torch.equal(first[name], second[name]) == equal, f"{name} after step {step}"
            torch.testing.assert_close(state["method"][name], (first[name] + second[name]) / 2, rtol=0, atol=1e-7)
    assert "ranks" not in load(runs["local"] / "step-000000002.pt")


def test_fp16_takes_its_scale_along(runs: dict[str, Path]) -> None:
    """Of which this run had refused the first updates, by 2^16 and so on."""
    state = load(runs["fp16"] / "step-000000003.pt")["scaler"]
    assert state["scale"] < 2**16
