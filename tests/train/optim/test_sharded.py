import copy
from typing import Any

import torch
from torch import nn

from tests.processes import run_ranks
from train.optim.optimizers import OptimConfig, acting, build_optimizer, restore
from train.processes.distributed import World

NAMES = ["lars", "larc", "lamb", "sgd", "adamw"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def updates(module: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for number in range(first, first + count):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        module(x).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (number + 1)
        optimizer.step()


def optimizer_of(name: str, module: nn.Module, world: World) -> torch.optim.Optimizer:
    return build_optimizer(OptimConfig(name=name, weight_decay=0.1), module, world.shard)


def size(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.numel() for state in optimizer.state.values() for k, v in state.items() if k != "step")


def first_half(world: World) -> list[Any]:
    """Of each optimizer after two updates: how many values this rank holds, what is saved, the weights."""
    found = []
    for name in NAMES:
        module = network()
        optimizer = optimizer_of(name, module, world)
        updates(module, optimizer, 2)
        state = world.full_state(module, optimizer) or {"optimizer": None}
        found.append([size(acting(optimizer)), state["optimizer"], module.state_dict()])
    return found


def second_half(world: World, states: list[Any]) -> list[Any]:
    """The weights of each optimizer after two more updates, and how many values this rank holds twice."""
    found = []
    for name, state in zip(NAMES, states, strict=True):
        module = network()
        optimizer = optimizer_of(name, module, world)
        restore(optimizer, copy.deepcopy(state))
        doubled = size(optimizer) if world.size > 1 else 0
        updates(module, optimizer, 2, first=2)
        found.append([module.state_dict(), doubled])
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_sharded_optimizer_updates_saves_and_continues_as_a_whole_one() -> None:
    (whole,), ranks = run_ranks(first_half, 1), run_ranks(first_half, 2)
    for (total, expected, weights), (held_0, saved, weights_0), (held_1, none, weights_1) in zip(
        whole, *ranks, strict=True
    ):
        assert none is None
        assert held_0 + held_1 == total
        assert 0.3 * total < held_0 < 0.7 * total
        assert equal(weights_0, weights)
        assert equal(weights_1, weights)
        assert saved["state"].keys() == expected["state"].keys()
        assert all(equal(saved["state"][number], expected["state"][number]) for number in saved["state"])
    states = [saved for _, saved, _ in ranks[0]]
    (whole,), ranks = run_ranks(second_half, 1, states), run_ranks(second_half, 2, states)
    for (weights, _), *others in zip(whole, *ranks, strict=True):
        for found, doubled in others:
            assert equal(found, weights)
            assert doubled == 0
