import os
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from typing import Any

import pytest
import torch

from tests.processes import run_ranks
from train.processes import neighbours
from train.processes.distributed import World
from train.processes.failure import _is_of_communication
from train.processes.neighbours import Neighbours


def rows(rank: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(2 * columns).view(columns, 2).T + rank).to(dtype)  # not contiguous


def gathered(world: World) -> list[Any]:
    others = Neighbours()
    found = [
        others.gather(rows(world.rank, columns, dtype))
        for columns in (1, 8, 20_000)  # the last ones are for gloo
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    return [len(others._sockets or {}), *found]


def gathered_on_two_machines(world: World) -> list[Any]:
    neighbours._machine = lambda: f"machine {world.rank}"
    return gathered(world)


@pytest.mark.parametrize(("work", "sockets"), [(gathered, 2), (gathered_on_two_machines, 0)])
def test_tensors_of_all_ranks_are_stacked(work: Any, sockets: int) -> None:
    ranks = run_ranks(work, 3)
    cases = [(columns, dtype) for columns in (1, 8, 20_000) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    for number, *found in ranks:
        assert number == sockets
        for (columns, dtype), tensor in zip(cases, found, strict=True):
            assert torch.equal(tensor, torch.stack([rows(rank, columns, dtype) for rank in range(3)]))


def left_alone(world: World) -> str:
    others = Neighbours()
    others.gather(torch.zeros(1))
    if world.rank == 1:
        for socket in (others._sockets or {}).values():
            os.close(socket.fileno())  # as if the process had been killed
            socket._handle = None  # type: ignore[attr-defined]
        return ""
    try:
        others.gather(torch.zeros(1))
    except RuntimeError as error:
        return f"{_is_of_communication(error)} {error}"
    return "nothing"


def test_a_rank_that_is_gone_is_a_failure_of_communication() -> None:
    assert run_ranks(left_alone, 2)[0].startswith("True the connection to a process of this machine was lost")


def with_a_different_key(world: World) -> bool:
    """Rank 0 listens with a key that it has not told."""
    if world.rank == 0:
        vars(neighbours)["Listener"] = lambda *given, **options: Listener(*given, **options | {"authkey": b"not told"})
    try:
        Neighbours().gather(torch.zeros(1))
    except AuthenticationError:
        return True
    return False


def test_who_does_not_know_the_key_is_refused_before_anything_is_unpickled() -> None:
    assert run_ranks(with_a_different_key, 2) == [True, True]
