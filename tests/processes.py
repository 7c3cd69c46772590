"""Real processes over gloo, for tests of what several ranks do together, also where there are fewer GPUs than ranks."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

from sharding.engine import start_forkserver
from train.processes.distributed import session

# Ranks are forked by a server that has imported these, which takes seconds. It is the sharder's as well.
multiprocessing.set_forkserver_preload(["datasets", "sharding.part", "train.pretrain", "tests.processes"])

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # environment in which torch finds none


class Meeting(NamedTuple):
    """Where ranks meet, and the environment that they are to have beside: the fork server's is of when it started."""

    world_size: int
    port: int
    environment: Mapping[str, str]

    def enter(self, rank: int) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.environ.clear()
        os.environ |= self.environment
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # rank 0 opens no store of its own
        torch.set_num_threads(1)


def open_meeting(world_size: int) -> tuple[TCPStore, Meeting]:
    """On a free port, as torchrun's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, Meeting(world_size, store.port, {**os.environ, **NO_GPU})


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` in ``world_size`` processes; what each rank returned (tensors, plain values).

    ``function`` must be importable (defined at the top of a test module).
    """
    with tempfile.TemporaryDirectory() as directory:
        _store, meeting = open_meeting(world_size)
        start_forkserver()
        given = (meeting, directory, function, arguments)
        start_processes(_rank, given, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int, meeting: Meeting, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    meeting.enter(rank)
    with session("tests") as world:
        torch.save(function(world, *arguments), Path(directory) / f"{rank}.pt")


def start_command(
    function: Callable[..., int], said: Path, *arguments: Any, rank: int = 0, meeting: Meeting | None = None
) -> ForkServerProcess:
    """``function(*arguments)``, a command (importable), in a process of its own, which has imported all. What it prints
    and says on its standard error goes to the file ``said``."""
    start_forkserver()
    given = (function, said, arguments, rank, meeting or Meeting(1, 0, {**os.environ, **NO_GPU}))
    process = multiprocessing.get_context("forkserver").Process(target=_command, args=given, daemon=True)
    process.start()
    return process


def _command(function: Callable[..., int], said: Path, arguments: tuple[Any, ...], rank: int, meeting: Meeting) -> None:
    meeting.enter(rank)
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(function(*arguments))


def ends_of_ranks(
    function: Callable[..., int], world_size: int, folder: Path, *arguments: Any
) -> list[tuple[int | None, str]]:
    """``function(*arguments)``, a command, in ranks that nobody ends when one of them fails; the exit code of
    each, and what it said."""
    _store, meeting = open_meeting(world_size)
    said = [folder / f"{rank}.txt" for rank in range(world_size)]
    ranks = [start_command(function, said[r], *arguments, rank=r, meeting=meeting) for r in range(world_size)]
    for process in ranks:
        process.join(timeout=300)
    return [(process.exitcode, path.read_text()) for process, path in zip(ranks, said, strict=True)]
