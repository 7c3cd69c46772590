"""Real processes over gloo, for tests of what several ranks do together, also where there are fewer GPUs than ranks."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from sharding.engine import start_forkserver
from train.processes.distributed import session

# Ranks are forked by a server that has imported these, which takes seconds. It is the sharder's as well.
multiprocessing.set_forkserver_preload(["datasets", "sharding.part", "train.pretrain", "tests.processes"])

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # environment in which torch finds none


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` in ``world_size`` processes; what each rank returned (tensors, plain values).

    ``function`` must be importable (defined at the top of a test module).
    """
    with tempfile.TemporaryDirectory() as directory:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # on a free port, as torchrun's
        start_forkserver()
        environment = {**os.environ, **NO_GPU}
        given = (environment, world_size, store.port, directory, function, arguments)
        start_processes(_rank, given, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int,
    environment: Mapping[str, str],
    world_size: int,
    port: int,
    directory: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()  # the server's, of when it was started
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 opens no store of its own
    torch.set_num_threads(1)
    with session("tests") as world:
        torch.save(function(world, *arguments), Path(directory) / f"{rank}.pt")
