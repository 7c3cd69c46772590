import os
import time

import pytest
import torch
from torch import nn

from benchmarks import ceilings
from sharding.manifest import ShardSet
from tests.slow_storage import slow_reads


def test_the_cores_there_are_those_that_threads_of_this_process_got() -> None:
    before, start = time.process_time(), time.perf_counter()
    found = ceilings.cores(0.2)
    spent, elapsed = time.process_time() - before, time.perf_counter() - start
    assert 0 < found <= 1.05 * len(os.sched_getaffinity(0))
    assert found == pytest.approx(spent / elapsed, rel=0.2)


@pytest.mark.parametrize("seconds", [0.05, 0])
def test_reading_is_measured_in_both_orders_cold_and_warm(seconds: float, shard_set: ShardSet) -> None:
    found = ceilings.reading(shard_set, num_threads=2, seconds=seconds)
    assert list(found) == ["cold random", "warm random", "cold sequential", "warm sequential"]
    assert all(rate > 0 for rate in found.values())


def test_reading_waits_for_slow_storage(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", os.preadv)  # put back afterwards
    slow_reads(0.05)
    found = ceilings.reading(shard_set, num_threads=2, seconds=0.1)
    assert max(found.values()) <= 2 / 0.05


@pytest.mark.parametrize(("module", "shape"), [(nn.Linear(30, 20), (8, 30)), (nn.Conv2d(3, 5, 3), (8, 3, 6, 6))])
def test_a_steps_flop_are_counted_forward_and_backward(module: nn.Module, shape: tuple[int, ...]) -> None:
    def step() -> int:
        module(torch.ones(shape)).sum().backward()  # the input has no gradient: the weights' one costs as the output
        return shape[0]

    products = {nn.Linear: 30 * 20, nn.Conv2d: 5 * 3 * 9 * 16}[type(module)]
    assert ceilings.asked(step)["FLOP"] == 2 * 2 * products


def test_a_steps_bytes_are_those_that_its_operations_read_and_write() -> None:
    a, b = torch.ones(1000), torch.ones(1000)

    def step() -> int:
        (a.view(10, 100) + b.view(10, 100)).mul_(2)
        return 2

    assert ceilings.asked(step)["bytes"] * 2 == 4 * 1000 * (3 + 2), "a view costs nothing; a scalar hardly"


def test_the_data_sheet_of_an_unknown_gpu_says_nothing() -> None:
    assert ceilings.data_sheet("NVIDIA H100 80GB HBM3", torch.bfloat16) == {"data sheet": 989e12}
    assert ceilings.data_sheet("NVIDIA H100 80GB HBM3", torch.float32) == {}
    assert ceilings.data_sheet("NVIDIA Magic 9000", torch.bfloat16) == {}


def test_the_machines_arithmetic_is_measured() -> None:
    found = ceilings.arithmetic(torch.device("cpu"), torch.float32, 0.01)
    assert found.keys() == {"matmul", "copy"}
    assert all(rate > 1e6 for rate in found.values())
