"""What is chosen for the user where the configuration says ``auto`` or 0, in one place."""

import os
import subprocess
from functools import cache
from pathlib import Path

import torch
import xxhash

from train.config import Config
from train.processes.distributed import World

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def dtype(config: Config, world: World) -> torch.dtype:
    """The dtype of the batches: for bf16 that of autocast, with parameters, losses and optimizer state in float32."""
    automatic = "bf16" if world.device.type == "cuda" else "fp32"
    return _DTYPES[automatic if config.run.precision == "auto" else config.run.precision]


def num_threads(configured: int) -> int:
    """The cores this process may use, shared with the other processes of its node."""
    return configured or max(1, len(os.sched_getaffinity(0)) // processes_on_node())


def processes_on_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@cache
def code_version() -> str:
    """A checksum of the source code that decides what a run computes."""
    root, digest = Path(__file__).parent.parent, xxhash.xxh3_64()
    for package in ("sharding", "pipeline", "train"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """The checkout's commit, with a mark if the tree is changed; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
