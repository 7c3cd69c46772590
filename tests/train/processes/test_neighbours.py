from itertools import product
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import run_ranks
from train.processes import neighbours
from train.processes.distributed import World
from train.processes.failure import _is_of_communication
from train.processes.neighbours import Neighbours

CASES = list(product((1, 8, 20_000), (np.float32, np.float64)))  # the largest are for gloo


def rows(rank: int, columns: int, dtype: Any) -> np.ndarray:
    return (np.arange(2 * columns).reshape(columns, 2).T + rank).astype(dtype, order="K")  # not contiguous


def gathered(world: World) -> list[Any]:
    others = Neighbours()
    found = [torch.from_numpy(others.gather(*rows(world.rank, *case))) for case in CASES]
    return [len(others._sockets or {}), *found]


def gathered_on_two_machines(world: World) -> list[Any]:
    neighbours._machine = lambda: f"machine {world.rank}"
    return gathered(world)


@pytest.mark.parametrize(("work", "sockets"), [(gathered, 2), (gathered_on_two_machines, 0)])
def test_vectors_of_all_ranks_are_stacked(work: Any, sockets: int) -> None:
    ranks = run_ranks(work, 3)
    for number, *found in ranks:
        assert number == sockets
        for case, tensor in zip(CASES, found, strict=True):
            assert np.array_equal(tensor, np.stack([rows(rank, *case) for rank in range(3)]))


def left_alone(world: World) -> str:
    others = Neighbours()
    others.gather(np.zeros(1))
    if world.rank == 1:
        for socket in (others._sockets or {}).values():
            socket.close()  # as if the process had been killed
        return ""
    try:
        others.gather(np.zeros(1))
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
        Neighbours().gather(np.zeros(1))
    except AuthenticationError:
        return True
    return False


def test_who_does_not_know_the_key_is_refused_before_anything_is_unpickled() -> None:
    assert run_ranks(with_a_different_key, 2) == [True, True]
